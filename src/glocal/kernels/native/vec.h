// One vector type per instruction set, from the compiler's vector extensions. Included once per compiled set.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int VL = 16, NV = 2, MR = 8, WR = 4;
#elif defined(__AVX2__)
constexpr int VL = 8, NV = 2, MR = 6, WR = 3;
#elif defined(__ARM_NEON)
constexpr int VL = 4, NV = 4, MR = 6, WR = 4;
#else
constexpr int VL = 4, NV = 2, MR = 6, WR = 3;
#endif
constexpr int LANES = VL * NV;

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));

inline vf load(const float* p) {
  vf r;
  std::memcpy(&r, p, sizeof r);
  return r;
}
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
inline vi ints(vf v) { return (vi)v; }
inline vf floats(vi v) { return (vf)v; }
inline vf splat(float x) { return x - vf{}; }
inline vi splat(int32_t x) { return x - vi{}; }
inline vf pick(vi where, vf a, vf b) { return floats((where & ints(a)) | (~where & ints(b))); }

// The larger one; the second where either is NaN.
inline vf larger(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (vf)_mm_max_ps((__m128)a, (__m128)b);
#else
  return pick(a > b, a, b);
#endif
}

inline vf masked(uint32_t bits, vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_mask_blend_ps((__mmask16)bits, (__m512)b, (__m512)a);
#else
  vi each;
  for (int i = 0; i < VL; ++i) each[i] = 1 << i;
  vi where = (splat((int32_t)bits) & each) == each;
#if defined(__AVX2__)
  return (vf)_mm256_blendv_ps((__m256)b, (__m256)a, (__m256)where);
#else
  return pick(where, a, b);
#endif
#endif
}

constexpr float INF = __builtin_inff();

// 2^x for x <= 127, to 1 ulp; 0 below 2^-126 and for -inf, NaN for NaN.
inline vf exp2(vf x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
  vf t = x + magic;
  vf f = x - (t - magic);
  vf p = f * 1.53533620e-4f + 1.33988750e-3f;
  p = p * f + 9.61843692e-3f;
  p = p * f + 5.55033237e-2f;
  p = p * f + 2.40226477e-1f;
  p = p * f + 6.93147182e-1f;
  p = p * f + 1.0f;
  vf scale = floats((ints(t) << 23) + 0x3f800000);
  return floats(ints(p * scale) & ~(x < -126.0f));
}

inline float sum(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(__SSE2__)
#if defined(__AVX2__)
  __m128 x = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
#else
  __m128 x = (__m128)v;
#endif
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
#else
  return (v[0] + v[1]) + (v[2] + v[3]);
#endif
}

// tanh, relative error about 2 ulp: a polynomial near 0, else 1 - 2 / (e^2x + 1).
inline vf tanh(vf x) {
  vi sign = ints(x) & (int32_t)0x80000000;
  vf a = floats(ints(x) ^ sign);
  vf z = x * x;
  vf p = splat(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z + -5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z + -3.33332819422e-1f;
  vf near = x + x * z * p;
  vf c = pick(a > 20.0f, splat(20.0f), a);
  vf far = 1.0f - 2.0f / (exp2(c * (2 * 1.44269504088896340736f)) + 1.0f);
  vf out = pick(a < 0.625f, near, floats(ints(far) | sign));
  return pick(x == x, out, x);
}

}  // namespace
