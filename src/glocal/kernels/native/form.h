// The box form as flat tables, and how a grid of queries is cut into tiles of panels.
#pragma once
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels.h"

namespace glocal {

constexpr int MAX_RANK = 4;

// A table with a lead of (B or 1, H or 1); strides are 0 on a lead of 1.
template <class T>
struct Table {
  std::vector<T> data;
  int64_t by_batch = 0, by_head = 0;
  bool empty() const { return data.empty(); }
  const T* at(int b, int h) const { return data.data() + b * by_batch + h * by_head; }
};

struct Spans {
  Table<int32_t> lo, hi;
  int step = 1;
};

// Selected key blocks, as one row of bits for each query block.
struct Blocks {
  Table<uint64_t> chosen;
  int words = 0;
  int query_size[MAX_RANK], key_size[MAX_RANK], query_count[MAX_RANK], key_count[MAX_RANK];
};

struct BoxTables {
  Spans axis[MAX_RANK];
  Table<uint8_t> rows, keys;
  Blocks blocks;
  bool plain() const { return keys.empty() && blocks.words == 0; }
};

struct AxisTile {
  int residue, first, count;  // queries residue + step * (first + i), i < count
};

// Queries of a tile are a product over axes; a panel is a product of `panel` neighbours, one query a lane.
struct Tiling {
  int rank = 1, lanes = 0, panels = 1, tiles = 1;
  int step[MAX_RANK], panel[MAX_RANK], across[MAX_RANK];
  std::vector<AxisTile> axis[MAX_RANK];
  int digit[MAX_RANK][MAX_LANES];      // a lane's place on each axis
  uint32_t shares[MAX_RANK][MAX_LANES];  // lanes at a place of an axis
};

struct Form {
  const uint64_t id = next_id();  // never used twice, unlike an address: caches compare it
  int rank = 1;
  int lq[MAX_RANK], lk[MAX_RANK];
  int64_t nq = 1, nk = 1;
  std::vector<BoxTables> boxes;
  bool by_batch = false, by_head = false;

  // The tiling for a panel of `lanes` queries, tiles of at most `most` panels; kept for the next call.
  const Tiling& tiling(int lanes, int most);
  // Panels of `lanes` queries in row order, one panel a tile: for a few queries.
  const Tiling& rows(int lanes);

 private:
  static uint64_t next_id();
  struct Kept {
    int lanes, most;
    std::unique_ptr<Tiling> tiling;
  };
  std::vector<Kept> kept_;
  std::mutex mutex_;
};

}  // namespace glocal
