// The sampler's draw where nothing is filtered: inverse CDF over groups, then inside one of them.
//
//   u     = 53 bits of Philox4x32-10 (key = seed, counter = position)
//   token = first id whose running mass exceeds u * total, in token-id order
//   logp  = (x - max) scale - ln total          greedy: the lowest id with x = max
//
// One block of 256 threads per row. Masses are integers (common/sampling.h).
//
// Bytes: V / 32 + 1024 per row, 5 KB at V = 128256. What it costs is one launch and a chain of three
// dependent loads and seven reductions. Not measured on a GPU.

#include "cuda/sample_row.cuh"

namespace qadapter {
namespace cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) sample_draw_kernel(const SampleArgs a) {
  QADAPTER_SHARED(float, float_slots, kThreads / kWarp);
  QADAPTER_SHARED(int, int_slots, kThreads / kWarp);
  QADAPTER_SHARED(uint64_t, slots, kThreads / kWarp);
  QADAPTER_SHARED(uint64_t, found, 3);
  const int64_t row = block_x();
  const int thread = thread_index();
  const SampleRow<T> r(a, row);
  int first_group;
  const float max = row_maximum(a, row, &first_group, float_slots, int_slots);
  if (max != max || !r.legal) {
    if (thread == 0) write_nothing(a, row);
    return;
  }
  const float* group_max = a.group_max + row * a.groups;
  const float* group_sum = a.group_sum + row * a.groups;
  uint64_t total = 0;
  for (int group = thread; group < a.groups; group += kThreads) {
    total += group_mass(group_sum[group], group_max[group], max, r.scale2);
  }
  total = block_sum(total, slots);
  const double total_mass = static_cast<double>(total) * kMassUnit;
  if (a.greedy) {
    if (thread >= kWarp) return;
    float x[kPerLane];
    r.tokens(first_group, x);
    take_maximum(a, row, first_group, x, max, r.scale, total_mass);
    return;
  }

  const uint64_t threshold = draw_threshold(row_uniform(a, row), total);
  uint64_t before = 0;  // the mass of all groups before this round's
  for (int start = 0; start < a.groups && before <= threshold; start += kThreads) {
    const int group = start + thread;
    const uint64_t mass =
        group < a.groups ? group_mass(group_sum[group], group_max[group], max, r.scale2) : 0;
    const uint64_t end = before + block_running(mass, slots);
    if (end > threshold && end - mass <= threshold) {
      found[0] = group, found[1] = threshold - (end - mass), found[2] = mass;
    }
    before += block_sum(mass, slots);
  }
  block_barrier();
  if (thread >= kWarp) return;
  const int group = static_cast<int>(found[0]);
  // Inside relative to the group's own maximum: where a group has mass, a token of it then has.
  const float top = group_max[group];
  float x[kPerLane];
  uint64_t mass[kPerLane], sum = 0;
  r.tokens(group, x);
  QADAPTER_UNROLL
  for (int i = 0; i < kPerLane; ++i) {
    mass[i] = token_mass(x[i], top, r.scale2);
    sum += mass[i];
  }
  sum = lane_read(warp_running(sum), kWarp - 1);
  const double part = static_cast<double>(found[1]) / static_cast<double>(found[2]);
  draw_in_group(a, row, group, x, mass, draw_threshold(part, sum), max, r.scale, total_mass);
}

}  // namespace

const char* launch_sample_draw(const SampleArgs& a, DType dtype, void* stream) {
  if (dtype == DType::f32) {
    return launch(sample_draw_kernel<float>, a.batch, 1, kThreads, 1, 0, stream, a);
  }
  if (dtype == DType::bf16) {
    return launch(sample_draw_kernel<lowp::bf16>, a.batch, 1, kThreads, 1, 0, stream, a);
  }
  return launch(sample_draw_kernel<lowp::f16>, a.batch, 1, kThreads, 1, 0, stream, a);
}

}  // namespace cuda
}  // namespace qadapter
