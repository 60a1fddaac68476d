// A few queries against many keys: keys and values are read in place, once, in splits that are joined in order.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "attend.h"
#include "pool.h"

namespace glocal {

bool few_queries(const Call& call) {
  int heads = call.form->by_head ? 1 : call.group();
  return call.form->nq > 0 && call.form->nq <= 4 && call.form->nq * heads <= 64;
}

namespace {

constexpr int STEP = 16;  // keys taken together: their rows stay in the first cache

struct Rows {
  Floats k, v;
  std::vector<float> q, o, m, l;
};

float extra(const Call& call, const Places& places, int b, int h, int64_t query, int64_t key) {
  float x = 0;
  if (call.bias)
    x += call.bias[b * call.bias_stride[0] + h * call.bias_stride[1] + query * call.bias_stride[2] +
                   key * call.bias_stride[3]];
  if (call.table) x += call.table[h * call.table_head + places.table_key(key) + places.table_query(query)];
  return x * LOG2E;
}

}  // namespace

void decode(const Call& call) {
  Form& form = *call.form;
  if (call.batch == 0 || call.heads == 0) return;
  const Kernels& kernels = current();
  const int nq = (int)form.nq, heads = form.by_head ? 1 : call.group(), rows = nq * heads;
  const int per = call.heads / heads, units = call.batch * per;
  const int dim = call.dim, width = call.value_dim;
  const int ldk = padded(dim, kernels.vector), ldv = padded(width, kernels.vector);
  const Tiling& tiling = form.rows(nq);
  Places places;
  places.prepare(call);

  // The key lists, once for each lead of the tables.
  const int lead_b = form.by_batch ? call.batch : 1, lead_h = form.by_head ? per : 1;
  std::vector<std::unique_ptr<Work>> works(lead_b * lead_h);
  const int split = units >= 16 ? 2048 : 512;
  parallel(call.threads, lead_b * lead_h, 1, [&](int i) {
    works[i] = std::make_unique<Work>();
    works[i]->prepare(form, tiling, 0, i / lead_h, i % lead_h * heads, split, 1);
  });
  auto work_of = [&](int unit) -> const Work& {
    return *works[(form.by_batch ? unit / per : 0) * lead_h + (form.by_head ? unit % per : 0)];
  };
  std::vector<int> start(units + 1, 0);
  for (int u = 0; u < units; ++u) start[u + 1] = start[u] + work_of(u).chunks();
  std::vector<int> unit_of(start[units]);
  for (int u = 0; u < units; ++u) std::fill(unit_of.begin() + start[u], unit_of.begin() + start[u + 1], u);

  const int part = rows * (ldv + 2);  // per split: outputs, then m and l of each row
  Floats parts;
  float* base = parts.need((size_t)start[units] * part + 1);
  parallel(call.threads, start[units], 1, [&](int task) {
    static thread_local Rows mine;
    const int u = unit_of[task], c = task - start[u], b = u / per, h0 = u % per * heads, kv = h0 / call.group();
    const Work& work = work_of(u);
    const int32_t* keys = work.chunk_keys(c);
    const Range range = work.entries(c, 0);
    float* o = base + (size_t)task * part;
    float *m = o + (size_t)rows * ldv, *l = m + rows;
    std::fill(o, m, 0.0f);
    std::fill(m, l, -HUGE_VALF);
    std::fill(l, l + rows, 0.0f);
    mine.q.assign((size_t)rows * ldk, 0.0f);
    for (int r = 0; r < rows; ++r) {
      int32_t query = r % nq;
      kernels.pack(slice(call.q, call.dtype, b, h0 + r / nq), call.dtype, call.q.row, &query, 1, dim,
                   &mine.q[(size_t)r * ldk], ldk, nullptr);
      for (int d = 0; d < dim; ++d) mine.q[(size_t)r * ldk + d] *= query_factor(call);
    }
    const bool in_place = call.dtype == F32;
    float* kbuf = in_place ? nullptr : mine.k.need((size_t)STEP * ldk);
    float* vbuf = in_place ? nullptr : mine.v.need((size_t)STEP * ldv);
    const float *kb = (const float*)slice(call.k, call.dtype, b, kv), *vb = (const float*)slice(call.v, call.dtype, b, kv);
    for (int first = range.begin; first < range.end; first += STEP) {
      const int n = std::min(STEP, range.end - first);
      const float *krow[STEP], *vrow[STEP];
      const float *next[STEP], *const *ahead_k = nullptr, *const *ahead_v = nullptr;
      int32_t key[STEP];
      for (int e = 0; e < n; ++e) key[e] = keys[work.place[first + e]];
      if (in_place) {
        for (int e = 0; e < n; ++e) krow[e] = kb + key[e] * call.k.row, vrow[e] = vb + key[e] * call.v.row;
        // While keys are worked on these values are fetched, and while values are, the next keys.
        ahead_v = vrow;
        if (range.end - first - n >= n) {
          for (int e = 0; e < n; ++e) next[e] = kb + keys[work.place[first + n + e]] * call.k.row;
          ahead_k = next;
        }
      } else {
        kernels.pack(kb, call.dtype, call.k.row, key, n, dim, kbuf, ldk, nullptr);
        kernels.pack(vb, call.dtype, call.v.row, key, n, width, vbuf, ldv, nullptr);
        for (int e = 0; e < n; ++e) krow[e] = kbuf + (size_t)e * ldk, vrow[e] = vbuf + (size_t)e * ldv;
      }
      for (int query = 0; query < nq; ++query) {
        // Only the rows that this query sees: nothing masked is ever computed.
        const float *ks[STEP], *vs[STEP];
        int32_t seen[STEP];
        int live = 0;
        for (int e = 0; e < n; ++e)
          if (work.mask[first + e] >> query & 1) ks[live] = krow[e], vs[live] = vrow[e], seen[live++] = key[e];
        if (!live) continue;
        for (int g = 0; g < heads; ++g) {
          const int r = g * nq + query;
          float s[STEP], alpha;
          kernels.dots(&mine.q[(size_t)r * ldk], ks, live, dim, s, ahead_v ? vs : nullptr, width);
          ahead_v = nullptr;
          if (call.softcap > 0)
            for (int e = 0; e < live; ++e) s[e] = std::tanh(s[e]) * call.softcap * LOG2E;
          if (call.bias || call.table)
            for (int e = 0; e < live; ++e) s[e] += extra(call, places, b, h0 + g, query, seen[e]);
          kernels.softmax_row(s, live, m + r, l + r, &alpha);
          kernels.weighted_row(s, vs, live, width, alpha, o + (size_t)r * ldv, ahead_k, dim);
          ahead_k = nullptr;
        }
      }
    }
  });

  for (int u = 0; u < units; ++u)
    for (int r = 0; r < rows; ++r) {
      float top = -HUGE_VALF, total = 0;
      bool broken = false;
      for (int t = start[u]; t < start[u + 1]; ++t) {
        float m = base[(size_t)t * part + (size_t)rows * ldv + r];
        broken |= m != m;
        top = std::max(top, m);
      }
      if (top == -HUGE_VALF) top = 0;
      std::vector<float> sum(width, 0.0f);
      for (int t = start[u]; t < start[u + 1]; ++t) {
        const float* o = base + (size_t)t * part;
        float m = o[(size_t)rows * ldv + r], l = o[(size_t)rows * ldv + rows + r];
        float weight = m == -HUGE_VALF && l == 0 ? 0.0f : std::exp2(m - top);
        if (weight == 0.0f && l == l) continue;
        total += l * weight;
        for (int d = 0; d < width; ++d) sum[d] += o[(size_t)r * ldv + d] * weight;
      }
      const int b = u / per, h = u % per * heads + r / nq, query = r % nq;
      bool none = total == 0 && !broken;
      kernels.unpack(sum.data(), none ? 0.0f : 1.0f / total, width, row_of(call.out, call.dtype, b, h, query), call.dtype);
      call.lse[((int64_t)b * call.heads + h) * form.nq + query] = none ? -HUGE_VALF : (top + std::log2(total)) * LN2;
    }
}

}  // namespace glocal
