// The forward pass: for each tile of queries, chunks of keys packed once, panels of queries against them.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "attend.h"
#include "pool.h"

namespace glocal {

void Places::prepare(const Call& call) {
  if (!call.table) return;
  const Form& f = *call.form;
  int64_t stride[MAX_RANK], total = 1, start = 0;
  for (int a = f.rank - 1; a >= 0; --a) {
    stride[a] = total;
    start += (f.lq[a] - 1) * total;
    total *= f.lq[a] + f.lk[a] - 1;
  }
  auto fill = [&](std::vector<int64_t>& out, const int* grid, int64_t n, int sign, int64_t first) {
    out.resize(n);
    for (int64_t i = 0; i < n; ++i) {
      int64_t at = first, rest = i;
      for (int a = f.rank - 1; a >= 0; --a) {
        at += sign * (rest % grid[a]) * stride[a];
        rest /= grid[a];
      }
      out[i] = at;
    }
  };
  fill(key_, f.lk, f.nk, 1, start);
  fill(query_, f.lq, f.nq, -1, 0);
}

void Panel::lanes(int b, int h, const int32_t* queries, int n) {
  count = 0;
  if (call.bias) {
    Added& a = added[count++];
    a.base = call.bias + b * call.bias_stride[0] + h * call.bias_stride[1];
    for (int i = 0; i < n; ++i) a.lane[i] = std::max(queries[i], 0) * call.bias_stride[2];
  }
  if (call.table) {
    Added& a = added[count++];
    a.base = call.table + h * call.table_head;
    // A lane without a query takes some query of the panel, so that what it reads exists.
    int some = 0;
    for (int i = 0; i < n; ++i) some = queries[i] >= 0 ? queries[i] : some;
    for (int i = 0; i < n; ++i) a.lane[i] = places.table_query(queries[i] >= 0 ? queries[i] : some);
  }
}

void Panel::scores(const float* panel, const float* k, const int32_t* offset, const Work& work, int chunk, Range r,
                   float* s, float* top, float* t) {
  const int n = r.end - r.begin;
  const uint32_t* mask = &work.mask[r.begin];
  if (!adjusted()) {
    kernels.scores(panel, k, offset, mask, n, call.dim, s, top);
    return;
  }
  kernels.scores(panel, k, offset, nullptr, n, call.dim, s, nullptr);
  const int32_t* keys = work.chunk_keys(chunk);
  const int32_t* place = &work.place[r.begin];
  int at = 0;
  if (call.bias) {
    bias_key.resize(n);
    for (int e = 0; e < n; ++e) bias_key[e] = keys[place[e]] * call.bias_stride[3];
    added[at++].key = bias_key.data();
  }
  if (call.table) {
    table_key.resize(n);
    for (int e = 0; e < n; ++e) table_key[e] = places.table_key(keys[place[e]]);
    added[at++].key = table_key.data();
  }
  kernels.adjust(s, n, call.softcap * LOG2E, added, count, mask, top, t);
}

namespace {

struct Scratch {
  Work work;
  Floats rows, panels, k, v, s, o, m, l;
  std::vector<uint8_t> bad;
  std::vector<int32_t> offset;
};

Scratch& scratch() {
  static thread_local Scratch s;
  return s;
}

constexpr int CHUNK = 256;

struct Pass {
  const Call& call;
  const Kernels& kernels;
  const Tiling& tiling;
  const Places& places;
  int heads;  // query heads that share a tile: a whole group, unless heads differ in pattern

  // `next` is the unit that this thread is likely to take after this one, or -1.
  void tile(int tile, int b, int h0, int next) const {
    Scratch& mine = scratch();
    Work& work = mine.work;
    const Form& form = *call.form;
    const int lanes = kernels.lanes, dim = call.dim, width = padded(call.value_dim, kernels.vector);
    const int ld = row_length(std::max(dim, call.value_dim)), kv = h0 / call.group();
    const int chunk_keys = std::max(64, CHUNK * 80 / std::max(ld, 80));
    // Keys are only read one number at a time, so rows that lie close together serve where they are.
    const bool in_place = call.dtype == F32 && call.k.row <= 2 * ld && form.nk * call.k.row < INT32_MAX;
    work.prepare(form, tiling, tile, b, h0, chunk_keys, ld, in_place ? call.k.row : 0);
    const int panels = tiling.panels, all = panels * heads;
    float* rows = mine.rows.need((size_t)lanes * ld);
    float* qp = mine.panels.need((size_t)all * lanes * dim);
    float* o = mine.o.need((size_t)all * lanes * width);
    float* m = mine.m.need((size_t)all * lanes);
    float* l = mine.l.need((size_t)all * lanes);
    std::fill(o, o + (size_t)all * lanes * width, 0.0f);
    std::fill(m, m + (size_t)all * lanes, -HUGE_VALF);
    std::fill(l, l + (size_t)all * lanes, 0.0f);
    for (int g = 0; g < heads; ++g)
      for (int p = 0; p < panels; ++p) {
        if (!work.valid(p)) continue;
        kernels.pack(slice(call.q, call.dtype, b, h0 + g), call.dtype, call.q.row, work.queries(p), lanes, dim, rows, ld,
                     nullptr);
        kernels.transpose(rows, ld, dim, query_factor(call), qp + (size_t)(g * panels + p) * lanes * dim);
      }
    float* packed = in_place ? nullptr : mine.k.need((size_t)chunk_keys * ld);
    const float* k = in_place ? (const float*)slice(call.k, call.dtype, b, kv) : packed;
    float* v = mine.v.need((size_t)(chunk_keys + 1) * ld);
    float* s = mine.s.need((size_t)chunk_keys * lanes);
    std::fill(v + (size_t)chunk_keys * ld, v + (size_t)(chunk_keys + 1) * ld, 0.0f);
    mine.bad.resize(chunk_keys);
    Panel panel{call, kernels, places, {}, {}, {}, 0};
    for (int c = 0; c < work.chunks(); ++c) {
      const int32_t* keys = work.chunk_keys(c);
      const int n = work.chunk_size(c);
      if (!in_place)
        kernels.pack(slice(call.k, call.dtype, b, kv), call.dtype, call.k.row, keys, n, dim, packed, ld, nullptr);
      bool bad = kernels.pack(slice(call.v, call.dtype, b, kv), call.dtype, call.v.row, keys, n, call.value_dim, v, ld,
                              mine.bad.data());
      const bool more = c + 1 < work.chunks();
      for (int p = 0; p < panels; ++p) {
        Range r = work.entries(c, p);
        if (more)
          fetch(work, c + 1, b, kv, p, panels);
        else if (next >= 0)
          fetch(work, 0, next / per(), next % per() * heads / call.group(), p, panels);
        if (r.begin == r.end) continue;
        for (int g = 0; g < heads; ++g) {
          size_t at = (size_t)g * panels + p;
          float top[MAX_LANES], alpha[MAX_LANES];
          std::fill(top, top + lanes, -HUGE_VALF);
          if (panel.adjusted()) panel.lanes(b, h0 + g, work.queries(p), lanes);
          panel.scores(qp + at * lanes * dim, k, in_place ? &work.in_place[r.begin] : &work.offset[r.begin], work, c, r, s, top, nullptr);
          kernels.softmax(s, r.end - r.begin, top, m + at * lanes, l + at * lanes, alpha);
          const int32_t* offset = &work.offset[r.begin];
          if (bad) offset = without_bad(mine, work, r, chunk_keys * ld);
          kernels.weighted(s, v, offset, work.first(c, p), work.last(c, p), width, alpha, o + at * lanes * width, width);
          if (bad) add_bad(mine, work, r, s, v, work.valid(p), o + at * lanes * width, width);
        }
      }
    }
    for (int g = 0; g < heads; ++g)
      for (int p = 0; p < panels; ++p)
        for (int lane = 0; lane < lanes; ++lane) {
          int query = work.queries(p)[lane];
          if (query < 0) continue;
          size_t at = ((size_t)g * panels + p) * lanes + lane;
          bool none = l[at] == 0;
          kernels.unpack(o + at * width, none ? 0.0f : 1.0f / l[at], call.value_dim,
                         row_of(call.out, call.dtype, b, h0 + g, query), call.dtype);
          call.lse[((int64_t)b * call.heads + h0 + g) * form.nq + query] =
              none ? -HUGE_VALF : (m[at] + std::log2(l[at])) * LN2;
        }
  }

  int per() const { return call.heads / heads; }

  // Bring a part of the keys and values of a coming chunk near, while a panel is worked on.
  void fetch(const Work& work, int chunk, int b, int kv, int part, int parts) const {
    const int n = work.chunk_size(chunk), size = call.dtype == F32 ? 4 : 2;
    const int32_t* keys = work.chunk_keys(chunk);
    const char *k = (const char*)slice(call.k, call.dtype, b, kv), *v = (const char*)slice(call.v, call.dtype, b, kv);
    for (int i = n * part / parts; i < n * (part + 1) / parts; ++i) {
      for (int d = 0; d < call.dim * size; d += 64) __builtin_prefetch(k + keys[i] * call.k.row * size + d);
      for (int d = 0; d < call.value_dim * size; d += 64) __builtin_prefetch(v + keys[i] * call.v.row * size + d);
    }
  }

  // A row with a NaN or infinity must not meet the zero probability of a masked lane: it is replaced by zeros here
  // and added lane by lane afterwards.
  const int32_t* without_bad(Scratch& mine, const Work& work, Range r, int zero) const {
    mine.offset.assign(work.offset.begin() + r.begin, work.offset.begin() + r.end);
    for (int e = r.begin; e < r.end; ++e)
      if (mine.bad[work.place[e]]) mine.offset[e - r.begin] = zero;
    return mine.offset.data();
  }
  void add_bad(const Scratch& mine, const Work& work, Range r, const float* s, const float* v, uint32_t valid, float* o,
               int width) const {
    for (int e = r.begin; e < r.end; ++e) {
      if (!mine.bad[work.place[e]]) continue;
      for (int lane = 0; lane < kernels.lanes; ++lane)
        if (work.mask[e] & valid & (1u << lane))
          for (int d = 0; d < call.value_dim; ++d)
            o[lane * width + d] += s[(e - r.begin) * kernels.lanes + lane] * v[work.offset[e] + d];
    }
  }
};

}  // namespace

void forward(const Call& call) {
  Form& form = *call.form;
  if (call.batch == 0 || call.heads == 0 || form.nq == 0) return;
  const Kernels& kernels = current();
  const int heads = form.by_head ? 1 : call.group(), units = call.batch * call.heads / heads;
  // Enough tasks for many threads, but never a choice that depends on how many there are.
  int most = std::max(1, 16 / heads);
  while (most > 1 && form.nq / (kernels.lanes * most) * units < 32) most /= 2;
  const Tiling& tiling = form.tiling(kernels.lanes, most);
  Places places;
  places.prepare(call);
  Pass pass{call, kernels, tiling, places, heads};
  // Neighbouring tasks are heads of one tile: they share its lists. Causal tiles grow, so the last ones go first.
  parallel(call.threads, tiling.tiles * units, std::min(units, 4), [&](int task) {
    int tile = tiling.tiles - 1 - task / units, unit = task % units, per = pass.per();
    bool same = !form.by_head && (!form.by_batch || (unit + 1) % per);
    pass.tile(tile, unit / per, unit % per * heads, same && unit + 1 < units ? unit + 1 : -1);
  });
}

}  // namespace glocal
