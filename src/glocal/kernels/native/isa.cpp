// The micro-kernels. Compiled once per instruction set, with GLOCAL_KERNELS naming the function that hands them out.
#include "kernels.h"
#include "vec.h"

namespace {

using glocal::Added;
using glocal::BF16;
using glocal::BLOCK;
using glocal::F16;
using glocal::F32;
using glocal::LN2;

constexpr uint32_t ALL = LANES == 32 ? 0xffffffffu : (1u << LANES) - 1;

// Half precision by integer arithmetic, so that it vectorizes everywhere.
inline float half_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, body = (uint32_t)(h & 0x7fff) << 13;
  float f;
  std::memcpy(&f, &body, 4);
  f *= 5.192296858534828e33f;  // 2^112 moves the exponent, denormals included
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((h & 0x7c00) == 0x7c00) bits |= 0x7f800000;
  bits |= sign;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t float_to_half(float f) {
  uint32_t x;
  std::memcpy(&x, &f, 4);
  uint16_t sign = (uint16_t)((x >> 16) & 0x8000);
  x &= 0x7fffffff;
  if (x > 0x7f800000) return sign | 0x7e00;
  if (x >= 0x477ff000) return sign | 0x7c00;  // rounds past the largest half
  if (x < 0x38800000) {                       // a denormal half: let the float unit round it
    float a;
    std::memcpy(&a, &x, 4);
    a += 0.5f;
    std::memcpy(&x, &a, 4);
    return sign | (uint16_t)(x - 0x3f000000);
  }
  x += 0xc8000fff + ((x >> 13) & 1);
  return sign | (uint16_t)(x >> 13);
}

inline float brain_to_float(uint16_t h) {
  uint32_t x = (uint32_t)h << 16;
  float f;
  std::memcpy(&f, &x, 4);
  return f;
}

inline uint16_t float_to_brain(float f) {
  uint32_t x;
  std::memcpy(&x, &f, 4);
  if ((x & 0x7fffffff) > 0x7f800000) return (uint16_t)((x >> 16) | 0x40);
  return (uint16_t)((x + 0x7fff + ((x >> 16) & 1)) >> 16);
}

inline void widen(const char* src, int dtype, int64_t at, int dim, float* out) {
  if (dtype == F32) {
    std::memcpy(out, (const float*)src + at, sizeof(float) * dim);
  } else if (dtype == F16) {
    const uint16_t* p = (const uint16_t*)src + at;
    int d = 0;
#if defined(__F16C__)
    for (; d + 8 <= dim; d += 8) _mm256_storeu_ps(out + d, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + d))));
#endif
    for (; d < dim; ++d) out[d] = half_to_float(p[d]);
  } else {
    const uint16_t* p = (const uint16_t*)src + at;
    for (int d = 0; d < dim; ++d) out[d] = brain_to_float(p[d]);
  }
}

inline bool broken(const float* row, int padded) {
  vf check{};
  for (int d = 0; d < padded; d += VL) check += load(row + d) * 0.0f;
  float total = sum(check);
  return total != total;
}

bool pack(const void* src, int dtype, int64_t stride, const int32_t* index, int n, int dim, float* dst, int ld,
          uint8_t* bad) {
  const int padded = (dim + VL - 1) / VL * VL, whole = dim / VL * VL;
  vf check[2] = {};  // becomes NaN with the first row that holds a NaN or an infinity
  for (int i = 0; i < n; ++i) {
    float* out = dst + (int64_t)i * ld;
    if (index[i] < 0) {
      std::memset(out, 0, sizeof(float) * padded);
      continue;
    }
    if (dtype == F32) {
      const float* in = (const float*)src + index[i] * stride;
      int d = 0;
      for (; d + 2 * VL <= whole; d += 2 * VL) {
        vf x = load(in + d), y = load(in + d + VL);
        store(out + d, x);
        store(out + d + VL, y);
        check[0] += x * 0.0f;
        check[1] += y * 0.0f;
      }
      for (; d < whole; d += VL) {
        vf x = load(in + d);
        store(out + d, x);
        check[0] += x * 0.0f;
      }
      if (whole < dim) {
        vf tail{};
        std::memcpy(&tail, in + whole, sizeof(float) * (dim - whole));
        store(out + whole, tail);
        check[1] += tail * 0.0f;
      }
    } else {
      widen((const char*)src, dtype, index[i] * stride, dim, out);
      for (int d = dim; d < padded; ++d) out[d] = 0;
      for (int d = 0; bad && d < padded; d += VL) check[0] += load(out + d) * 0.0f;
    }
  }
  float total = sum(check[0] + check[1]);
  const bool any = total != total;
  for (int i = 0; bad && i < n; ++i) bad[i] = any && broken(dst + (int64_t)i * ld, padded);
  return any;
}

void unpack(const float* src, float factor, int dim, void* dst, int dtype) {
  if (dtype == F32) {
    float* out = (float*)dst;
    int d = 0;
    for (; d + VL <= dim; d += VL) store(out + d, load(src + d) * factor);
    for (; d < dim; ++d) out[d] = src[d] * factor;
  } else if (dtype == F16) {
    for (int d = 0; d < dim; ++d) ((uint16_t*)dst)[d] = float_to_half(src[d] * factor);
  } else {
    for (int d = 0; d < dim; ++d) ((uint16_t*)dst)[d] = float_to_brain(src[d] * factor);
  }
}

void transpose(const float* rows, int ld, int dim, float factor, float* panel) {
  for (int d = 0; d < dim; ++d)
    for (int i = 0; i < LANES; ++i) panel[d * LANES + i] = rows[(int64_t)i * ld + d] * factor;
}

template <int M>
inline void score_block(const float* panel, const float* a, const int32_t* offset, const uint32_t* mask, int dim,
                        float* s, vf* top) {
  const float* row[M];
  for (int i = 0; i < M; ++i) row[i] = a + offset[i];
  vf acc[M][NV] = {};
  for (int d = 0; d < dim; ++d) {
    vf b[NV];
    for (int v = 0; v < NV; ++v) b[v] = load(panel + d * LANES + v * VL);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      vf x = splat(row[i][d]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[i][v] += x * b[v];
    }
  }
  uint32_t live = ALL;
  if (mask)
    for (int i = 0; i < M; ++i) live &= mask[i];
  if (live != ALL)
    for (int i = 0; i < M; ++i)
      for (int v = 0; v < NV; ++v) acc[i][v] = masked(mask[i] >> (v * VL), acc[i][v], splat(-INF));
  for (int i = 0; i < M; ++i)
    for (int v = 0; v < NV; ++v) {
      store(s + i * LANES + v * VL, acc[i][v]);
      if (top) top[v] = larger(acc[i][v], top[v]);
    }
}

void scores(const float* panel, const float* a, const int32_t* offset, const uint32_t* mask, int n, int dim, float* s,
            float* top) {
  vf most[NV];
  for (int v = 0; v < NV; ++v) most[v] = top ? load(top + v * VL) : vf{};
  vf* keep = top ? most : nullptr;
  int e = 0;
  for (; e + MR <= n; e += MR)
    score_block<MR>(panel, a, offset + e, mask ? mask + e : nullptr, dim, s + e * LANES, keep);
  const uint32_t* m = mask ? mask + e : nullptr;
  float* rest = s + e * LANES;
  switch (n - e) {
    case 7: score_block<MR >= 8 ? 7 : 1>(panel, a, offset + e, m, dim, rest, keep); break;
    case 6: score_block<MR >= 7 ? 6 : 1>(panel, a, offset + e, m, dim, rest, keep); break;
    case 5: score_block<5>(panel, a, offset + e, m, dim, rest, keep); break;
    case 4: score_block<4>(panel, a, offset + e, m, dim, rest, keep); break;
    case 3: score_block<3>(panel, a, offset + e, m, dim, rest, keep); break;
    case 2: score_block<2>(panel, a, offset + e, m, dim, rest, keep); break;
    case 1: score_block<1>(panel, a, offset + e, m, dim, rest, keep); break;
    default: break;
  }
  if (top)
    for (int v = 0; v < NV; ++v) store(top + v * VL, most[v]);
}

void adjust(float* s, int n, float cap, const Added* added, int count, const uint32_t* mask, float* top, float* t) {
  vf most[NV];
  for (int v = 0; v < NV; ++v) most[v] = top ? load(top + v * VL) : vf{};
  for (int e = 0; e < n; ++e) {
    for (int v = 0; v < NV; ++v) {
      vf x = load(s + e * LANES + v * VL);
      if (cap > 0) {
        vf th = tanh(x);
        if (t) store(t + e * LANES + v * VL, th);
        x = th * cap;
      }
      for (int c = 0; c < count; ++c) {
        const float* base = added[c].base + added[c].key[e];
        vf more{};
        for (int i = 0; i < VL; ++i) more[i] = base[added[c].lane[v * VL + i]];
        x += more * glocal::LOG2E;
      }
      if (mask) x = masked(mask[e] >> (v * VL), x, splat(-INF));
      store(s + e * LANES + v * VL, x);
      most[v] = larger(x, most[v]);
    }
  }
  if (top)
    for (int v = 0; v < NV; ++v) store(top + v * VL, most[v]);
}

void softmax(float* s, int n, const float* top, float* m, float* l, float* alpha) {
  vf shift[NV], total[NV];
  for (int v = 0; v < NV; ++v) {
    vf old = load(m + v * VL), now = larger(load(top + v * VL), old);
    shift[v] = pick(now == -INF, vf{}, now);
    store(alpha + v * VL, exp2(old - shift[v]));
    store(m + v * VL, now);
    total[v] = vf{};
  }
  for (int e = 0; e < n; ++e)
    for (int v = 0; v < NV; ++v) {
      vf p = exp2(load(s + e * LANES + v * VL) - shift[v]);
      store(s + e * LANES + v * VL, p);
      total[v] += p;
    }
  for (int v = 0; v < NV; ++v) store(l + v * VL, load(l + v * VL) * load(alpha + v * VL) + total[v]);
}

template <int W>
inline void weigh(const float* s, const float* b, const int32_t* offset, int first, int last, const float* alpha,
                  float* o, int ldo) {
  vf acc[BLOCK][W];
  for (int i = 0; i < BLOCK; ++i)
    for (int w = 0; w < W; ++w) acc[i][w] = load(o + i * ldo + w * VL) * alpha[i];
  for (int e = first; e < last; ++e) {
    const float* row = b + offset[e];
    const float* p = s + e * LANES;
    vf x[W];
    for (int w = 0; w < W; ++w) x[w] = load(row + w * VL);
#pragma GCC unroll 4
    for (int i = 0; i < BLOCK; ++i) {
      vf y = splat(p[i]);
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) acc[i][w] += y * x[w];
    }
  }
  for (int i = 0; i < BLOCK; ++i)
    for (int w = 0; w < W; ++w) store(o + i * ldo + w * VL, acc[i][w]);
}

void weighted(const float* s, const float* b, const int32_t* offset, const int32_t* first, const int32_t* last,
              int width, const float* alpha, float* o, int ldo) {
  for (int j = 0; j < width;) {
    int left = (width - j) / VL, w = left < WR ? left : WR;
    if (left == WR + 1 && WR == 3) w = 2;  // 4 = 2 + 2 keeps both busy
    for (int k = 0; k < LANES / BLOCK; ++k) {
      const float* sk = s + k * BLOCK;
      float* ok = o + (int64_t)k * BLOCK * ldo + j;
      switch (w) {
        case 4: weigh<WR >= 4 ? 4 : 1>(sk, b + j, offset, first[k], last[k], alpha + k * BLOCK, ok, ldo); break;
        case 3: weigh<3>(sk, b + j, offset, first[k], last[k], alpha + k * BLOCK, ok, ldo); break;
        case 2: weigh<2>(sk, b + j, offset, first[k], last[k], alpha + k * BLOCK, ok, ldo); break;
        default: weigh<1>(sk, b + j, offset, first[k], last[k], alpha + k * BLOCK, ok, ldo); break;
      }
    }
    j += w * VL;
  }
}

template <int M, int W>
inline void outer_block(const float* s, const float* b, int ldb, const int64_t* row, float* c) {
  vf acc[M][W];
  for (int i = 0; i < M; ++i)
    for (int w = 0; w < W; ++w) acc[i][w] = load(c + row[i] + w * VL);
#pragma GCC unroll 2
  for (int q = 0; q < LANES; ++q) {
    vf x[W];
    for (int w = 0; w < W; ++w) x[w] = load(b + (int64_t)q * ldb + w * VL);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      vf y = splat(s[i * LANES + q]);
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) acc[i][w] += y * x[w];
    }
  }
  for (int i = 0; i < M; ++i)
    for (int w = 0; w < W; ++w) store(c + row[i] + w * VL, acc[i][w]);
}

template <int M>
inline void outer_rows(const float* s, const float* b, int ldb, const int64_t* row, int width, float* c) {
  int j = 0;
  for (; j + 2 * VL <= width; j += 2 * VL) outer_block<M, 2>(s, b + j, ldb, row, c + j);
  for (; j < width; j += VL) outer_block<M, 1>(s, b + j, ldb, row, c + j);
}

void outer(const float* s, const float* b, int ldb, const int64_t* row, int n, int width, float* c) {
  int e = 0;
  for (; e + MR <= n; e += MR) outer_rows<MR>(s + e * LANES, b, ldb, row + e, width, c);
  for (; e + 2 <= n; e += 2) outer_rows<2>(s + e * LANES, b, ldb, row + e, width, c);
  for (; e < n; ++e) outer_rows<1>(s + e * LANES, b, ldb, row + e, width, c);
}

void gradient(float* s, float* dp, const float* lse, const float* delta, const uint32_t* mask, int n) {
  for (int v = 0; v < NV; ++v) {
    vf z = load(lse + v * VL), del = load(delta + v * VL);
    for (int e = 0; e < n; ++e) {
      float *ps = s + e * LANES + v * VL, *pd = dp + e * LANES + v * VL;
      vf p = exp2(load(ps) - z), d = p * (load(pd) - del);
      if (mask[e] != ALL) {
        p = masked(mask[e] >> (v * VL), p, vf{});
        d = masked(mask[e] >> (v * VL), d, vf{});
      }
      store(ps, p);
      store(pd, d);
    }
  }
}

void uncap(float* dp, const float* t, int n) {
  for (int i = 0; i < n * LANES; i += VL) {
    vf x = load(t + i), d = load(dp + i);
    // A masked lane stays 0 whatever its score was.
    store(dp + i, pick(d == 0.0f, vf{}, d * (1.0f - x * x)));
  }
}

template <int M>
inline void dot_block(const float* q, const float* const* rows, int dim, float* s) {
  vf acc[M][2] = {};
  int d = 0;
  for (; d + 2 * VL <= dim; d += 2 * VL) {
    vf x0 = load(q + d), x1 = load(q + d + VL);
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
      acc[i][0] += x0 * load(rows[i] + d);
      acc[i][1] += x1 * load(rows[i] + d + VL);
    }
  }
  for (; d + VL <= dim; d += VL)
    for (int i = 0; i < M; ++i) acc[i][0] += load(q + d) * load(rows[i] + d);
  for (int i = 0; i < M; ++i) {
    float total = sum(acc[i][0] + acc[i][1]);
    for (int k = d; k < dim; ++k) total += q[k] * rows[i][k];
    s[i] = total;
  }
}

// Fetch a row that will be read soon, while other rows are worked on.
inline void fetch(const float* row, int dim) {
  for (int d = 0; d < dim; d += 16) __builtin_prefetch(row + d);
}

void dots(const float* q, const float* const* rows, int n, int dim, float* s, const float* const* ahead, int width) {
  int e = 0;
  for (; e + 4 <= n; e += 4) {
    if (ahead)
      for (int i = 0; i < 4; ++i) fetch(ahead[e + i], width);
    dot_block<4>(q, rows + e, dim, s + e);
  }
  for (; e < n; ++e) dot_block<1>(q, rows + e, dim, s + e);
}

void softmax_row(float* s, int n, float* m, float* l, float* alpha) {
  float now = *m;
  for (int e = 0; e < n; ++e) now = s[e] > now ? s[e] : now;
  float shift = now == -INF ? 0.0f : now;
  vf total{};
  int e = 0;
  for (; e + VL <= n; e += VL) {
    vf p = exp2(load(s + e) - shift);
    store(s + e, p);
    total += p;
  }
  if (e < n) {
    vf x = splat(-INF);
    std::memcpy(&x, s + e, sizeof(float) * (n - e));
    vf p = exp2(x - shift);
    std::memcpy(s + e, &p, sizeof(float) * (n - e));
    total += p;
  }
  vf a = exp2(splat(*m - shift));
  *alpha = a[0];
  *l = *l * a[0] + sum(total);
  *m = now;
}

template <int W>
inline void weigh_row(const float* s, const float* const* rows, int n, int at, float alpha, float* o,
                      const float* const* ahead, int dim) {
  vf acc[W];
  for (int w = 0; w < W; ++w) acc[w] = load(o + w * VL) * alpha;
  for (int e = 0; e < n; ++e) {
    if (ahead) fetch(ahead[e], dim);
    vf y = splat(s[e]);
    for (int w = 0; w < W; ++w) acc[w] += y * load(rows[e] + at + w * VL);
  }
  for (int w = 0; w < W; ++w) store(o + w * VL, acc[w]);
}

void weighted_row(const float* s, const float* const* rows, int n, int dim, float alpha, float* o,
                  const float* const* ahead, int width) {
  int j = 0;
  for (; j + 8 * VL <= dim; j += 8 * VL) weigh_row<8>(s, rows, n, j, alpha, o + j, j ? nullptr : ahead, width);
  for (; j + 4 * VL <= dim; j += 4 * VL) weigh_row<4>(s, rows, n, j, alpha, o + j, j ? nullptr : ahead, width);
  for (; j + VL <= dim; j += VL) weigh_row<1>(s, rows, n, j, alpha, o + j, nullptr, width);
  for (; j < dim; ++j) {
    float acc = o[j] * alpha;
    for (int e = 0; e < n; ++e) acc += s[e] * rows[e][j];
    o[j] = acc;
  }
}

void exp2_array(const float* x, float* y, int n) {
  for (int i = 0; i < n; i += VL) {
    vf v{};
    int left = n - i < VL ? n - i : VL;
    std::memcpy(&v, x + i, sizeof(float) * left);
    v = exp2(v);
    std::memcpy(y + i, &v, sizeof(float) * left);
  }
}

template <int M, int W>
inline void product_block(const float* a, int64_t row, int64_t column, const float* b, int ldb, int k, float* c,
                          int ldc) {
  vf acc[M][W] = {};
  for (int e = 0; e < k; ++e) {
    vf x[W];
    for (int w = 0; w < W; ++w) x[w] = load(b + (int64_t)e * ldb + w * VL);
    const float* p = a + e * column;
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      vf y = splat(p[i * row]);
#pragma GCC unroll 2
      for (int w = 0; w < W; ++w) acc[i][w] += y * x[w];
    }
  }
  for (int i = 0; i < M; ++i)
    for (int w = 0; w < W; ++w) {
      float* p = c + (int64_t)i * ldc + w * VL;
      store(p, load(p) + acc[i][w]);
    }
}

template <int M>
inline void product_rows(const float* a, int64_t row, int64_t column, const float* b, int ldb, int n, int k, float* c,
                         int ldc) {
  int j = 0;
  for (; j + 2 * VL <= n; j += 2 * VL) product_block<M, 2>(a, row, column, b + j, ldb, k, c + j, ldc);
  for (; j < n; j += VL) product_block<M, 1>(a, row, column, b + j, ldb, k, c + j, ldc);
}

void product(const float* a, int64_t row, int64_t column, const float* b, int ldb, int m, int n, int k, float* c,
             int ldc, int lower) {
  for (int i = 0; i < m;) {
    const int rows = m - i >= MR ? MR : m - i >= 4 ? 4 : m - i >= 2 ? 2 : 1;
    const int most = i + rows;
    const int kk = lower == glocal::LOWER_A && most < k ? most : k;
    const int wide = (most + VL - 1) / VL * VL, nn = lower == glocal::LOWER_C && wide < n ? wide : n;
    const float* ai = a + i * row;
    float* ci = c + (int64_t)i * ldc;
    switch (rows) {
      case MR: product_rows<MR>(ai, row, column, b, ldb, nn, kk, ci, ldc); break;
      case 4: product_rows<4>(ai, row, column, b, ldb, nn, kk, ci, ldc); break;
      case 2: product_rows<2>(ai, row, column, b, ldb, nn, kk, ci, ldc); break;
      default: product_rows<1>(ai, row, column, b, ldb, nn, kk, ci, ldc); break;
    }
    i += rows;
  }
}

void flip(const float* rows, int ld, int n, int dim, float* t, int ldt) {
  for (int d = 0; d < dim; d += VL)
    for (int i = 0; i < n; i += VL)
      for (int e = 0; e < VL; ++e) {
        vf x;
        for (int l = 0; l < VL; ++l) x[l] = rows[(int64_t)(i + l) * ld + d + e];
        store(t + (int64_t)(d + e) * ldt + i, x);
      }
}

template <int FEATURE>
inline void feature_row(float* row, int dim, bool fit) {
  const int padded = (dim + VL - 1) / VL * VL;
  vf most{};
  for (int d = 0; d < padded; d += VL) {
    vf x = load(row + d);
    if (FEATURE == glocal::RELU) x = pick(x < 0.0f, vf{}, x);  // NaN stays
    if (FEATURE == glocal::ELU) x = pick(x > 0.0f, x + 1.0f, exp2(pick(x > 0.0f, vf{}, x) * glocal::LOG2E));
    store(row + d, x);
  }
  for (int d = dim; d < padded; ++d) row[d] = 0;
  if (!fit) return;
  for (int d = 0; d < padded; d += VL) {
    vf x = load(row + d);
    most = larger(pick(x < 0.0f, -x, x), most);
  }
  float largest = 0;
  for (int l = 0; l < VL; ++l) largest = most[l] > largest ? most[l] : largest;
  if (largest > 0)
    for (int d = 0; d < padded; d += VL) store(row + d, load(row + d) / largest);
}

void features(float* rows, int ld, int n, int dim, int feature, bool fit) {
  for (int i = 0; i < n; ++i) {
    float* row = rows + (int64_t)i * ld;
    if (feature == glocal::RELU)
      feature_row<glocal::RELU>(row, dim, fit);
    else if (feature == glocal::ELU)
      feature_row<glocal::ELU>(row, dim, fit);
    else
      feature_row<glocal::IDENTITY>(row, dim, fit);
  }
}

float dot(const float* a, const float* b, int n) {
  vf acc{};
  for (int d = 0; d < n; d += VL) acc += b ? load(a + d) * load(b + d) : load(a + d);
  return sum(acc);
}

const glocal::Kernels table = {GLOCAL_NAME, LANES,  VL,       pack,    unpack,  transpose,   scores,
                               adjust,      softmax, weighted, outer,   gradient, uncap,      dots,
                               softmax_row, weighted_row, exp2_array, product, flip, features, dot};

}  // namespace

namespace glocal {
const Kernels* GLOCAL_KERNELS() { return &table; }
}  // namespace glocal
