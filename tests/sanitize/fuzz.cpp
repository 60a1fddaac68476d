// Random shapes, tables and tensors through forward, backward, decode and linear, compared with a plain computation in double.
// Built with AddressSanitizer and UndefinedBehaviorSanitizer: `fuzz COUNT [SEED]`.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "attend.h"
#include "linear.h"

using namespace glocal;

namespace {

std::mt19937 engine;
int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(engine); }
float normal() { return std::normal_distribution<float>()(engine); }

std::vector<float> randoms(size_t n) {
  std::vector<float> out(n);
  for (float& x : out) x = normal();
  return out;
}

uint16_t to_brain(float f) {
  uint32_t x;
  std::memcpy(&x, &f, 4);
  return (uint16_t)(x >> 16);
}

// A tensor of exactly the size it needs, so that a read past its end is an error.
struct Tensor {
  std::vector<float> wide;  // (B, H, N, D)
  std::vector<uint16_t> half;
  Array array;
  Tensor(int b, int h, int64_t n, int d, int dtype) : wide(randoms((size_t)b * h * n * d)) {
    array = {wide.data(), (int64_t)h * n * d, n * d, d};
    if (dtype == F32) return;
    for (float& x : wide) {
      uint16_t y = to_brain(x);
      uint32_t back = (uint32_t)y << 16;
      std::memcpy(&x, &back, 4);
      half.push_back(y);
    }
    array.data = half.data();
  }
  Tensor(const Tensor&) = delete;
};

double at(const Tensor& t, int b, int h, int64_t n, int d) {
  int64_t i = b * t.array.batch + h * t.array.head + n * t.array.row + d;
  if (t.half.empty()) return (double)t.wide[i];
  uint32_t x = (uint32_t)t.half[i] << 16;
  float f;
  std::memcpy(&f, &x, 4);
  return (double)f;
}

template <class T>
void lead(Table<T>& table, int64_t entries, int b, int h) {
  table.by_head = h > 1 ? entries : 0;
  table.by_batch = b > 1 ? entries * h : 0;
  table.data.resize(entries * b * h);
}

void random_box(Form& form, int batch, int heads) {
  BoxTables box;
  int lb = pick(0, 4) ? 1 : batch, lh = pick(0, 3) ? 1 : heads;
  for (int a = 0; a < form.rank; ++a) {
    Spans& s = box.axis[a];
    s.step = pick(0, 2) ? 1 : pick(1, 4);
    lead(s.lo, form.lq[a], lb, lh);
    lead(s.hi, form.lq[a], lb, lh);
    int kind = pick(0, 3), width = pick(1, form.lk[a]), shift = form.lk[a] - form.lq[a];
    for (size_t i = 0; i < s.lo.data.size(); ++i) {
      int at = (int)(i % form.lq[a]) + shift, lo = 0, hi = form.lk[a];
      if (kind == 0) lo = at - width, hi = at + 1;
      if (kind == 1) lo = at - width / 2, hi = at + width / 2 + 1;
      if (kind == 2) lo = pick(0, form.lk[a] - 1), hi = lo + pick(0, width);
      if (lo < 0) lo = (lo % s.step + s.step) % s.step;
      hi = std::min(hi, form.lk[a]);
      int count = hi > lo ? (hi - lo + s.step - 1) / s.step : 0;
      s.lo.data[i] = count ? lo : 0;
      s.hi.data[i] = count ? lo + (count - 1) * s.step + 1 : 0;
    }
  }
  auto bits = [&](Table<uint8_t>& t, int64_t n) {
    lead(t, n, lb, lh);
    for (uint8_t& x : t.data) x = pick(0, 2) > 0;
  };
  if (!pick(0, 4)) bits(box.rows, form.nq);
  if (!pick(0, 4)) bits(box.keys, form.nk);
  if (!pick(0, 4)) {
    Blocks& blocks = box.blocks;
    int64_t rows = 1, columns = 1;
    for (int a = 0; a < form.rank; ++a) {
      blocks.query_size[a] = pick(1, form.lq[a]);
      blocks.key_size[a] = pick(1, form.lk[a]);
      rows *= blocks.query_count[a] = (form.lq[a] + blocks.query_size[a] - 1) / blocks.query_size[a];
      columns *= blocks.key_count[a] = (form.lk[a] + blocks.key_size[a] - 1) / blocks.key_size[a];
    }
    blocks.words = (int)((columns + 63) / 64);
    lead(blocks.chosen, rows * blocks.words, lb, lh);
    for (size_t i = 0; i < blocks.chosen.data.size(); ++i)
      for (int64_t c = 0; c < columns; ++c)
        if (c / 64 == (int64_t)(i % blocks.words) && !pick(0, 2)) blocks.chosen.data[i] |= 1ull << (c % 64);
  }
  form.by_batch |= lb > 1;
  form.by_head |= lh > 1;
  form.boxes.push_back(std::move(box));
}

bool sees(const Form& form, int b, int h, int64_t q, int64_t k) {
  for (const BoxTables& box : form.boxes) {
    bool in = true;
    int64_t i = q, j = k;
    int at_q[MAX_RANK], at_k[MAX_RANK];
    for (int a = form.rank - 1; a >= 0; --a) {
      at_q[a] = (int)(i % form.lq[a]), i /= form.lq[a];
      at_k[a] = (int)(j % form.lk[a]), j /= form.lk[a];
      int lo = box.axis[a].lo.at(b, h)[at_q[a]], hi = box.axis[a].hi.at(b, h)[at_q[a]];
      in &= at_k[a] >= lo && at_k[a] < hi && (at_k[a] - lo) % box.axis[a].step == 0;
    }
    if (!box.rows.empty()) in &= box.rows.at(b, h)[q] != 0;
    if (!box.keys.empty()) in &= box.keys.at(b, h)[k] != 0;
    if (box.blocks.words) {
      int row = 0, column = 0;
      for (int a = 0; a < form.rank; ++a) {
        row = row * box.blocks.query_count[a] + at_q[a] / box.blocks.query_size[a];
        column = column * box.blocks.key_count[a] + at_k[a] / box.blocks.key_size[a];
      }
      in &= box.blocks.chosen.at(b, h)[row * box.blocks.words + column / 64] >> (column % 64) & 1;
    }
    if (in) return true;
  }
  return false;
}

int run(int number) {
  const int batch = pick(1, 2), kv_heads = pick(1, 2), heads = kv_heads * pick(1, 3), rank = pick(1, 3);
  const int longest[] = {0, 150, 14, 6};
  Form form;
  form.rank = rank;
  for (int a = 0; a < rank; ++a) {
    form.lk[a] = pick(1, longest[rank]);
    form.lq[a] = pick(0, 2) ? form.lk[a] : pick(1, form.lk[a]);
    if (rank == 1 && !pick(0, 4)) form.lk[a] = pick(1, 900), form.lq[a] = std::min(form.lq[a], pick(1, 5));
    form.lq[a] = std::min(form.lq[a], form.lk[a]);
    form.nq *= form.lq[a];
    form.nk *= form.lk[a];
  }
  for (int n = pick(0, 9) ? pick(1, 3) : pick(0, 7); n > 0; --n) random_box(form, batch, heads);
  const int dim = pick(0, 1) ? 8 * pick(1, 6) : pick(1, 70), value_dim = pick(0, 1) ? dim : pick(1, 40);
  const int dtype = pick(0, 2) ? F32 : BF16;
  const char* names[4];
  select(names[pick(0, runnable(names) - 1)]);

  Tensor q(batch, heads, form.nq, dim, dtype), k(batch, kv_heads, form.nk, dim, dtype);
  Tensor v(batch, kv_heads, form.nk, value_dim, dtype), out(batch, heads, form.nq, value_dim, dtype);
  Tensor grad(batch, heads, form.nq, value_dim, dtype), dq(batch, heads, form.nq, dim, dtype);
  Tensor dk(batch, kv_heads, form.nk, dim, F32), dv(batch, kv_heads, form.nk, value_dim, F32);
  std::fill(dk.wide.begin(), dk.wide.end(), 0.0f);
  std::fill(dv.wide.begin(), dv.wide.end(), 0.0f);
  std::vector<float> lse((size_t)batch * heads * form.nq), bias, table, dbias, dtable;
  Call call;
  call.form = &form;
  call.threads = pick(1, 3);
  call.batch = batch, call.heads = heads, call.kv_heads = kv_heads, call.dim = dim, call.value_dim = value_dim;
  call.dtype = dtype;
  call.scale = 0.5f / std::sqrt((float)dim);
  call.softcap = pick(0, 3) ? 0.0f : 2.0f;
  call.q = q.array, call.k = k.array, call.v = v.array, call.out = out.array, call.lse = lse.data();
  Gradients grads;
  grads.grad_out = grad.array, grads.dq = dq.array, grads.dk = dk.array, grads.dv = dv.array;
  if (!pick(0, 3)) {
    int64_t shape[4] = {pick(0, 1) ? batch : 1, pick(0, 1) ? heads : 1, pick(0, 1) ? form.nq : 1, pick(0, 1) ? form.nk : 1};
    int64_t stride = 1;
    for (int a = 3; a >= 0; --a) {
      call.bias_stride[a] = grads.dbias_stride[a] = shape[a] > 1 ? stride : 0;
      stride *= shape[a];
    }
    bias = randoms(stride);
    dbias.assign(stride, 0.0f);
    call.bias = bias.data(), grads.dbias = dbias.data();
  }
  if (!pick(0, 3)) {
    int64_t size = 1;
    for (int a = 0; a < rank; ++a) size *= form.lq[a] + form.lk[a] - 1;
    int h = pick(0, 1) ? heads : 1;
    table = randoms(size * h);
    dtable.assign(size * h, 0.0f);
    call.table = table.data(), grads.dtable = dtable.data();
    call.table_head = grads.dtable_head = h > 1 ? size : 0;
    grads.table_size = size;
  }
  few_queries(call) ? decode(call) : forward(call);
  backward(call, grads);

  // A few rows against the definition.
  for (int check = 0; check < 12; ++check) {
    int b = pick(0, batch - 1), h = pick(0, heads - 1), kv = h / (heads / kv_heads);
    int64_t i = pick(0, (int)form.nq - 1);
    std::vector<double> score(form.nk, -INFINITY);
    double top = -INFINITY, total = 0;
    for (int64_t j = 0; j < form.nk; ++j) {
      if (!sees(form, b, h, i, j)) continue;
      double s = 0;
      for (int d = 0; d < dim; ++d) s += at(q, b, h, i, d) * at(k, b, kv, j, d);
      s *= call.scale;
      if (call.softcap > 0) s = call.softcap * std::tanh(s / call.softcap);
      if (call.bias)
        s += bias[b * call.bias_stride[0] + h * call.bias_stride[1] + i * call.bias_stride[2] + j * call.bias_stride[3]];
      if (call.table) {
        int64_t place = 0, stride = 1, ri = i, rj = j;
        for (int a = rank - 1; a >= 0; --a) {
          place += (rj % form.lk[a] - ri % form.lq[a] + form.lq[a] - 1) * stride;
          ri /= form.lq[a], rj /= form.lk[a], stride *= form.lq[a] + form.lk[a] - 1;
        }
        s += table[h * call.table_head + place];
      }
      score[j] = s;
      top = std::max(top, s);
    }
    for (double s : score) total += top == -INFINITY ? 0 : std::exp(s - top);
    double slack = dtype == F32 ? 2e-5 : 2e-2;
    for (int d = 0; d < value_dim; ++d) {
      double exact = 0;
      for (int64_t j = 0; j < form.nk && total > 0; ++j)
        if (score[j] > -INFINITY) exact += std::exp(score[j] - top) / total * at(v, b, kv, j, d);
      double mine = at(out, b, h, i, d);
      if (!(std::fabs(mine - exact) <= slack * (1 + std::fabs(exact)))) {
        std::fprintf(stderr, "problem %d: out[%d %d %ld %d] is %g, should be %g\n", number, b, h, (long)i, d, mine, exact);
        return 1;
      }
    }
    double mine = lse[((size_t)b * heads + h) * form.nq + i], exact = total > 0 ? top + std::log(total) : -INFINITY;
    if (mine != exact && !(std::fabs(mine - exact) <= 2e-5 * (1 + std::fabs(exact)))) {
      std::fprintf(stderr, "problem %d: lse is %g, should be %g\n", number, mine, exact);
      return 1;
    }
  }
  for (const Tensor* t : {&dq, &dk, &dv})
    for (size_t i = 0; i < t->wide.size(); ++i)
      if (!std::isfinite(at(*t, 0, 0, 0, (int)i))) {
        std::fprintf(stderr, "problem %d: a gradient is not finite\n", number);
        return 1;
      }
  return 0;
}

double feature_of(double x, int feature) {
  if (feature == RELU) return x > 0 ? x : 0;
  return feature == ELU ? (x > 0 ? x + 1 : std::exp(x)) : x;
}

// Causal linear attention of a random shape, some of its results against the sum over all keys.
int run_linear(int number) {
  const char* names[4];
  select(names[pick(0, runnable(names) - 1)]);
  const int batch = pick(1, 2), kv_heads = pick(1, 2), heads = kv_heads * pick(1, 3), dim = pick(1, 70);
  const int value_dim = pick(1, 70), dtype = pick(0, 2) ? F32 : BF16, keys = pick(1, 130), queries = pick(1, keys);
  const bool reverse = pick(0, 2) == 0, normalise = pick(0, 1);
  Tensor q(batch, heads, queries, dim, dtype), k(batch, kv_heads, keys, dim, dtype),
      v(batch, kv_heads, keys, value_dim, dtype), out(batch, heads, queries, value_dim, dtype);
  const size_t lead = (size_t)batch * kv_heads * dim;
  std::vector<float> kv = randoms(lead * value_dim), sum = randoms(lead), kv_after = kv, sum_after = sum;
  for (float& x : sum) x = std::fabs(x) + 1;
  std::vector<uint8_t> real((size_t)batch * keys);
  for (uint8_t& x : real) x = pick(0, 4) != 0;
  Linear call;
  call.threads = pick(1, 3);
  call.dtype = dtype;
  call.batch = batch;
  call.heads = heads;
  call.kv_heads = kv_heads;
  call.dim = dim;
  call.value_dim = value_dim;
  call.queries = queries;
  call.keys = keys;
  call.feature = normalise ? pick(RELU, ELU) : pick(IDENTITY, ELU);  // signed scores may sum to nearly nothing
  call.normalise = normalise;
  call.least = 1e-6f;
  call.q = q.array, call.k = k.array, call.v = v.array, call.out = out.array;
  call.real = real.data(), call.real_batch = keys;
  if (reverse) {
    const int size = dtype == F32 ? 4 : 2;
    for (Array* a : {&call.q, &call.k, &call.v, &call.out}) {
      int64_t n = a == &call.q || a == &call.out ? queries : keys;
      a->data = (char*)a->data + (n - 1) * a->row * size;
      a->row = -a->row;
    }
    call.real += keys - 1, call.real_row = -1;
  }
  call.kv = kv.data(), call.kv_after = kv_after.data();
  if (normalise) call.sum = sum.data(), call.sum_after = sum_after.data();
  linear(call);
  for (int check = 0; check < 12; ++check) {
    const int b = pick(0, batch - 1), h = pick(0, heads - 1), g = h / (heads / kv_heads), i = pick(0, queries - 1);
    const int e = pick(0, value_dim - 1), row = reverse ? queries - 1 - i : i;
    double total = 0, exact = 0, size = 0;
    for (int d = 0; d < dim; ++d) {
      const size_t place = ((size_t)b * kv_heads + g) * dim + d;
      const double x = feature_of(at(q, b, h, row, d), call.feature);
      exact += x * kv[place * value_dim + e], total += x * sum[place], size += std::fabs(x * kv[place * value_dim + e]);
    }
    for (int j = 0; j <= keys - queries + i; ++j) {
      const int from = reverse ? keys - 1 - j : j;
      double s = 0;
      for (int d = 0; d < dim; ++d)
        s += feature_of(at(q, b, h, row, d), call.feature) * feature_of(at(k, b, g, from, d), call.feature);
      if (!real[(size_t)b * keys + from]) s = 0;
      total += s, exact += s * at(v, b, g, from, e), size += std::fabs(s * at(v, b, g, from, e));
    }
    if (normalise) exact /= total > 0 ? total : 1, size /= total > 0 ? total : 1;
    const double mine = at(out, b, h, row, e), slack = dtype == F32 ? 2e-5 : 1e-2;
    if (!(std::fabs(mine - exact) <= slack * (1 + size))) {
      std::fprintf(stderr, "linear problem %d: out[%d %d %d %d] is %g, should be %g\n", number, b, h, row, e, mine, exact);
      return 1;
    }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : 2000, seed = argc > 2 ? std::atoi(argv[2]) : 0;
  for (int n = 0; n < count; ++n) {
    engine.seed((unsigned)(seed + n));
    if (run(seed + n) || run_linear(seed + n)) return 1;
  }
  std::printf("%d problems, no error\n", count);
  return 0;
}
