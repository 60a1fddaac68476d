// The table of micro-kernels that each instruction set fills in, and the plain types that cross that border.
// Only plain data passes, so that code compiled for a newer machine can never be linked into an older one's path.
#pragma once
#include <cstdint>

namespace glocal {

enum DType : int { F32 = 0, F16 = 1, BF16 = 2 };
enum Feature : int { IDENTITY = 0, RELU = 1, ELU = 2 };  // ELU is elu(x) + 1
enum Lower : int { NEITHER = 0, LOWER_A = 1, LOWER_C = 2 };

constexpr float LOG2E = 1.44269504088896340736f;
constexpr float LN2 = 0.69314718055994530942f;
constexpr int MAX_LANES = 32;
constexpr int BLOCK = 4;  // queries that share one pass over the values

// An added score: value(entry, lane) = base[key[entry] + lane[lane]].
struct Added {
  const float* base;
  const int64_t* key;
  int64_t lane[MAX_LANES];
};

// Scores of a panel are S[entry][lane]: one row a key, one lane a query. All scores are in base 2.
struct Kernels {
  const char* name;
  int lanes;
  int vector;  // floats in a vector: rows of scratch are padded to it

  // Rows index[0..n) of src (row stride in elements) widened to float32 rows of dst. Sets bad[i] where a row holds a
  // NaN or an infinity, and says whether there is one.
  bool (*pack)(const void* src, int dtype, int64_t stride, const int32_t* index, int n, int dim, float* dst, int ld,
               uint8_t* bad);
  // float32 row times factor to a row of the output type.
  void (*unpack)(const float* src, float factor, int dim, void* dst, int dtype);
  // Transpose lanes rows (ld) into panel[d][lane], times factor.
  void (*transpose)(const float* rows, int ld, int dim, float factor, float* panel);
  // S = A[offset] . panel; masked lanes become -inf and top takes the maximum, where those are given.
  void (*scores)(const float* panel, const float* a, const int32_t* offset, const uint32_t* mask, int n, int dim,
                 float* s, float* top);
  // Softcap (cap > 0, in base 2), added scores, mask and maximum; keeps tanh in t where given.
  void (*adjust)(float* s, int n, float cap, const Added* added, int count, const uint32_t* mask, float* top, float* t);
  // Online softmax over one chunk: s becomes probabilities; m, l and alpha are per lane.
  void (*softmax)(float* s, int n, const float* top, float* m, float* l, float* alpha);
  // O[lane] = O[lane] * alpha[lane] + sum over entries of s * B[offset], for each block of lanes over its own
  // entries first[block] .. last[block].
  void (*weighted)(const float* s, const float* b, const int32_t* offset, const int32_t* first, const int32_t* last,
                   int width, const float* alpha, float* o, int ldo);
  // C[row[entry]] += sum over lanes of s[entry][lane] * B[lane].
  void (*outer)(const float* s, const float* b, int ldb, const int64_t* row, int n, int width, float* c);
  // s becomes P = exp2(s - lse), dp becomes P * (dp - delta); masked lanes become 0.
  void (*gradient)(float* s, float* dp, const float* lse, const float* delta, const uint32_t* mask, int n);
  // dp *= 1 - t * t.
  void (*uncap)(float* dp, const float* t, int n);

  // Decoding: s[entry] = q . A[entry]; rows are read in place. Rows of `ahead` (n of them, `width` long, or null) are
  // fetched into the cache meanwhile.
  void (*dots)(const float* q, const float* const* rows, int n, int dim, float* s, const float* const* ahead, int width);
  void (*softmax_row)(float* s, int n, float* m, float* l, float* alpha);
  void (*weighted_row)(const float* s, const float* const* rows, int n, int dim, float alpha, float* o,
                       const float* const* ahead, int width);
  // exp2 of an array, for tests.
  void (*exp2)(const float* x, float* y, int n);

  // C += A B for C (m, n) and B (k, n), rows apart by ldc and ldb, n a multiple of a vector; A's numbers lie row and
  // column apart. `lower` says which of the two squares A and C has nothing of use above its diagonal.
  void (*product)(const float* a, int64_t row, int64_t column, const float* b, int ldb, int m, int n, int k, float* c,
                  int ldc, int lower);
  // n rows (ld) by dim to dim rows (ldt) by n; both are multiples of a vector.
  void (*flip)(const float* rows, int ld, int n, int dim, float* t, int ldt);
  // Features of n rows in place; numbers beyond dim become 0. With `fit`, each row is divided by its largest number.
  void (*features)(float* rows, int ld, int n, int dim, int feature, bool fit);
  // Sum of the products of two rows of whole vectors; of the first alone where the second is null.
  float (*dot)(const float* a, const float* b, int n);
};

const Kernels* kernels_baseline();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_neon();

// The set in use; GLOCAL_ISA or select() changes it.
const Kernels& current();
void select(const char* name);
int runnable(const char** names);  // fills up to 4 names, best last

}  // namespace glocal
