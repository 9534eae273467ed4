// The sampler's filters and draw: top-k, then top-p of the rest, then min-p, exact and unsorted.
//
// A filter is a pivot, the smallest kept value, and a quota of the tokens that equal it, lowest ids
// first. One block of 512 threads per row:
//
//   bound    a value no pivot lies below, from the groups' statistics alone: the k-th largest group
//            maximum; for top-p the value at which the groups' maxima alone hold the mass. Searched
//            from the smallest maximum on, so that the maxima spread over the 256 bins: from the
//            lowest float on they share one or two, whose additions wait for each other. Not at all
//            where the maxima do not hold the mass (flat rows under top-p alone): four rounds less,
//            of some 1 us each. Predicted at B = 64, V = 128256: 40 us with top-k and top-p, 48 before
//   list     the groups whose maximum reaches the bound, in token-id order: the only ones read again
//   pivot    radix search over the listed tokens: 256 bins of count and mass between the bounds,
//            which then close in on one bin; four rounds at most
//   draw     kept mass and ties of every listed group, running sums over those, then inside one
//
// Bins are added to atomically, but counts and masses are integers (common/sampling.h): the order
// does not matter, and a row's result does not depend on its batch.
//
// Bytes per row: V / 32, and 4 * 256 per listed group (two 16-bit streams) up to nine times, from
// L2: 0.5 MB at V = 128256 and top_k = 50. A flat row with top-p alone lists every group.
// Not measured on a GPU.

#include "cuda/sample_row.cuh"

namespace qadapter {
namespace cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / kWarp, kBins = 256;

// Weights of the keys above a pivot, and the pivot.
struct Pivot {
  uint32_t key;
  uint64_t count_above, mass_above;
};

struct Histogram {
  uint64_t *count, *mass;  // [kBins]
  Pivot* found;
};

// In one warp: the highest bin at which what lies above, and the bins from it on, reach the target;
// the lowest bin where none does. A lane has eight bins, the first lane the highest.
__device__ __forceinline__ void find_bin(const Histogram& h, bool by_mass, uint64_t target,
                                         const Pivot& above, uint32_t low, int shift) {
  constexpr int kEach = kBins / kWarp;
  const int lane = thread_index() % kWarp, top = kBins - 1 - lane * kEach;
  uint64_t counts = 0, masses = 0;
  for (int i = 0; i < kEach; ++i) counts += h.count[top - i], masses += h.mass[top - i];
  Pivot p = {0, above.count_above + warp_running(counts) - counts,
             above.mass_above + warp_running(masses) - masses};
  const uint64_t before = by_mass ? p.mass_above : p.count_above;
  const uint64_t reach = before + (by_mass ? masses : counts);
  const bool last = lane == kWarp - 1;
  const bool mine = (before < target || lane == 0) && (reach >= target || last);
  // Where nothing reaches the target it is the last lane's; a target of 0 is the first lane's.
  if (!mine) return;
  for (int i = 0; i < kEach; ++i) {
    const uint64_t count = h.count[top - i], mass = h.mass[top - i];
    const uint64_t sum = by_mass ? p.mass_above + mass : p.count_above + count;
    if (sum >= target || top - i == 0) {
      p.key = low + (static_cast<uint32_t>(top - i) << shift);
      *h.found = p;
      return;
    }
    p.count_above += count, p.mass_above += mass;
  }
}

// One item into its bin, if it lies between the bounds.
struct Binned {
  Histogram h;
  uint32_t low, high;
  int shift;

  __device__ __forceinline__ void operator()(uint32_t key, uint64_t mass) const {
    if (key < low || key > high) return;
    const uint32_t bin = (key - low) >> shift;
    shared_add(h.count + bin, uint64_t{1});
    shared_add(h.mass + bin, mass);
  }
};

// What a search runs over: the largest tokens of all groups, or the tokens of the listed groups.
struct GroupMaxima {
  const float* group_max;
  int groups;
  float max, scale2;

  __device__ __forceinline__ void visit(const Binned& take) const {
    for (int group = thread_index(); group < groups; group += kThreads) {
      const float x = group_max[group];
      take(order_key(x), token_mass(x, max, scale2));
    }
  }
};

template <class T>
struct ListedTokens {
  const SampleRow<T>& row;
  const int* list;
  int listed;
  float max;

  __device__ __forceinline__ void visit(const Binned& take) const {
    for (int at = thread_index() / kWarp; at < listed; at += kWarps) {
      float x[kPerLane];
      row.tokens(list[at], x);
      QADAPTER_UNROLL
      for (int i = 0; i < kPerLane; ++i) take(order_key(x[i]), token_mass(x[i], max, row.scale2));
    }
  }
};

// The largest key in [low, high] at which the items from it on reach the target, a count or a mass;
// low where none does.
template <class Items>
__device__ __forceinline__ Pivot find_pivot(const Items& items, bool by_mass, uint64_t target,
                                            uint32_t low, uint32_t high, const Histogram& h) {
  Pivot above = {low, 0, 0};
  for (;;) {
    int shift = 0;
    while (((high - low) >> shift) >= kBins) ++shift;
    for (int bin = thread_index(); bin < kBins; bin += kThreads) h.count[bin] = h.mass[bin] = 0;
    block_barrier();
    items.visit({h, low, high, shift});
    block_barrier();
    if (thread_index() < kWarp) find_bin(h, by_mass, target, above, low, shift);
    block_barrier();
    above = *h.found;
    low = above.key;
    block_barrier();  // all have read it before the next round writes it
    if (shift == 0) return above;
    const uint32_t width = (uint32_t{1} << shift) - 1;
    if (high - low > width) high = low + width;
  }
}

// A key that no pivot lies below: the largest at which the groups' maxima alone reach the target;
// low where all of them do not.
__device__ __forceinline__ uint32_t bound_of_maxima(const GroupMaxima& over, bool by_mass,
                                                    uint64_t target, uint32_t low, uint32_t high,
                                                    const Histogram& h, uint64_t* slots,
                                                    uint32_t* key_slots) {
  uint32_t smallest = high;
  uint64_t total = 0;
  for (int group = thread_index(); group < over.groups; group += kThreads) {
    const float x = over.group_max[group];
    const uint32_t key = order_key(x);
    if (key < low) continue;
    smallest = key < smallest ? key : smallest;
    total += by_mass ? token_mass(x, over.max, over.scale2) : 1;
  }
  if (block_sum(total, slots) < target) return low;
  const auto lesser = [](uint32_t x, uint32_t y) { return x < y ? x : y; };
  const uint32_t start = block_all(smallest, high, lesser, key_slots);
  return find_pivot(over, by_mass, target, start, high, h).key;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) sample_filter_kernel(const SampleArgs a) {
  QADAPTER_SHARED(uint64_t, counts, kBins);
  QADAPTER_SHARED(uint64_t, masses, kBins);
  QADAPTER_SHARED(Pivot, found_pivot, 1);
  QADAPTER_SHARED(float, float_slots, kWarps);
  QADAPTER_SHARED(int, int_slots, kWarps);
  QADAPTER_SHARED(uint32_t, key_slots, kWarps);
  QADAPTER_SHARED(uint64_t, slots, kWarps);
  QADAPTER_SHARED(uint64_t, found, 3);
  const Histogram histogram = {counts, masses, found_pivot};
  const int64_t row = block_x();
  const int thread = thread_index(), warp = thread / kWarp, groups = a.groups;
  const SampleRow<T> r(a, row);
  int first_group;
  const float max = row_maximum(a, row, &first_group, float_slots, int_slots);
  if (max != max || !r.legal) {
    if (thread == 0) write_nothing(a, row);
    return;
  }
  const float* group_max = a.group_max + row * groups;
  const float* group_sum = a.group_sum + row * groups;
  int *list = a.list + row * groups, *ties = a.ties + row * groups;
  uint64_t* kept = a.kept + row * groups;
  const uint32_t high = order_key(max);
  const uint32_t least = a.by_min ? least_key(max, r.scale, a.log_min_p) : kLowestKey;

  // The bound.
  const GroupMaxima over_groups = {group_max, groups, max, r.scale2};
  uint32_t low = least;
  uint64_t row_total = 0;
  if (a.top_k > 0) {
    low = kLowestKey;
    low = bound_of_maxima(over_groups, false, a.top_k, low, high, histogram, slots, key_slots);
  } else if (a.by_p) {
    for (int group = thread; group < groups; group += kThreads) {
      row_total += group_mass(group_sum[group], group_max[group], max, r.scale2);
    }
    row_total = block_sum(row_total, slots);
    const double relative = static_cast<double>(row_total) * kMassUnit;
    low = deepest_key(max, r.scale2, a.top_p, relative, a.vocab);
    low = low > least ? low : least;
    low = low < high ? low : high;
    // Sums of groups and of tokens differ in their roundings.
    const uint64_t target = static_cast<uint64_t>(a.top_p * 1.00001 * relative / kMassUnit);
    low = bound_of_maxima(over_groups, true, target, low, high, histogram, slots, key_slots);
  }

  // The list.
  int listed = 0;
  for (int start = 0; start < groups; start += kThreads) {
    const int group = start + thread;
    const int in = group < groups && order_key(group_max[group]) >= low ? 1 : 0;
    const int place = listed + block_running(in, int_slots) - in;
    if (in) list[place] = group;
    listed += block_sum(in, int_slots);
  }
  block_barrier();

  // The pivots: kept is what exceeds the pivot, and `quota` of what equals it.
  const ListedTokens<T> over_tokens = {r, list, listed, max};
  uint32_t pivot = low - 1;
  int quota = 0;
  if (a.top_k > 0 || a.by_p) {
    const uint64_t target = a.top_k > 0 ? a.top_k : share_of(a.top_p, row_total);
    Pivot p = find_pivot(over_tokens, a.top_k == 0, target, low, high, histogram);
    uint64_t mass = token_mass(key_value(p.key), max, r.scale2);
    pivot = p.key;
    quota = a.top_k > 0 ? a.top_k - static_cast<int>(p.count_above)
                        : ties_needed(target, p.mass_above, mass);
    if (a.top_k > 0 && a.by_p) {
      const uint64_t total = p.mass_above + static_cast<uint64_t>(quota) * mass;
      const uint64_t share = share_of(a.top_p, total);
      low = pivot > least ? pivot : least;
      p = find_pivot(over_tokens, true, share, low, high, histogram);
      mass = token_mass(key_value(p.key), max, r.scale2);
      const int wanted = ties_needed(share, p.mass_above, mass);
      quota = p.key == pivot ? min(quota, wanted) : wanted;
      pivot = p.key;
    }
  }
  if (a.by_min && least > pivot) pivot = least - 1, quota = 0;

  // Kept mass and ties of every listed group.
  const int lane = thread % kWarp;
  uint64_t all_kept = 0;
  int all_ties = 0;
  for (int at = warp; at < listed; at += kWarps) {
    float x[kPerLane];
    r.tokens(list[at], x);
    uint64_t mass = 0;
    int equal = 0;
    QADAPTER_UNROLL
    for (int i = 0; i < kPerLane; ++i) {
      const uint32_t key = order_key(x[i]);
      if (key > pivot) mass += token_mass(x[i], max, r.scale2);
      equal += key == pivot;
    }
    mass = warp_running(mass), equal = warp_running(equal);
    if (lane == kWarp - 1) {
      kept[at] = mass, ties[at] = equal;
      all_kept += mass, all_ties += equal;
    }
  }
  block_barrier();
  const uint64_t pivot_mass = quota > 0 ? token_mass(key_value(pivot), max, r.scale2) : 0;
  const int kept_ties = min(quota, block_sum(all_ties, int_slots));
  const uint64_t total = block_sum(all_kept, slots) + static_cast<uint64_t>(kept_ties) * pivot_mass;
  const double total_mass = static_cast<double>(total) * kMassUnit;
  if (a.greedy) {
    if (thread >= kWarp) return;
    float x[kPerLane];
    r.tokens(first_group, x);
    take_maximum(a, row, first_group, x, max, r.scale, total_mass);
    return;
  }

  // The group of the draw, and what of the threshold and of the quota is left for it.
  const uint64_t threshold = draw_threshold(row_uniform(a, row), total);
  uint64_t before = 0;
  int ties_before = 0;
  for (int start = 0; start < listed && before <= threshold; start += kThreads) {
    const int at = start + thread;
    const int equal = at < listed ? ties[at] : 0;
    const int earlier = ties_before + block_running(equal, int_slots) - equal;
    const int left = earlier < quota ? quota - earlier : 0;
    uint64_t mass = at < listed ? kept[at] : 0;
    mass += static_cast<uint64_t>(min(left, equal)) * pivot_mass;
    const uint64_t end = before + block_running(mass, slots);
    if (end > threshold && end - mass <= threshold) {
      found[0] = list[at], found[1] = threshold - (end - mass), found[2] = left;
    }
    before += block_sum(mass, slots);
    ties_before += block_sum(equal, int_slots);
  }
  block_barrier();
  if (thread >= kWarp) return;
  const int group = static_cast<int>(found[0]), left = static_cast<int>(found[2]);
  float x[kPerLane];
  uint64_t mass[kPerLane];
  r.tokens(group, x);
  int equal = 0;
  QADAPTER_UNROLL
  for (int i = 0; i < kPerLane; ++i) equal += order_key(x[i]) == pivot;
  int rank = warp_running(equal) - equal;  // of this lane's first tie
  QADAPTER_UNROLL
  for (int i = 0; i < kPerLane; ++i) {
    const uint32_t key = order_key(x[i]);
    const bool in = key > pivot || (key == pivot && rank < left);
    rank += key == pivot;
    mass[i] = in ? token_mass(x[i], max, r.scale2) : 0;
  }
  draw_in_group(a, row, group, x, mass, found[1], max, r.scale, total_mass);
}

}  // namespace

const char* launch_sample_filter(const SampleArgs& a, DType dtype, void* stream) {
  if (dtype == DType::f32) {
    return launch(sample_filter_kernel<float>, a.batch, 1, kThreads, 1, 0, stream, a);
  }
  if (dtype == DType::bf16) {
    return launch(sample_filter_kernel<lowp::bf16>, a.batch, 1, kThreads, 1, 0, stream, a);
  }
  return launch(sample_filter_kernel<lowp::f16>, a.batch, 1, kThreads, 1, 0, stream, a);
}

}  // namespace cuda
}  // namespace qadapter
