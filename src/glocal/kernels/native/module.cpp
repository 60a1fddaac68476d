// The Python module. Tensors arrive as (address, batch stride, head stride, row stride), so torch is not linked.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "attend.h"
#include "linear.h"
#include "pool.h"

namespace nb = nanobind;
using namespace glocal;

namespace {

template <class T>
using Numbers = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;
using Grid = std::vector<int>;

// A contiguous array (B or 1, H or 1, ...) copied into a table.
template <class T>
Table<T> table_of(const Numbers<T>& array, Form& form) {
  if (array.ndim() < 3) throw std::invalid_argument("a table needs (B or 1, H or 1, entries)");
  Table<T> out;
  out.data.assign(array.data(), array.data() + array.size());
  int64_t entries = 1;
  for (size_t i = 2; i < array.ndim(); ++i) entries *= (int64_t)array.shape(i);
  out.by_head = array.shape(1) > 1 ? entries : 0;
  out.by_batch = array.shape(0) > 1 ? entries * (int64_t)array.shape(1) : 0;
  form.by_batch |= out.by_batch != 0;
  form.by_head |= out.by_head != 0;
  return out;
}

void add_box(Form& form, const std::vector<Numbers<int32_t>>& lo, const std::vector<Numbers<int32_t>>& hi,
             const std::vector<int>& step, nb::object rows, nb::object keys) {
  BoxTables box;
  for (int a = 0; a < form.rank; ++a) {
    box.axis[a].lo = table_of(lo[a], form);
    box.axis[a].hi = table_of(hi[a], form);
    box.axis[a].step = step[a];
  }
  if (!rows.is_none()) box.rows = table_of(nb::cast<Numbers<uint8_t>>(rows), form);
  if (!keys.is_none()) box.keys = table_of(nb::cast<Numbers<uint8_t>>(keys), form);
  form.boxes.push_back(std::move(box));
}

// The blocks of the box added last: index (B or 1, H or 1, query blocks, n), -1 for none.
void set_blocks(Form& form, const Numbers<int32_t>& index, const Grid& query_size, const Grid& key_size) {
  Blocks& blocks = form.boxes.back().blocks;
  int64_t queries = 1, keys = 1;
  for (int a = 0; a < form.rank; ++a) {
    blocks.query_size[a] = query_size[a];
    blocks.key_size[a] = key_size[a];
    blocks.query_count[a] = (form.lq[a] + query_size[a] - 1) / query_size[a];
    blocks.key_count[a] = (form.lk[a] + key_size[a] - 1) / key_size[a];
    queries *= blocks.query_count[a];
    keys *= blocks.key_count[a];
  }
  blocks.words = (int)std::max<int64_t>(1, (keys + 63) / 64);
  const int64_t batch = (int64_t)index.shape(0), heads = (int64_t)index.shape(1), n = (int64_t)index.shape(3);
  blocks.chosen.data.assign(batch * heads * queries * blocks.words, 0);
  blocks.chosen.by_head = heads > 1 ? queries * blocks.words : 0;
  blocks.chosen.by_batch = batch > 1 ? heads * queries * blocks.words : 0;
  form.by_batch |= batch > 1;
  form.by_head |= heads > 1;
  for (int64_t row = 0; row < batch * heads * queries; ++row)
    for (int64_t i = 0; i < n; ++i) {
      int32_t block = index.data()[row * n + i];
      if (block >= 0 && block < keys) blocks.chosen.data[row * blocks.words + (block >> 6)] |= 1ull << (block & 63);
    }
}

Array array_of(const std::vector<int64_t>& a) { return {(void*)(uintptr_t)a[0], a[1], a[2], a[3]}; }

void set_added(Call& call, const std::vector<int64_t>& bias, const std::vector<int64_t>& table) {
  call.bias = (const float*)(uintptr_t)bias[0];
  for (int i = 0; i < 4; ++i) call.bias_stride[i] = bias[i + 1];
  call.table = (const float*)(uintptr_t)table[0];
  call.table_head = table[1];
}

Call call_of(Form& form, const std::vector<int>& sizes, const std::vector<int64_t>& q, const std::vector<int64_t>& k,
             const std::vector<int64_t>& v, const std::vector<int64_t>& out, int64_t lse, const std::vector<int64_t>& bias,
             const std::vector<int64_t>& table, float scale, float softcap) {
  Call call;
  call.form = &form;
  call.threads = sizes[0];
  call.dtype = sizes[1];
  call.batch = sizes[2];
  call.heads = sizes[3];
  call.kv_heads = sizes[4];
  call.dim = sizes[5];
  call.value_dim = sizes[6];
  call.scale = scale;
  call.softcap = softcap;
  call.q = array_of(q);
  call.k = array_of(k);
  call.v = array_of(v);
  call.out = array_of(out);
  call.lse = (float*)(uintptr_t)lse;
  set_added(call, bias, table);
  return call;
}

using Ints = std::vector<int64_t>;

void run_forward(Form& form, const std::vector<int>& sizes, const Ints& q, const Ints& k, const Ints& v, const Ints& out,
                 int64_t lse, const Ints& bias, const Ints& table, float scale, float softcap) {
  Call call = call_of(form, sizes, q, k, v, out, lse, bias, table, scale, softcap);
  nb::gil_scoped_release release;
  if (few_queries(call))
    decode(call);
  else
    forward(call);
}

void run_backward(Form& form, const std::vector<int>& sizes, const Ints& q, const Ints& k, const Ints& v, const Ints& out,
                  int64_t lse, const Ints& bias, const Ints& table, float scale, float softcap, const Ints& grad_out,
                  int64_t grad_lse, const Ints& dq, const Ints& dk, const Ints& dv, const Ints& dbias,
                  const Ints& dtable) {
  Call call = call_of(form, sizes, q, k, v, out, lse, bias, table, scale, softcap);
  Gradients grads;
  grads.grad_out = array_of(grad_out);
  grads.grad_lse = (const float*)(uintptr_t)grad_lse;
  grads.dq = array_of(dq);
  grads.dk = array_of(dk);
  grads.dv = array_of(dv);
  grads.dbias = (float*)(uintptr_t)dbias[0];
  for (int i = 0; i < 4; ++i) grads.dbias_stride[i] = dbias[i + 1];
  grads.dtable = (float*)(uintptr_t)dtable[0];
  grads.dtable_head = dtable[1];
  grads.table_size = dtable[2];
  nb::gil_scoped_release release;
  backward(call, grads);
}

// sizes: threads, dtype, B, H, Hkv, dim, value_dim, queries, keys, feature.
void run_linear(const Ints& sizes, const Ints& q, const Ints& k, const Ints& v, const Ints& out, const Ints& real,
                const Ints& state, float least, bool normalise) {
  Linear call;
  call.threads = (int)sizes[0];
  call.dtype = (int)sizes[1];
  call.batch = (int)sizes[2];
  call.heads = (int)sizes[3];
  call.kv_heads = (int)sizes[4];
  call.dim = (int)sizes[5];
  call.value_dim = (int)sizes[6];
  call.queries = sizes[7];
  call.keys = sizes[8];
  call.feature = (int)sizes[9];
  call.normalise = normalise;
  call.least = least;
  call.q = array_of(q);
  call.k = array_of(k);
  call.v = array_of(v);
  call.out = array_of(out);
  call.real = (const uint8_t*)(uintptr_t)real[0];
  call.real_batch = real[1];
  call.real_row = real[2];
  call.kv = (const float*)(uintptr_t)state[0];
  call.sum = (const float*)(uintptr_t)state[1];
  call.kv_after = (float*)(uintptr_t)state[2];
  call.sum_after = (float*)(uintptr_t)state[3];
  nb::gil_scoped_release release;
  linear(call);
}

// Ask for large pages under a result that is about to be written for the first time: without them the kernel spends as
// long on page faults as on arithmetic once results reach a hundred megabytes.
void large_pages(int64_t address, int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t PAGE = 1 << 21;
  const int64_t begin = (address + PAGE - 1) / PAGE * PAGE, end = (address + bytes) / PAGE * PAGE;
  if (end > begin) madvise((void*)(uintptr_t)begin, (size_t)(end - begin), MADV_HUGEPAGE);
#endif
}

void exp2_array(const Numbers<float>& x, nb::ndarray<float, nb::c_contig, nb::device::cpu> y) {
  if (x.size() != y.size()) throw std::invalid_argument("exp2 needs arrays of one size");
  current().exp2(x.data(), y.data(), (int)x.size());
}

}  // namespace

NB_MODULE(_native, m) {
  nb::class_<Form>(m, "Form")
      .def("__init__",
           [](Form* form, const Grid& queries, const Grid& keys) {
             if (queries.size() != keys.size() || queries.empty() || queries.size() > MAX_RANK)
               throw std::invalid_argument("grids must have the same one to four axes");
             new (form) Form();
             form->rank = (int)queries.size();
             for (int a = 0; a < form->rank; ++a) {
               form->lq[a] = queries[a];
               form->lk[a] = keys[a];
               form->nq *= queries[a];
               form->nk *= keys[a];
             }
           })
      .def("add_box", &add_box, nb::arg("lo"), nb::arg("hi"), nb::arg("step"), nb::arg("rows").none(),
           nb::arg("keys").none())
      .def("set_blocks", &set_blocks)
      .def("tiling", [](Form& form, int most) {
        const Tiling& t = form.tiling(current().lanes, most);
        return std::vector<std::vector<int>>{{t.step, t.step + t.rank}, {t.panel, t.panel + t.rank}, {t.across, t.across + t.rank}, {t.tiles}};
      });
  m.attr("MAX_RANK") = MAX_RANK;
  m.def("forward", &run_forward);
  m.def("backward", &run_backward);
  m.def("linear", &run_linear);
  m.def("large_pages", &large_pages);
  m.def("isa", [] { return std::string(current().name); });
  m.def("isas", [] {
    const char* names[4];
    int n = runnable(names);
    return std::vector<std::string>(names, names + n);
  });
  m.def("select", [](const std::string& name) { select(name.c_str()); });
  m.def("lanes", [] { return current().lanes; });
  m.def("exp2", &exp2_array);
}
