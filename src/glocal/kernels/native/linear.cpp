#include "linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "pool.h"

namespace glocal {
namespace {

constexpr int CHUNK = 32;  // positions compared pair by pair: a multiple of every vector

struct Scratch {
  Floats q, k, kt, v, p, out, state, sum;
};

// One key head with some of its query heads, from the first position to the last.
class Head {
 public:
  Head(const Linear& call, Scratch& mine, int b, int kv, int first, int count)
      : call(call), kernels(current()), b(b), kv(kv), first(first), count(count) {
    dim = padded(call.dim, kernels.vector);
    width = padded(call.value_dim, kernels.vector);
    ldk = row_length(dim);
    ldv = row_length(width);
    q = mine.q.need((size_t)CHUNK * ldk);
    k = mine.k.need((size_t)CHUNK * ldk);
    kt = mine.kt.need((size_t)dim * CHUNK);
    v = mine.v.need((size_t)CHUNK * ldv);
    p = mine.p.need(CHUNK * CHUNK);
    out = mine.out.need((size_t)CHUNK * ldv);
    state = mine.state.need((size_t)dim * ldv);
    sum = mine.sum.need(dim);
  }

  void run(bool keep) {
    const int64_t at = ((int64_t)b * call.kv_heads + kv) * call.dim;
    std::memset(state, 0, sizeof(float) * dim * ldv);
    std::memset(sum, 0, sizeof(float) * dim);
    for (int d = 0; d < call.dim; ++d)
      std::memcpy(state + (size_t)d * ldv, call.kv + (at + d) * call.value_dim, sizeof(float) * call.value_dim);
    if (call.sum) std::memcpy(sum, call.sum + at, sizeof(float) * call.dim);
    for (int64_t start = 0; start < call.keys; start += CHUNK)
      chunk(start, (int)std::min<int64_t>(CHUNK, call.keys - start));
    if (!keep) return;
    for (int d = 0; d < call.dim; ++d)
      std::memcpy(call.kv_after + (at + d) * call.value_dim, state + (size_t)d * ldv, sizeof(float) * call.value_dim);
    if (call.sum) std::memcpy(call.sum_after + at, sum, sizeof(float) * call.dim);
  }

 private:
  // n rows from a position on, as float32; what is missing of a chunk is 0.
  void fill(const Array& from, int head, int64_t start, int n, int size, float* to, int ld) {
    int32_t index[CHUNK];
    for (int i = 0; i < CHUNK; ++i) index[i] = i < n ? i : -1;
    kernels.pack(row_of(from, call.dtype, b, head, start), call.dtype, from.row, index, CHUNK, size, to, ld, nullptr);
  }

  void chunk(int64_t start, int n) {
    fill(call.k, kv, start, n, call.dim, k, ldk);
    fill(call.v, kv, start, n, call.value_dim, v, ldv);
    kernels.features(k, ldk, n, call.dim, call.feature, false);
    for (int i = 0; call.real && i < n; ++i)
      if (!call.real[b * call.real_batch + (start + i) * call.real_row]) std::memset(k + (size_t)i * ldk, 0, sizeof(float) * dim);
    const int64_t before = call.keys - call.queries;  // positions that have no query
    if (start + n > before) {
      const int skipped = (int)std::max<int64_t>(0, before - start);
      kernels.flip(k, ldk, CHUNK, dim, kt, CHUNK);
      for (int h = first; h < first + count; ++h) answer(h, start, n, skipped);
    }
    const float one = 1;
    kernels.product(k, 1, ldk, v, ldv, dim, width, n, state, ldv, NEITHER);
    if (call.sum) kernels.product(&one, 0, 0, k, ldk, 1, dim, n, sum, 0, NEITHER);
  }

  void answer(int h, int64_t start, int n, int skipped) {
    const int64_t query = start - (call.keys - call.queries);
    int32_t index[CHUNK];
    for (int i = 0; i < CHUNK; ++i) index[i] = i >= skipped && i < n ? i - skipped : -1;
    kernels.pack(row_of(call.q, call.dtype, b, h, query + skipped), call.dtype, call.q.row, index, CHUNK, call.dim, q, ldk,
                 nullptr);
    kernels.features(q + (size_t)skipped * ldk, ldk, n - skipped, call.dim, call.feature, call.normalise);
    std::memset(p, 0, sizeof(float) * CHUNK * CHUNK);
    kernels.product(q, ldk, 1, kt, CHUNK, n, CHUNK, call.dim, p, CHUNK, LOWER_C);
    for (int i = 0; i < n; ++i) std::fill(p + i * CHUNK + i + 1, p + (i + 1) * CHUNK, 0.0f);
    std::memset(out, 0, sizeof(float) * CHUNK * ldv);
    kernels.product(p, CHUNK, 1, v, ldv, n, width, n, out, ldv, LOWER_A);
    kernels.product(q, ldk, 1, state, ldv, n, width, call.dim, out, ldv, NEITHER);
    for (int i = skipped; i < n; ++i) {
      float factor = 1;
      if (call.normalise) {
        float total = kernels.dot(p + i * CHUNK, nullptr, CHUNK) + kernels.dot(q + (size_t)i * ldk, sum, dim);
        if (std::fabs(total) < call.least) total = std::copysign(call.least, total < 0 ? -1.0f : 1.0f);
        factor = 1 / total;
      }
      kernels.unpack(out + (size_t)i * ldv, factor, call.value_dim, row_of(call.out, call.dtype, b, h, query + i), call.dtype);
    }
  }

  const Linear& call;
  const Kernels& kernels;
  int b, kv, first, count, dim, width, ldk, ldv;
  float *q, *k, *kt, *v, *p, *out, *state, *sum;
};

}  // namespace

void linear(const Linear& call) {
  const int group = call.heads / call.kv_heads;
  // Heads that share their keys go together, unless threads would have nothing to do.
  const int together = call.batch * call.kv_heads >= call.threads ? group : 1;
  const int tasks = call.batch * call.heads / together;
  parallel(call.threads, tasks, 1, [&](int task) {
    thread_local Scratch mine;
    const int first = task * together % call.heads, b = task * together / call.heads;
    Head(call, mine, b, first / group, first, together).run(first % group == 0);
  });
}

}  // namespace glocal
