#include "work.h"

#include <algorithm>

namespace glocal {

int Work::query_at(int axis, int panel_digit, int digit) const {
  int i = panel_digit * tiling_->panel[axis] + digit;
  return i < axis_[axis].count ? axis_[axis].residue + tiling_->step[axis] * (axis_[axis].first + i) : -1;
}

void Work::prepare(const Form& form, const Tiling& tiling, int tile, int b, int h, int chunk_keys, int ld,
                   int64_t key_stride) {
  b = form.by_batch ? b : 0;
  h = form.by_head ? h : 0;
  if (id_ == form.id && tiling_ == &tiling && tile_ == tile && b_ == b && h_ == h && ld_ == ld && wanted_ == chunk_keys &&
      key_stride_ == key_stride)
    return;
  id_ = 0;  // until all is in place
  form_ = &form, tiling_ = &tiling, tile_ = tile, b_ = b, h_ = h, ld_ = ld, wanted_ = chunk_keys, key_stride_ = key_stride;
  lanes_ = tiling.lanes;
  blocks_ = (lanes_ + BLOCK - 1) / BLOCK;
  int rest = tile;
  for (int a = form.rank - 1; a >= 0; --a) {
    int n = (int)tiling.axis[a].size();
    axis_[a] = tiling.axis[a][rest % n];
    rest /= n;
  }
  queries_.assign((size_t)tiling.panels * lanes_, -1);
  valid_.assign(tiling.panels, 0);
  for (int p = 0; p < tiling.panels; ++p)
    for (int lane = 0; lane < lanes_; ++lane) {
      int64_t flat = 0, stride = 1;
      int left = p;
      for (int a = form.rank - 1; a >= 0 && flat >= 0; --a) {
        int at = query_at(a, left % tiling.across[a], tiling.digit[a][lane]);
        left /= tiling.across[a];
        flat = at < 0 ? -1 : flat + at * stride;
        stride *= form.lq[a];
      }
      queries_[(size_t)p * lanes_ + lane] = (int32_t)flat;
      if (flat >= 0) valid_[p] |= 1u << lane;
    }
  collect();
  int n = (int)keys.size();
  chunks_ = (n + chunk_keys - 1) / chunk_keys;
  size_ = chunks_ ? (n + chunks_ - 1) / chunks_ : 1;
  place.clear();
  mask.clear();
  ranges_.assign((size_t)tiling.panels * chunks_, Range{0, 0});
  trim_.assign((size_t)tiling.panels * chunks_ * 2 * blocks_, 0);
  for (int p = 0; p < tiling.panels && chunks_; ++p) {
    if (!valid_[p]) continue;
    if (product_)
      product_entries(p);
    else
      union_entries(p);
  }
  offset.resize(place.size());
  for (size_t i = 0; i < place.size(); ++i) offset[i] = place[i] * ld;
  in_place.resize(key_stride ? place.size() : 0);
  for (int p = 0; key_stride && p < tiling.panels; ++p)
    for (int c = 0; c < chunks_; ++c)
      for (int i = entries(c, p).begin; i < entries(c, p).end; ++i)
        in_place[i] = (int32_t)(this->chunk_keys(c)[place[i]] * key_stride);
  id_ = form.id;
}

bool Work::meets(const BoxTables& box, Active& out) const {
  out.box = &box;
  if (!box.rows.empty()) {
    const uint8_t* rows = box.rows.at(b_, h_);
    bool any = false;
    for (int32_t q : queries_) any |= q >= 0 && rows[q];
    if (!any) return false;
  }
  for (int a = 0; a < form_->rank; ++a) {
    const Spans& s = box.axis[a];
    const int32_t *lo = s.lo.at(b_, h_), *hi = s.hi.at(b_, h_);
    int least = INT32_MAX, most = 0, residue = -1;
    bool same = true;
    for (int i = 0; i < axis_[a].count; ++i) {
      int at = axis_[a].residue + tiling_->step[a] * (axis_[a].first + i);
      if (hi[at] <= lo[at]) continue;
      least = std::min(least, lo[at]);
      most = std::max(most, hi[at]);
      if (residue < 0) residue = lo[at] % s.step;
      same &= lo[at] % s.step == residue;
    }
    if (most <= least) return false;
    out.from[a] = least;
    out.stride[a] = same ? s.step : 1;
    out.count[a] = (most - least + out.stride[a] - 1) / out.stride[a];
  }
  return true;
}

void Work::enumerate(const Active& a, std::vector<int32_t>& out) const {
  out.clear();
  int last = form_->rank - 1, at[MAX_RANK] = {};
  const uint8_t* real = a.box->keys.empty() ? nullptr : a.box->keys.at(b_, h_);
  for (;;) {
    int64_t base = 0;
    for (int c = 0; c < last; ++c) base = (base + a.from[c] + (int64_t)at[c] * a.stride[c]) * form_->lk[c + 1];
    base += a.from[last];
    for (int i = 0; i < a.count[last]; ++i) {
      int32_t key = (int32_t)(base + (int64_t)i * a.stride[last]);
      if (!real || real[key]) out.push_back(key);
    }
    int c = last - 1;
    while (c >= 0 && ++at[c] == a.count[c]) at[c--] = 0;
    if (c < 0) break;
  }
  const Blocks& blocks = a.box->blocks;
  if (!blocks.words) return;
  // Keep the keys of blocks that some query of the tile lists.
  std::vector<uint64_t> any(blocks.words, 0);
  std::vector<int> seen;
  for (int32_t q : queries_) {
    if (q < 0) continue;
    int number = 0, rest = q, coordinate[MAX_RANK];
    for (int c = last; c >= 0; --c) {
      coordinate[c] = rest % form_->lq[c];
      rest /= form_->lq[c];
    }
    for (int c = 0; c <= last; ++c) number = number * blocks.query_count[c] + coordinate[c] / blocks.query_size[c];
    if (!seen.empty() && seen.back() == number) continue;
    seen.push_back(number);
    const uint64_t* row = blocks.chosen.at(b_, h_) + (size_t)number * blocks.words;
    for (int w = 0; w < blocks.words; ++w) any[w] |= row[w];
  }
  size_t kept = 0;
  for (int32_t key : out) {
    int number = 0, rest = key, coordinate[MAX_RANK];
    for (int c = last; c >= 0; --c) {
      coordinate[c] = rest % form_->lk[c];
      rest /= form_->lk[c];
    }
    for (int c = 0; c <= last; ++c) number = number * blocks.key_count[c] + coordinate[c] / blocks.key_size[c];
    if (any[number >> 6] >> (number & 63) & 1) out[kept++] = key;
  }
  out.resize(kept);
}

void Work::collect() {
  active_.clear();
  Active a;
  for (const BoxTables& box : form_->boxes)
    if (meets(box, a)) active_.push_back(a);
  keys.clear();
  product_ = active_.size() == 1 && active_[0].box->plain();
  if (active_.empty()) return;
  if (active_.size() <= 4) {
    enumerate(active_[0], keys);
    for (size_t i = 1; i < active_.size(); ++i) {
      enumerate(active_[i], other_);
      merged_.resize(keys.size() + other_.size());
      merged_.resize(std::set_union(keys.begin(), keys.end(), other_.begin(), other_.end(), merged_.begin()) -
                     merged_.begin());
      keys.swap(merged_);
    }
  } else {
    marks_.assign(form_->nk, 0);
    for (const Active& each : active_) {
      enumerate(each, other_);
      for (int32_t key : other_) marks_[key] = 1;
    }
    for (int64_t key = 0; key < form_->nk; ++key)
      if (marks_[key]) keys.push_back((int32_t)key);
  }
  if (product_) return;
  int64_t stride = 1;
  for (int c = form_->rank - 1; c >= 0; --c) {
    coordinate_[c].resize(keys.size());
    for (size_t i = 0; i < keys.size(); ++i) coordinate_[c][i] = (int32_t)(keys[i] / stride % form_->lk[c]);
    stride *= form_->lk[c];
  }
}

// Lanes that see each key of an axis, by what changes at the ends of intervals. The range is what the panel meets.
bool Work::axis_masks(const Active& a, int panel, int axis, Range& range, std::vector<uint32_t>& out) const {
  int digit = panel;
  for (int c = form_->rank - 1; c > axis; --c) digit /= tiling_->across[c];
  digit %= tiling_->across[axis];
  const Spans& s = a.box->axis[axis];
  const int32_t *lo = s.lo.at(b_, h_), *hi = s.hi.at(b_, h_);
  const int every = a.stride[axis] == s.step ? 1 : s.step;  // members of an interval, in units of the range
  int begin = INT32_MAX, end = 0, ends[MAX_LANES][2], n = tiling_->panel[axis];
  for (int i = 0; i < n; ++i) {
    int at = query_at(axis, digit, i);
    ends[i][0] = ends[i][1] = 0;
    if (at < 0 || hi[at] <= lo[at]) continue;
    ends[i][0] = (lo[at] - a.from[axis]) / a.stride[axis];
    int members = (hi[at] - lo[at] + s.step - 1) / s.step;
    ends[i][1] = ends[i][0] + members * every;
    begin = std::min(begin, ends[i][0]);
    end = std::max(end, ends[i][1]);
  }
  if (end <= begin) return false;
  out.assign(end - begin + 1, 0);
  for (int i = 0; i < n; ++i) {
    if (ends[i][1] <= ends[i][0]) continue;
    out[ends[i][0] - begin] ^= tiling_->shares[axis][i];
    out[ends[i][1] - begin] ^= tiling_->shares[axis][i];
  }
  for (int i = every; i < end - begin; ++i) out[i] ^= out[i - every];
  range = {begin, std::min(end, a.count[axis])};
  return true;
}

uint32_t Work::rows_of(const BoxTables& box, int panel) const {
  if (box.rows.empty()) return ~0u;
  const uint8_t* rows = box.rows.at(b_, h_);
  const int32_t* q = queries(panel);
  uint32_t bits = 0;
  for (int lane = 0; lane < lanes_; ++lane)
    if (q[lane] >= 0 && rows[q[lane]]) bits |= 1u << lane;
  return bits;
}

// End the chunks before `until`: note their entries, and how far each block of lanes needs them.
void Work::close(int panel, int& chunk, int until) {
  for (; chunk < until; ++chunk) {
    Range& range = ranges_[(size_t)panel * chunks_ + chunk];
    range.end = (int)place.size();
    if (chunk + 1 < chunks_) ranges_[(size_t)panel * chunks_ + chunk + 1].begin = range.end;
    int32_t* trim = &trim_[((size_t)panel * chunks_ + chunk) * 2 * blocks_];
    for (int k = 0; k < blocks_; ++k) {
      uint32_t bits = valid_[panel] & (((1u << BLOCK) - 1) << (k * BLOCK));
      int first = range.begin, last = range.end;
      while (first < last && !(mask[first] & bits)) ++first;
      while (last > first && !(mask[last - 1] & bits)) --last;
      trim[k] = first - range.begin;
      trim[k + blocks_] = last - range.begin;
    }
    for (int i = range.begin; i < range.end; ++i) mask[i] |= ~valid_[panel];
  }
}

inline void Work::push(int panel, int& chunk, int at, uint32_t bits) {
  if (at >= (chunk + 1) * size_) close(panel, chunk, at / size_);
  place.push_back(at - chunk * size_);
  mask.push_back(bits);
}

void Work::product_entries(int panel) {
  const Active& a = active_[0];
  int last = form_->rank - 1, chunk = 0, at[MAX_RANK];
  Range range[MAX_RANK];
  ranges_[(size_t)panel * chunks_].begin = (int)place.size();
  bool any = true;
  for (int c = 0; c <= last && any; ++c) {
    any = axis_masks(a, panel, c, range[c], masks_[c]);
    at[c] = any ? range[c].begin : 0;
  }
  const uint32_t allowed = rows_of(*a.box, panel) & valid_[panel];
  while (any) {
    uint32_t bits = allowed;
    int64_t base = 0;
    for (int c = 0; c < last; ++c) {
      bits &= masks_[c][at[c] - range[c].begin];
      base = (base + at[c]) * a.count[c + 1];
    }
    if (bits)
      for (int i = range[last].begin; i < range[last].end; ++i) {
        uint32_t both = bits & masks_[last][i - range[last].begin];
        if (both) push(panel, chunk, (int)(base + i), both);
      }
    int c = last - 1;
    while (c >= 0 && ++at[c] == range[c].end) {
      at[c] = range[c].begin;
      --c;
    }
    if (c < 0) break;
  }
  close(panel, chunk, chunks_);
}

void Work::union_entries(int panel) {
  const int rank = form_->rank, n = (int)keys.size();
  seen_.assign(n, 0);
  for (const Active& a : active_) {
    Range range[MAX_RANK];
    bool any = true;
    for (int c = 0; c < rank && any; ++c) any = axis_masks(a, panel, c, range[c], masks_[c]);
    const uint32_t allowed = rows_of(*a.box, panel) & valid_[panel];
    if (!any || !allowed) continue;
    const uint8_t* real = a.box->keys.empty() ? nullptr : a.box->keys.at(b_, h_);
    const Blocks& blocks = a.box->blocks;
    // Lanes by query block.
    int groups = 0, number[MAX_LANES];
    uint32_t members[MAX_LANES];
    for (int lane = 0; blocks.words && lane < lanes_; ++lane) {
      int q = queries(panel)[lane], at[MAX_RANK], block = 0;
      if (q < 0) continue;
      for (int c = rank - 1; c >= 0; --c) at[c] = q % form_->lq[c], q /= form_->lq[c];
      for (int c = 0; c < rank; ++c) block = block * blocks.query_count[c] + at[c] / blocks.query_size[c];
      int g = 0;
      while (g < groups && number[g] != block) ++g;
      if (g == groups) number[groups] = block, members[groups++] = 0;
      members[g] |= 1u << lane;
    }
    // Keys ascend, so the first coordinate does: only its stretch is looked at.
    const std::vector<int32_t>& outer = coordinate_[0];
    int from = a.from[0] + range[0].begin * a.stride[0], to = a.from[0] + (range[0].end - 1) * a.stride[0];
    int i = (int)(std::lower_bound(outer.begin(), outer.end(), from) - outer.begin());
    int end = (int)(std::upper_bound(outer.begin(), outer.end(), to) - outer.begin());
    for (; i < end; ++i) {
      uint32_t bits = allowed;
      for (int c = 0; c < rank && bits; ++c) {
        int d = coordinate_[c][i] - a.from[c];
        if (a.stride[c] > 1) {
          if (d % a.stride[c]) d = -1;
          else d /= a.stride[c];
        }
        bits = d < range[c].begin || d >= range[c].end ? 0 : bits & masks_[c][d - range[c].begin];
      }
      if (!bits || (real && !real[keys[i]])) continue;
      if (blocks.words) {
        int block = 0;
        for (int c = 0; c < rank; ++c) block = block * blocks.key_count[c] + coordinate_[c][i] / blocks.key_size[c];
        uint32_t listed = 0;
        for (int g = 0; g < groups; ++g) {
          const uint64_t* row = blocks.chosen.at(b_, h_) + (size_t)number[g] * blocks.words;
          if (row[block >> 6] >> (block & 63) & 1) listed |= members[g];
        }
        bits &= listed;
      }
      seen_[i] |= bits;
    }
  }
  int chunk = 0;
  ranges_[(size_t)panel * chunks_].begin = (int)place.size();
  for (int i = 0; i < n; ++i)
    if (seen_[i]) push(panel, chunk, i, seen_[i]);
  close(panel, chunk, chunks_);
}

}  // namespace glocal
