// The backward pass: probabilities are computed again from lse, and one sweep gives dQ, dK and dV together.
//
// The tiles of one key head are cut into groups, a number that depends on shapes only. A group adds up dK and dV of the
// keys it meets in a buffer of its own; groups add theirs to the result in order, so the bits never depend on threads.
#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <mutex>

#include "attend.h"
#include "pool.h"

namespace glocal {
namespace {

struct Scratch {
  Work work;
  Floats rows, q, grad, qrows, grows, dq, lse, delta, k, v, s, t, dp;
  Floats dk, dv, dbias, dtable;
  std::vector<uint8_t> bad_k, bad_q, bad_g, met;
  std::vector<int32_t> offset;
  std::vector<int64_t> to;
};

Scratch& scratch() {
  static thread_local Scratch s;
  return s;
}

// Tasks of a chain take turns in order. Tasks are started in order too, so the one that is waited for is running.
class Turns {
 public:
  explicit Turns(int chains) : next_(chains, 0) {}
  template <class F>
  void take(int chain, int number, const F& fn) {
    std::unique_lock<std::mutex> lock(mutex_);
    moved_.wait(lock, [&] { return next_[chain] == number; });
    lock.unlock();
    fn();
    lock.lock();
    ++next_[chain];
    moved_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable moved_;
  std::vector<int> next_;
};

struct Bounds {
  int64_t begin = INT64_MAX, end = 0;
};

struct Pass {
  const Call& call;
  const Gradients& grads;
  const Kernels& kernels;
  const Tiling& tiling;
  const Places& places;
  int heads, ld, width_k, width_v, chunk_keys;

  // Where a group adds up: rows of keys from keys.begin on. A row is zeroed when it is first met, so a few global
  // or far apart keys do not cost a buffer that reaches to them.
  struct Sums {
    Bounds keys;
    float *dk, *dv, *dbias, *dtable;
    uint8_t* met;
    int64_t bias_row;  // length of a row of dbias
    int64_t bias_head, table_head;
  };

  void tile(Scratch& mine, int tile, int first_tile, int b, int h0, const Sums& sums) const {
    Work& work = mine.work;
    const int lanes = kernels.lanes, dim = call.dim, value_dim = call.value_dim, kv = h0 / call.group();
    work.prepare(*call.form, tiling, tile, b, h0, chunk_keys, ld);
    const int panels = tiling.panels, all = panels * heads;
    const size_t q_size = (size_t)lanes * dim, g_size = (size_t)lanes * value_dim;
    const size_t qrow_size = (size_t)lanes * width_k, grow_size = (size_t)lanes * width_v;
    float* q = mine.q.need(all * q_size);
    float* grad = mine.grad.need(all * g_size);
    float* qrows = mine.qrows.need(all * qrow_size);
    float* grows = mine.grows.need(all * grow_size);
    float* dq = mine.dq.need(all * qrow_size);
    float* lse = mine.lse.need((size_t)all * lanes);
    float* delta = mine.delta.need((size_t)all * lanes);
    float* rows = mine.rows.need((size_t)lanes * width_v);
    std::fill(dq, dq + all * qrow_size, 0.0f);
    mine.bad_q.assign((size_t)all * lanes, 0);
    mine.bad_g.assign((size_t)all * lanes, 0);
    bool bad_row = false;
    for (int g = 0; g < heads; ++g)
      for (int p = 0; p < panels; ++p) {
        if (!work.valid(p)) continue;
        const size_t at = (size_t)g * panels + p;
        const int h = h0 + g;
        const int32_t* queries = work.queries(p);
        float *qr = qrows + at * qrow_size, *gr = grows + at * grow_size;
        bad_row |= kernels.pack(slice(call.q, call.dtype, b, h), call.dtype, call.q.row, queries, lanes, dim, qr, width_k,
                                &mine.bad_q[at * lanes]);
        bad_row |= kernels.pack(slice(grads.grad_out, call.dtype, b, h), call.dtype, grads.grad_out.row, queries, lanes,
                                value_dim, gr, width_v, &mine.bad_g[at * lanes]);
        kernels.pack(slice(call.out, call.dtype, b, h), call.dtype, call.out.row, queries, lanes, value_dim, rows, width_v,
                     nullptr);
        kernels.transpose(qr, width_k, dim, query_factor(call), q + at * q_size);
        kernels.transpose(gr, width_v, value_dim, 1.0f, grad + at * g_size);
        for (int lane = 0; lane < lanes; ++lane) {
          const int64_t from = ((int64_t)b * call.heads + h) * call.form->nq + queries[lane];
          float z = queries[lane] < 0 ? -HUGE_VALF : call.lse[from], dot = 0;
          // A lane without a query or a key gets P = 0 from an infinite lse.
          lse[at * lanes + lane] = z == -HUGE_VALF ? HUGE_VALF : z * LOG2E;
          if (queries[lane] >= 0) {
            for (int d = 0; d < value_dim; ++d) dot += gr[lane * width_v + d] * rows[lane * width_v + d];
            if (grads.grad_lse) dot -= grads.grad_lse[from];
          }
          delta[at * lanes + lane] = dot;
        }
      }
    float* k = mine.k.need((size_t)(chunk_keys + 1) * ld);
    float* v = mine.v.need((size_t)chunk_keys * ld);
    float* s = mine.s.need((size_t)chunk_keys * lanes);
    float* t = call.softcap > 0 ? mine.t.need((size_t)chunk_keys * lanes) : nullptr;
    float* dp = mine.dp.need((size_t)chunk_keys * lanes);
    std::fill(k + (size_t)chunk_keys * ld, k + (size_t)(chunk_keys + 1) * ld, 0.0f);
    mine.bad_k.resize(chunk_keys);
    float ones[MAX_LANES];
    std::fill(ones, ones + MAX_LANES, 1.0f);
    Panel panel{call, kernels, places, {}, {}, {}, 0};
    for (int c = 0; c < work.chunks(); ++c) {
      const int32_t* keys = work.chunk_keys(c);
      const int n = work.chunk_size(c);
      meet(sums, keys, n);
      bool bad = kernels.pack(slice(call.k, call.dtype, b, kv), call.dtype, call.k.row, keys, n, dim, k, ld,
                              mine.bad_k.data());
      kernels.pack(slice(call.v, call.dtype, b, kv), call.dtype, call.v.row, keys, n, value_dim, v, ld, nullptr);
      for (int p = 0; p < panels; ++p) {
        const Range r = work.entries(c, p);
        const int live = r.end - r.begin;
        if (!live) continue;
        const uint32_t* mask = &work.mask[r.begin];
        const int32_t *place = &work.place[r.begin], *offset = &work.offset[r.begin];
        for (int g = 0; g < heads; ++g) {
          const size_t at = (size_t)g * panels + p;
          if (panel.adjusted()) panel.lanes(b, h0 + g, work.queries(p), lanes);
          panel.scores(q + at * q_size, k, offset, work, c, r, s, nullptr, t);
          kernels.scores(grad + at * g_size, v, offset, nullptr, live, value_dim, dp, nullptr);
          kernels.gradient(s, dp, lse + at * lanes, delta + at * lanes, mask, live);
          if (sums.dbias || sums.dtable) add_scores(mine, work, c, p, r, dp, tile, first_tile, g, sums);
          if (t) kernels.uncap(dp, t, live);
          const int32_t* from = offset;
          if (bad) {
            mine.offset.assign(offset, offset + live);
            for (int e = 0; e < live; ++e)
              if (mine.bad_k[place[e]]) mine.offset[e] = chunk_keys * ld;
            from = mine.offset.data();
          }
          float* to_q = dq + at * qrow_size;
          kernels.weighted(dp, k, from, work.first(c, p), work.last(c, p), width_k, ones, to_q, width_k);
          for (int e = 0; bad && e < live; ++e)
            if (mine.bad_k[place[e]])
              for (int lane = 0; lane < lanes; ++lane)
                if (mask[e] & work.valid(p) & (1u << lane))
                  for (int d = 0; d < dim; ++d) to_q[lane * width_k + d] += dp[e * lanes + lane] * k[offset[e] + d];
          add_rows(mine, s, grows + at * grow_size, width_v, keys, place, mask, live, work.valid(p),
                   bad_row ? &mine.bad_g[at * lanes] : nullptr, sums.keys.begin, sums.dv);
          add_rows(mine, dp, qrows + at * qrow_size, width_k, keys, place, mask, live, work.valid(p),
                   bad_row ? &mine.bad_q[at * lanes] : nullptr, sums.keys.begin, sums.dk);
        }
      }
    }
    for (int g = 0; g < heads; ++g)
      for (int p = 0; p < panels; ++p)
        for (int lane = 0; lane < lanes; ++lane) {
          const int query = work.queries(p)[lane];
          if (query >= 0)
            kernels.unpack(dq + ((size_t)g * panels + p) * qrow_size + (size_t)lane * width_k, call.scale, dim,
                           row_of(grads.dq, call.dtype, b, h0 + g, query), call.dtype);
        }
  }

  void meet(const Sums& sums, const int32_t* keys, int n) const {
    for (int i = 0; i < n; ++i) {
      const int64_t row = keys[i] - sums.keys.begin;
      if (sums.met[row]) continue;
      sums.met[row] = 1;
      std::fill_n(sums.dk + row * width_k, width_k, 0.0f);
      std::fill_n(sums.dv + row * width_v, width_v, 0.0f);
    }
  }

  // sum[key] += weights[entry] . rows. Rows with a NaN or infinity reach only the keys that their query sees.
  void add_rows(Scratch& mine, const float* weights, float* rows, int width, const int32_t* keys, const int32_t* place,
                const uint32_t* mask, int n, uint32_t valid, const uint8_t* bad, int64_t first, float* sum) const {
    mine.to.resize(n);
    for (int e = 0; e < n; ++e) mine.to[e] = (keys[place[e]] - first) * width;
    std::vector<float> kept;
    for (int lane = 0; bad && lane < kernels.lanes; ++lane) {
      if (!bad[lane]) continue;
      kept.assign(rows + (size_t)lane * width, rows + (size_t)(lane + 1) * width);
      for (int e = 0; e < n; ++e)
        if (mask[e] & valid & (1u << lane))
          for (int d = 0; d < width; ++d) sum[mine.to[e] + d] += weights[e * kernels.lanes + lane] * kept[d];
    }
    if (!kept.empty()) {
      std::vector<float> clean(rows, rows + (size_t)kernels.lanes * width);
      for (int lane = 0; lane < kernels.lanes; ++lane)
        if (bad[lane]) std::fill(clean.begin() + (size_t)lane * width, clean.begin() + (size_t)(lane + 1) * width, 0.0f);
      std::vector<float> safe(weights, weights + (size_t)n * kernels.lanes);
      for (int e = 0; e < n; ++e)
        for (int lane = 0; lane < kernels.lanes; ++lane)
          if (bad[lane]) safe[(size_t)e * kernels.lanes + lane] = 0;
      kernels.outer(safe.data(), clean.data(), width, mine.to.data(), n, width, sum);
      return;
    }
    kernels.outer(weights, rows, width, mine.to.data(), n, width, sum);
  }

  // Gradients of bias and table, one live pair at a time.
  void add_scores(Scratch&, const Work& work, int chunk, int p, Range r, const float* ds, int tile, int first_tile, int g,
                  const Sums& sums) const {
    const int lanes = kernels.lanes;
    const int32_t *queries = work.queries(p), *keys = work.chunk_keys(chunk);
    for (int e = r.begin; e < r.end; ++e) {
      const uint32_t live = work.mask[e] & work.valid(p);
      const int64_t key = keys[work.place[e]];
      const float* row = ds + (size_t)(e - r.begin) * lanes;
      for (int lane = 0; lane < lanes; ++lane) {
        if (!(live >> lane & 1)) continue;
        if (sums.dbias) {
          int64_t at = grads.dbias_stride[2] ? ((int64_t)(tile - first_tile) * tiling.panels + p) * lanes + lane : 0;
          sums.dbias[g * sums.bias_head + at * sums.bias_row + (grads.dbias_stride[3] ? key : 0)] += row[lane];
        }
        if (sums.dtable)
          sums.dtable[g * sums.table_head + places.table_key(key) + places.table_query(queries[lane])] += row[lane];
      }
    }
  }
};

// The first and last key that the tiles of a group meet.
Bounds bounds_of(const Form& form, const Tiling& tiling, int first, int last, int b, int h) {
  Bounds all;
  b = form.by_batch ? b : 0;
  h = form.by_head ? h : 0;
  for (int tile = first; tile < last; ++tile)
    for (const BoxTables& box : form.boxes) {
      int64_t low = 0, high = 0;
      bool any = true;
      int rest = tile, digit[MAX_RANK];
      for (int a = form.rank - 1; a >= 0; --a) {
        digit[a] = rest % (int)tiling.axis[a].size();
        rest /= (int)tiling.axis[a].size();
      }
      for (int a = 0; a < form.rank; ++a) {
        const AxisTile& t = tiling.axis[a][digit[a]];
        const int32_t *lo = box.axis[a].lo.at(b, h), *hi = box.axis[a].hi.at(b, h);
        int least = INT32_MAX, most = 0;
        for (int i = 0; i < t.count; ++i) {
          int at = t.residue + tiling.step[a] * (t.first + i);
          if (hi[at] <= lo[at]) continue;
          least = std::min(least, lo[at]);
          most = std::max(most, hi[at]);
        }
        any &= most > least;
        low = low * form.lk[a] + least;
        high = high * form.lk[a] + most - 1;
      }
      if (!any) continue;
      all.begin = std::min(all.begin, low);
      all.end = std::max(all.end, high + 1);
    }
  if (all.begin > all.end) all.begin = all.end = 0;
  return all;
}

}  // namespace

void backward(const Call& call, const Gradients& grads) {
  Form& form = *call.form;
  if (call.batch == 0 || call.heads == 0 || form.nq == 0) return;
  const Kernels& kernels = current();
  const int group = call.group(), heads = form.by_head ? 1 : group;
  const int units = call.batch * call.kv_heads;
  int most = std::max(1, 8 / heads);
  while (most > 1 && form.nq / (kernels.lanes * most) * units < 32) most /= 2;
  const Tiling& tiling = form.tiling(kernels.lanes, most);
  Places places;
  places.prepare(call);
  const int ld = row_length(std::max(call.dim, call.value_dim));
  Pass pass{call,
            grads,
            kernels,
            tiling,
            places,
            heads,
            ld,
            padded(call.dim, kernels.vector),
            padded(call.value_dim, kernels.vector),
            std::max(64, 256 * 80 / std::max(ld, 80))};
  const int groups = std::clamp(std::min((64 + units - 1) / units, tiling.tiles / 2), 1, 64);
  const bool shared = grads.dbias || grads.dtable;
  Turns turns(shared ? 1 : units);
  parallel(call.threads, units * groups, 1, [&](int task) {
    Scratch& mine = scratch();
    const int unit = task / groups, part = task % groups, b = unit / call.kv_heads, kv = unit % call.kv_heads;
    const int first = (int)((int64_t)tiling.tiles * part / groups), last = (int)((int64_t)tiling.tiles * (part + 1) / groups);
    Bounds keys;
    for (int h = 0; h < (form.by_head ? group : 1); ++h) {
      Bounds some = bounds_of(form, tiling, first, last, b, kv * group + h);
      if (some.end <= some.begin) continue;
      keys.begin = std::min(keys.begin, some.begin);
      keys.end = std::max(keys.end, some.end);
    }
    if (keys.end <= keys.begin) keys.begin = keys.end = 0;
    auto zeros = [](Floats& f, size_t n) {
      float* p = f.need(n);
      std::fill(p, p + n, 0.0f);
      return p;
    };
    const int64_t span = keys.end - keys.begin;
    const int64_t bias_rows = grads.dbias_stride[2] ? (int64_t)(last - first) * tiling.panels * kernels.lanes : 1;
    const int64_t bias_row = grads.dbias_stride[3] ? form.nk : 1;
    Pass::Sums sums{keys, nullptr, nullptr, nullptr, nullptr, nullptr, bias_row, 0, 0};
    std::exception_ptr error;
    try {
      sums.dk = mine.dk.need(span * pass.width_k);
      sums.dv = mine.dv.need(span * pass.width_v);
      mine.met.assign(span, 0);
      sums.met = mine.met.data();
      if (grads.dbias) {
        sums.bias_head = grads.dbias_stride[1] ? bias_rows * bias_row : 0;
        sums.dbias = zeros(mine.dbias, bias_rows * bias_row * (grads.dbias_stride[1] ? group : 1));
      }
      if (grads.dtable) {
        sums.table_head = grads.dtable_head;
        sums.dtable = zeros(mine.dtable, grads.table_size * (grads.dtable_head ? group : 1));
      }
      for (int tile = first; tile < last; ++tile)
        for (int h = 0; h < group; h += heads) {
          Pass::Sums part_sums = sums;
          if (sums.dbias) part_sums.dbias += h * sums.bias_head;
          if (sums.dtable) part_sums.dtable += h * sums.table_head;
          pass.tile(mine, tile, first, b, kv * group + h, part_sums);
        }
    } catch (...) {
      error = std::current_exception();
    }
    turns.take(shared ? 0 : unit, shared ? task : part, [&] {
      if (error) return;
      auto add = [&](const Array& to, const float* from, int width, int dim, float factor) {
        for (int64_t i = 0; i < span; ++i) {
          if (!sums.met[i]) continue;
          float* row = (float*)row_of(to, F32, b, kv, keys.begin + i);
          for (int d = 0; d < dim; ++d) row[d] += from[i * width + d] * factor;
        }
      };
      add(grads.dk, sums.dk, pass.width_k, call.dim, call.scale);
      add(grads.dv, sums.dv, pass.width_v, call.value_dim, 1.0f);
      for (int h = 0; h < group; ++h) {
        if (grads.dtable && (h == 0 || sums.table_head)) {
          float* to = grads.dtable + (kv * group + h) * grads.dtable_head;
          for (int64_t i = 0; i < grads.table_size; ++i) to[i] += sums.dtable[h * sums.table_head + i];
        }
        if (!grads.dbias || (h > 0 && !sums.bias_head)) continue;
        float* to = grads.dbias + b * grads.dbias_stride[0] + (kv * group + h) * grads.dbias_stride[1];
        const float* from = sums.dbias + h * sums.bias_head;
        for (int64_t i = 0; i < bias_rows; ++i) {
          int64_t query = 0;
          if (grads.dbias_stride[2]) {
            int tile = first + (int)(i / (tiling.panels * kernels.lanes)), at = (int)(i % (tiling.panels * kernels.lanes));
            mine.work.prepare(form, tiling, tile, b, kv * group, pass.chunk_keys, ld);
            query = mine.work.queries(at / kernels.lanes)[at % kernels.lanes];
            if (query < 0) continue;
          }
          for (int64_t j = 0; j < bias_row; ++j) to[query * grads.dbias_stride[2] + j] += from[i * bias_row + j];
        }
      }
    });
    if (error) std::rethrow_exception(error);
  });
}

}  // namespace glocal
