// Where top-k, top-p and min-p cut a row: the tokens above a pivot stay, and the first few that
// equal it. No order of the row is made.
//
// top-k. The k-th largest of the maxima of blocks (of groups, for larger k) bounds the k-th
//   largest value from below. The few values above that bound are collected; nth_element does the
//   rest.
// top-p. Of what top-k left, or of everything. In the second case maxima will not do, since mass
//   may lie anywhere: 16 columns of every block give a histogram of mass, and that a bracket for
//   the pivot. One pass adds up what lies above the bracket and collects what lies in it; where the
//   bracket misses (a row that its sample does not resemble) it moves, and the pass is run again.
//   Among the collected, brackets by a sample of them, then halving by nth_element.
// min-p. A bound on x.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <functional>
#include <vector>

#include "cpu/sample.h"

namespace qadapter {

// x > pivot stays, and the first `quota` tokens with x == pivot.
struct Cut {
  float pivot = -__builtin_inff();
  int64_t quota = 0;
};

struct Filters {
  int64_t top_k;
  double top_p, min_p;

  bool any() const { return top_k > 0 || top_p < 1.0 || min_p > 0.0; }
};

// A row after its first pass.
struct SampleRow {
  const float* x;  // [blocks * kSampleBlock]; null where it was not kept
  BlockStats stats;
  int64_t blocks;
  float max, scale2;
  double scale;

  // What a mass relative to the block's maximum has to be multiplied with.
  double factor(int64_t block) const {
    return std::exp2((static_cast<double>(stats.max[block]) - max) * scale2);
  }
};

class Cutter {
 public:
  Cutter(const SampleTable& table_, const SampleRow& row_, std::vector<float>& one,
         std::vector<float>& two)
      : table(table_), row(row_) {
    const size_t room = static_cast<size_t>(row.blocks) * kSampleBlock + kSampleGroups;
    if (one.size() < room) one.resize(room);
    if (two.size() < room) two.resize(room);
    values = one.data(), spare = two.data();
  }

  Cut find(const Filters& filters) {
    Cut cut;
    if (filters.top_k > 0) {
      cut = largest(filters.top_k);
      if (filters.top_p < 1.0) {
        const double total = mass(values, count);
        cut = heaviest(filters.top_p * total);
      }
    } else if (filters.top_p < 1.0) {
      cut = heaviest_of_all(filters.top_p);
    }
    if (filters.min_p > 0.0) {
      const float least = smallest_near(std::log(filters.min_p));
      if (least > cut.pivot) cut = {below(least), 0};
    }
    return cut;
  }

 private:
  static constexpr float kLow = -__builtin_inff();
  const SampleTable& table;
  const SampleRow& row;
  float *values, *spare;  // `count` values that are still of interest; room for as many
  int64_t count = 0;

  // The next smaller float; no subnormal, which is 0 where torch.set_flush_denormal is on.
  static float below(float x) {
    const float next = std::nextafter(x, kLow);
    if (!(std::fabs(next) < FLT_MIN)) return next;
    return x > 0 ? 0.0f : -FLT_MIN;
  }

  double mass(const float* x, int64_t n) const {
    int64_t equal;
    return table.mass_above(x, n, kLow, row.max, row.scale2, equal);
  }

  // Collects the values in (low, high]; the mass of those above.
  double collect(float low, float high) {
    count = 0;
    double above = 0.0;
    for (int64_t block = 0; block < row.blocks; ++block) {
      if (!(row.stats.max[block] > low)) continue;
      above += table.split(row.x + block * kSampleBlock, kSampleBlock, low, high, row.max,
                           row.scale2, values, count);
    }
    return above;
  }

  // Leaves the k largest values in `values` (all, if there are fewer).
  Cut largest(int64_t k) {
    float least = -FLT_MAX;
    const bool by_blocks = 4 * k <= 3 * row.blocks;
    const int64_t bounds = row.blocks * (by_blocks ? 1 : kSampleGroups);
    if (k <= bounds) {
      std::copy_n(by_blocks ? row.stats.max : row.stats.groups, bounds, spare);
      std::nth_element(spare, spare + (k - 1), spare + bounds, std::greater<float>());
      least = std::max(least, spare[k - 1]);
    }
    count = 0;
    for (int64_t block = 0; block < row.blocks; ++block) {
      if (!(row.stats.max[block] >= least)) continue;
      table.gather(row.x + block * kSampleBlock, kSampleBlock, least, values, count);
    }
    if (count <= k) return {below(least), 0};
    std::nth_element(values, values + (k - 1), values + count, std::greater<float>());
    count = k;
    const float pivot = values[k - 1];
    return {pivot, k - above(values, k, pivot)};
  }

  static int64_t above(const float* x, int64_t n, float pivot) {
    return std::count_if(x, x + n, [pivot](float value) { return value > pivot; });
  }

  Cut heaviest_of_all(double top_p) {
    double total = 0.0;
    for (int64_t block = 0; block < row.blocks; ++block) {
      if (row.stats.sum[block] > 0) total += row.stats.sum[block] * row.factor(block);
    }
    float low = kLow, high = -kLow;
    if (row.blocks > 8) bracket(total, 1.0 - top_p, low, high);
    for (int attempt = 0;; ++attempt) {
      const double need = top_p * total - collect(low, high);
      if (attempt == 2 || (low == kLow && high == -kLow)) return heaviest(need);
      if (need <= 0) {
        low = high, high = -kLow;
      } else if (low > kLow && mass(values, count) < need) {
        high = low, low = kLow;
      } else {
        return heaviest(need);
      }
      if (attempt == 1) low = kLow, high = -kLow;
    }
  }

  // Where the tail of mass `share` begins, roughly, as 16 columns of every block have it. No token
  // of less than share * total / V is kept: all of those together have less than the tail.
  void bracket(double total, double share, float& low, float& high) const {
    constexpr int kBins = 512, kColumns = 16;
    const double columns = static_cast<double>(row.blocks) * kSampleBlock, tail = share * total;
    const double width = std::max(-std::log2(tail / columns), 1.0) / row.scale2;
    const double bottom = row.max - width, bins_per_x = kBins / width;
    if (!(tail > 0) || !std::isfinite(bins_per_x)) return;
    double bins[kBins] = {}, below = 0.0;
    float e[kColumns];
    for (int64_t block = 0; block < row.blocks; ++block) {
      const float* x = row.x + block * kSampleBlock;
      table.masses(x, kColumns, row.max, row.scale2, e);
      for (int k = 0; k < kColumns; ++k) {
        const double bin = std::max((x[k] - bottom) * bins_per_x, 0.0);  // -inf: mass 0
        bins[std::min(static_cast<int>(bin), kBins - 1)] += e[k];
      }
    }
    for (int bin = 0; bin < kBins; ++bin) {
      below += bins[bin] * (kSampleBlock / kColumns);
      const float edge = static_cast<float>(bottom + (bin + 1) / bins_per_x);
      if (below <= 0.85 * tail) low = edge;
      if (below >= 1.15 * tail) {
        high = edge;
        break;
      }
    }
    // In the last bin is the maximum, and rounding may put it on either side of the edge.
    if (high >= row.max) high = -kLow;
    if (low >= row.max) low = kLow;
  }

  // The fewest largest of the collected values that have a mass of `need`.
  Cut heaviest(double need) {
    if (count == 0) return {};
    narrow(need);
    float* begin = values;
    int64_t left = count, kept = 0;
    std::copy_n(values, count, spare);
    while (left > 32) {
      const int64_t half = left / 2;
      std::nth_element(begin, begin + half, begin + left, std::greater<float>());
      const double upper = mass(begin, half);
      if (upper >= need) {
        left = half;
      } else {
        need -= upper, kept += half, begin += half, left -= half;
      }
    }
    float e[32];
    std::sort(begin, begin + left, std::greater<float>());
    table.masses(begin, left, row.max, row.scale2, e);
    int64_t last = 0;
    while (last + 1 < left && need > e[last]) need -= e[last++];
    const float pivot = begin[last];
    return {pivot, kept + last + 1 - above(spare, count, pivot)};
  }

  // Throws out values that lie clearly above or below the pivot, as a sample of them has it.
  void narrow(double& need) {
    constexpr int kSample = 256, kMargin = 20;  // two standard deviations of a rank, and some
    for (int round = 0; round < 8 && count > 2 * kSample; ++round) {
      float sample[kSample], e[kSample];
      for (int k = 0; k < kSample; ++k) sample[k] = values[count * k / kSample];
      std::sort(sample, sample + kSample);
      table.masses(sample, kSample, row.max, row.scale2, e);
      double tail = (mass(values, count) - need) * kSample / count;  // mass below the pivot
      int rank = 0;
      while (rank < kSample && tail > e[rank]) tail -= e[rank++];
      const float from = rank < kMargin ? kLow : sample[rank - kMargin];
      const float to = rank + kMargin < kSample ? sample[rank + kMargin] : -kLow;
      int64_t inside = 0;
      const double top = table.split(values, count, from, to, row.max, row.scale2, spare, inside);
      const double middle = mass(spare, inside);
      if (top >= need) {
        inside = 0;
        table.split(values, count, to, -kLow, row.max, row.scale2, spare, inside);
      } else if (top + middle >= need) {
        need -= top;
      } else {
        inside = 0;
        table.split(values, count, kLow, from, row.max, row.scale2, spare, inside);
        if (inside > 0) need -= top + middle;
      }
      if (inside == 0 || inside == count) return;
      std::swap(values, spare);
      count = inside;
    }
  }

  // The smallest float x with (x - max) * scale >= bound.
  float smallest_near(double bound) const {
    const auto near = [&](float x) {
      return (static_cast<double>(x) - row.max) * row.scale >= bound;
    };
    float x = static_cast<float>(row.max + bound / row.scale);
    for (int k = 0; k < 4 && near(x); ++k) x = std::nextafter(x, kLow);
    for (int k = 0; k < 8 && !near(x); ++k) x = std::nextafter(x, -kLow);
    return x;
  }
};

}  // namespace qadapter
