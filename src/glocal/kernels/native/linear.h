// Causal linear attention: o_i = f(q_i) S_i with S_i = S_{i-1} + f(k_i) v_i^T, by chunks of positions.
#pragma once
#include <cstdint>

#include "attend.h"

namespace glocal {

struct Linear {
  int threads = 1, dtype = F32, batch = 1, heads = 1, kv_heads = 1, dim = 1, value_dim = 1;
  int64_t queries = 0, keys = 0;  // the queries are the last positions
  int feature = IDENTITY;
  bool normalise = false;  // then the sum of the scores divides, at least `least`
  float least = 0;
  Array q, k, v, out;            // row strides may be negative: then time runs backwards
  const uint8_t* real = nullptr;  // (B, M): 0 where a key is not to be seen; all are where null
  int64_t real_batch = 0, real_row = 1;
  // Sums of key times value (B, Hkv, dim, value_dim) and of keys (B, Hkv, dim), before the first position and after the
  // last; those of keys are null where nothing divides.
  const float *kv = nullptr, *sum = nullptr;
  float *kv_after = nullptr, *sum_after = nullptr;
};

void linear(const Linear& call);

}  // namespace glocal
