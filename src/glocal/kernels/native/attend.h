// One attention, as pointers and strides, and what the forward and backward passes share.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#include "form.h"
#include "kernels.h"
#include "work.h"

namespace glocal {

// A tensor (B, heads, N, dim) with unit stride on the last axis; strides count elements.
struct Array {
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
};

struct Call {
  Form* form = nullptr;
  int threads = 1, batch = 1, heads = 1, kv_heads = 1, dim = 1, value_dim = 1, dtype = F32;
  float scale = 1, softcap = 0;
  Array q, k, v, out;
  float* lse = nullptr;  // (B, H, Nq)
  const float* bias = nullptr;
  int64_t bias_stride[4] = {0, 0, 0, 0};
  const float* table = nullptr;
  int64_t table_head = 0;

  int group() const { return heads / kv_heads; }
};

struct Gradients {
  Array grad_out, dq, dk, dv;  // dk and dv are float32 and zero at the start
  const float* grad_lse = nullptr;
  float* dbias = nullptr;  // contiguous float32 (B or 1, H or 1, Nq or 1, Nk or 1), zero at the start
  int64_t dbias_stride[4] = {0, 0, 0, 0};
  float* dtable = nullptr;
  int64_t dtable_head = 0, table_size = 0;
};

void forward(const Call& call);
void decode(const Call& call);
bool few_queries(const Call& call);
void backward(const Call& call, const Gradients& grads);

// Floats aligned to a cache line that only grow.
class Floats {
 public:
  Floats() = default;
  Floats(const Floats&) = delete;
  Floats& operator=(const Floats&) = delete;
  ~Floats() { std::free(data_); }
  float* need(size_t n) {
    if (n > size_) {
      std::free(data_);
      size_ = 0;
      n = (n + 255) / 256 * 256;
      data_ = (float*)std::aligned_alloc(64, n * sizeof(float));
      if (!data_) throw std::bad_alloc();
      size_ = n;
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  size_t size_ = 0;
};

inline int padded(int n, int vector) { return (n + vector - 1) / vector * vector; }

// Row length of scratch: an odd number of cache lines, so that the rows of a chunk spread over all cache sets.
inline int row_length(int dim) {
  int lines = (dim + 15) / 16;
  return (lines | 1) * 16;
}

inline const void* slice(const Array& a, int dtype, int b, int h) {
  return (const char*)a.data + (b * a.batch + h * a.head) * (dtype == F32 ? 4 : 2);
}
inline void* row_of(const Array& a, int dtype, int b, int h, int64_t n) {
  return (char*)a.data + (b * a.batch + h * a.head + n * a.row) * (dtype == F32 ? 4 : 2);
}

// Queries are packed times this, so that scores come out in base 2 (or as the argument of tanh).
inline float query_factor(const Call& c) { return c.softcap > 0 ? c.scale / c.softcap : c.scale * LOG2E; }

// Where bias and table find the value of a pair: by key and by query, added up.
class Places {
 public:
  void prepare(const Call& call);
  int64_t table_key(int64_t key) const { return key_[key]; }
  int64_t table_query(int64_t query) const { return query_[query]; }

 private:
  std::vector<int64_t> key_, query_;
};

// The scores of one panel against one chunk, softcap, bias, table and mask included.
struct Panel {
  const Call& call;
  const Kernels& kernels;
  const Places& places;
  std::vector<int64_t> bias_key, table_key;
  Added added[2];
  int count = 0;

  bool adjusted() const { return call.softcap > 0 || call.bias || call.table; }
  void lanes(int b, int h, const int32_t* queries, int n);
  // Keys are k + offset[entry].
  void scores(const float* panel, const float* k, const int32_t* offset, const Work& work, int chunk, Range r, float* s,
              float* top, float* t);
};

}  // namespace glocal
