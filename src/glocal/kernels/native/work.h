// What one tile of queries has to do: the keys it meets, cut into chunks, and for each panel the live entries.
#pragma once
#include <algorithm>
#include <vector>

#include "form.h"

namespace glocal {

struct Range {
  int begin, end;
};

class Work {
 public:
  // Prepare a tile for the tables of batch b and head h; does nothing where it is the one prepared last.
  void prepare(const Form& form, const Tiling& tiling, int tile, int b, int h, int chunk_keys, int ld,
               int64_t key_stride = 0);

  int chunks() const { return chunks_; }
  int chunk_size(int c) const { return std::min(size_, (int)keys.size() - c * size_); }
  const int32_t* chunk_keys(int c) const { return keys.data() + (size_t)c * size_; }
  Range entries(int c, int panel) const { return ranges_[(size_t)panel * chunks_ + c]; }
  // Per block of lanes, the entries (counted from the range's begin) that it needs.
  const int32_t* first(int c, int panel) const { return &trim_[((size_t)panel * chunks_ + c) * 2 * blocks_]; }
  const int32_t* last(int c, int panel) const { return first(c, panel) + blocks_; }
  const int32_t* queries(int panel) const { return &queries_[(size_t)panel * lanes_]; }
  uint32_t valid(int panel) const { return valid_[panel]; }

  std::vector<int32_t> keys;    // flattened, ascending
  std::vector<int32_t> place;   // of each entry, within its chunk
  std::vector<int32_t> offset;  // place * ld
  std::vector<int32_t> in_place;  // key * key_stride, where that was given
  std::vector<uint32_t> mask;   // lanes that see the entry; lanes without a query count as seeing it

 private:
  struct Active {  // a box that the tile meets: keys from[a] + stride[a] * i, i < count[a]
    const BoxTables* box;
    int from[MAX_RANK], stride[MAX_RANK], count[MAX_RANK];
  };
  bool meets(const BoxTables& box, Active& out) const;
  void collect();
  void enumerate(const Active& a, std::vector<int32_t>& out) const;
  bool axis_masks(const Active& a, int panel, int axis, Range& range, std::vector<uint32_t>& out) const;
  uint32_t rows_of(const BoxTables& box, int panel) const;
  void product_entries(int panel);
  void union_entries(int panel);
  void push(int panel, int& chunk, int place, uint32_t mask);
  void close(int panel, int& chunk, int until);
  int query_at(int axis, int panel_digit, int digit) const;

  uint64_t id_ = 0;
  const Form* form_ = nullptr;
  const Tiling* tiling_ = nullptr;
  int tile_ = -1, b_ = 0, h_ = 0, ld_ = 0, wanted_ = 0, lanes_ = 0, blocks_ = 0, chunks_ = 0, size_ = 1;
  int64_t key_stride_ = 0;
  bool product_ = false;
  AxisTile axis_[MAX_RANK];
  std::vector<Active> active_;
  std::vector<int32_t> queries_, trim_, other_, merged_;
  std::vector<int32_t> coordinate_[MAX_RANK];
  std::vector<uint32_t> valid_, seen_, masks_[MAX_RANK];
  std::vector<uint8_t> marks_;
  std::vector<Range> ranges_;
};

}  // namespace glocal
