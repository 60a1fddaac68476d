#include "form.h"

#include <algorithm>
#include <atomic>
#include <cmath>

namespace glocal {
namespace {

// Keys met by runs of `size` queries of one residue class, summed over the runs of an axis.
double met(const Form& form, const BoxTables& box, int axis, int step, int size) {
  const int32_t *lo = box.axis[axis].lo.at(0, 0), *hi = box.axis[axis].hi.at(0, 0);
  const int stride = box.axis[axis].step;
  double total = 0;
  for (int residue = 0; residue < step; ++residue)
    for (int first = residue; first < form.lq[axis]; first += step * size) {
      int least = INT32_MAX, most = 0;
      for (int i = 0; i < size; ++i) {
        int at = first + i * step;
        if (at >= form.lq[axis]) break;
        if (hi[at] <= lo[at]) continue;
        least = std::min(least, lo[at]);
        most = std::max(most, hi[at]);
      }
      if (most > least) total += (most - least + stride - 1) / stride;
    }
  return std::max(total, 1.0);
}

// The box with most live pairs decides how queries are grouped.
const BoxTables* main_box(const Form& form) {
  const BoxTables* best = nullptr;
  double most = -1;
  for (const BoxTables& box : form.boxes) {
    double pairs = 1;
    for (int a = 0; a < form.rank; ++a) {
      double keys = 0;
      const Spans& s = box.axis[a];
      const int32_t *lo = s.lo.at(0, 0), *hi = s.hi.at(0, 0);
      for (int i = 0; i < form.lq[a]; ++i) keys += std::max(0, (hi[i] - lo[i] + s.step - 1) / s.step);
      pairs *= keys;
    }
    if (pairs > most) {
      most = pairs;
      best = &box;
    }
  }
  return best;
}

void finish(const Form& form, Tiling& t) {
  t.tiles = 1;
  t.panels = 1;
  for (int a = 0; a < form.rank; ++a) {
    t.axis[a].clear();
    int size = t.panel[a] * t.across[a];
    for (int r = 0; r < std::min(t.step[a], std::max(form.lq[a], 1)); ++r) {
      int count = form.lq[a] > r ? (form.lq[a] - r + t.step[a] - 1) / t.step[a] : 0;
      for (int first = 0; first < count; first += size) t.axis[a].push_back({r, first, std::min(size, count - first)});
    }
    t.tiles *= (int)t.axis[a].size();
    t.panels *= t.across[a];
    for (int l = 0; l < MAX_LANES; ++l) t.shares[a][l] = 0;
  }
  for (int lane = 0; lane < t.lanes; ++lane) {
    int rest = lane;
    for (int a = form.rank - 1; a >= 0; --a) {
      t.digit[a][lane] = rest % t.panel[a];
      rest /= t.panel[a];
      t.shares[a][t.digit[a][lane]] |= 1u << lane;
    }
  }
}

}  // namespace

uint64_t Form::next_id() {
  static std::atomic<uint64_t> count{0};
  return ++count;
}

const Tiling& Form::tiling(int lanes, int most) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const Kept& k : kept_)
    if (k.lanes == lanes && k.most == most) return *k.tiling;
  auto made = std::make_unique<Tiling>();
  Tiling& t = *made;
  t.rank = rank;
  t.lanes = lanes;
  const BoxTables* box = main_box(*this);
  for (int a = 0; a < rank; ++a) {
    t.step[a] = box ? box->axis[a].step : 1;
    t.panel[a] = t.across[a] = 1;
  }
  t.panel[rank - 1] = lanes;
  if (box && nq > 0) {
    // Scores cost what whole panels meet, the weighted sum what blocks of four neighbours meet.
    std::vector<std::vector<double>> cost(rank);
    int levels = 1;
    for (int p = 1; p < lanes; p *= 2) ++levels;
    for (int a = 0; a < rank; ++a)
      for (int e = 0; e < levels + 4; ++e) cost[a].push_back(met(*this, *box, a, t.step[a], 1 << e));
    double least = HUGE_VAL;
    for (int code = 0; code < (int)std::pow(levels, rank); ++code) {
      int e[MAX_RANK], sum = 0, rest = code;
      for (int a = 0; a < rank; ++a, rest /= levels) sum += e[a] = rest % levels;
      if (sum != levels - 1) continue;
      double scores = lanes, values = BLOCK;
      int block = 2;  // log2 of BLOCK
      for (int a = rank - 1; a >= 0; --a) {
        int mine = std::min(block, e[a]);
        block -= mine;
        scores *= cost[a][e[a]];
        values *= cost[a][mine];
      }
      if (1.4 * scores + values < least) {
        least = 1.4 * scores + values;
        for (int a = 0; a < rank; ++a) t.panel[a] = 1 << e[a];
      }
    }
    // Grow the tile along the axis that leaves fewest keys to pack.
    int e[MAX_RANK];
    for (int a = 0; a < rank; ++a) e[a] = (int)std::lround(std::log2(t.panel[a]));
    for (int panels = 1; panels * 2 <= most; panels *= 2) {
      int best = -1;
      double fewest = HUGE_VAL;
      for (int a = 0; a < rank; ++a) {
        if (e[a] + 1 >= (int)cost[a].size() || (1 << e[a]) * t.step[a] >= lq[a]) continue;
        double keys = 1;
        for (int c = 0; c < rank; ++c) keys *= cost[c][e[c] + (c == a)];
        if (keys < fewest) {
          fewest = keys;
          best = a;
        }
      }
      if (best < 0) break;
      ++e[best];
      t.across[best] *= 2;
    }
  }
  finish(*this, t);
  kept_.push_back({lanes, most, std::move(made)});
  return *kept_.back().tiling;
}

const Tiling& Form::rows(int lanes) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const Kept& k : kept_)
    if (k.lanes == lanes && k.most == 0) return *k.tiling;
  auto made = std::make_unique<Tiling>();
  made->rank = rank;
  made->lanes = lanes;
  int left = lanes;
  for (int a = rank - 1; a >= 0; --a) {
    made->step[a] = made->across[a] = 1;
    made->panel[a] = a ? std::min(left, lq[a]) : left;
    left = (left + made->panel[a] - 1) / made->panel[a];
  }
  finish(*this, *made);
  kept_.push_back({lanes, 0, std::move(made)});
  return *kept_.back().tiling;
}

}  // namespace glocal
