// One token per row of the composed policy, with its log-probability.
//
//   x_j  = z_q[j] + base_weight z_b[j]     c_j = scale x_j     mass_j = exp(scale (x_j - max x))
//   kept = what top-k, then top-p, then min-p leave (sample_cut.h), ties by the lowest ids
//   token = the first id at which the running sum of kept masses exceeds u * their total,
//           u the 53-bit uniform of philox(seed, position); greedy: the lowest id with x = max
//   logp = scale (x_token - max) - ln(total)
//
// A row is cut into blocks of 512 columns. The first pass composes each block, and takes its
// maximum and (where needed) the sum of its masses relative to that maximum, while it is in L1.
// Without filters that is all: the draw walks along the blocks' masses in double, and the block it
// ends in is composed once more. With filters x is kept in float32, 4 V bytes that stay in L2; the
// cut is a value of x, and a last pass sums the kept masses of the blocks that reach it.
//
// Bytes from memory: one read of the logits, 8 V a row for two float32 streams, 1.03 MB for
// V = 128,256. No sort, no softmax, no probabilities in memory. Floor: those bytes over the read
// bandwidth. Measured on one core of an AVX-512 EPYC, logits in the outer cache, V = 128,256, two
// streams, a row: 39 us plain, 38 us (float32) and 33 us (bfloat16) top-k 50, 36 and 30 us with
// top-p 0.9 as well, 60 to 145 us top-p alone, the most where the pivot lies in the bulk.
//
// Rows are independent, blocks are fixed, every sum has a fixed order: a row's result depends
// neither on the other rows nor on the number of threads.

#include "cpu/sample.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <memory>
#include <tuple>
#include <vector>

#include "common/contract.h"
#include "cpu/drivers.h"
#include "cpu/fetch.h"
#include "cpu/isa.h"
#include "cpu/sample_cut.h"
#include "cpu/simd_plain.h"
#include "cpu/subnormals.h"
#include "cpu/tensors.h"

namespace qadapter {
namespace plain {
namespace {
#include "cpu/sample_append.h"
}
#include "cpu/sample_kernel.h"
}  // namespace plain
}  // namespace qadapter

#if QADAPTER_X86
#include "cpu/isa_begin_avx2.h"
#include "cpu/simd_avx2.h"
namespace qadapter {
namespace avx2 {
namespace {
#include "cpu/sample_append_avx2.h"
}
#include "cpu/sample_kernel.h"
}  // namespace avx2
}  // namespace qadapter
#include "cpu/isa_end.h"

#include "cpu/isa_begin_avx512.h"
#include "cpu/simd_avx512.h"
namespace qadapter {
namespace avx512 {
namespace {
#include "cpu/sample_append_avx512.h"
}
#include "cpu/sample_kernel.h"
}  // namespace avx512
}  // namespace qadapter
#include "cpu/isa_end.h"
#endif

namespace qadapter {
namespace {

// The first two words of Philox4x32-10 (Salmon et al. 2011), the upper half of the counter 0.
void philox(uint64_t key, uint64_t counter, uint32_t& w0, uint32_t& w1) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
  uint32_t c2 = 0, c3 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1), c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  w0 = c0, w1 = c1;
}

double uniform(uint64_t key, uint64_t counter) {
  uint32_t w0, w1;
  philox(key, counter, w0, w1);
  return ((w0 >> 5) * 67108864.0 + (w1 >> 6)) * 0x1p-53;
}

struct Drawn {
  int64_t token = -1;
  float logprob = __builtin_nanf("");
};

struct Row {
  SampleColumns in;  // all columns of the row
  bool (*compose)(const SampleColumns&, BlockStats);
  int64_t width;  // bytes of a logit
  double scale;

  // Some blocks of the row, into the row's statistics.
  bool blocks(int64_t first, int64_t count, BlockStats out) const {
    const int64_t column = first * kSampleBlock;
    SampleColumns part = in;
    part.q = static_cast<const char*>(in.q) + column * width;
    if (in.base) part.base = static_cast<const char*>(in.base) + column * width;
    part.length = std::min(count * kSampleBlock, in.length - column);
    part.x += first * in.step;
    return compose(part, {out.max + first, out.groups + first * kSampleGroups, out.sum + first});
  }
};

// A row's first pass is done: cut and draw.
Drawn draw(const SampleTable& table, const Row& input, const SampleRow& row, const Filters& filters,
           bool greedy, double u, std::vector<float>& one, std::vector<float>& two) {
  Cut cut;
  if (filters.any()) cut = Cutter(table, row, one, two).find(filters);

  // Masses of the blocks, relative to the row's maximum; equal tokens go to the first blocks.
  static thread_local std::vector<double> mass;
  static thread_local std::vector<int64_t> equals;
  static thread_local std::vector<float> factor;
  mass.assign(row.blocks, 0.0), equals.assign(row.blocks, 0), factor.resize(row.blocks);
  table.masses(row.stats.max, row.blocks, row.max, row.scale2, factor.data());
  double total = 0.0;
  int64_t quota = cut.quota;
  alignas(64) float left[kSampleBlock + kSampleGroups];  // of a block
  for (int64_t block = 0; block < row.blocks; ++block) {
    const float max = row.stats.max[block];
    if (!(max >= cut.pivot) || !(max >= -FLT_MAX)) continue;
    double sum = row.stats.sum[block];
    if (filters.any()) {
      int64_t equal, count = 0;
      table.gather(row.x + block * kSampleBlock, kSampleBlock, cut.pivot, left, count);
      sum = table.mass_above(left, count, cut.pivot, max, row.scale2, equal);
      if (quota > 0 && equal > 0) {
        equals[block] = std::min(equal, quota);
        quota -= equals[block];
        sum += equals[block] * std::exp2((static_cast<double>(cut.pivot) - max) * row.scale2);
      }
    }
    mass[block] = sum * factor[block];
    total += mass[block];
  }

  // The block, and how far into its masses the draw goes.
  int64_t chosen = 0;
  double rest = 0.0;
  if (greedy) {
    while (row.stats.max[chosen] != row.max) ++chosen;
  } else {
    double sum = 0.0;
    for (int64_t block = 0; block < row.blocks; ++block) {
      if (!(mass[block] > 0)) continue;
      chosen = block, rest = u * total - sum;
      sum += mass[block];
      if (sum > u * total) break;
    }
    rest /= factor[chosen];
  }

  alignas(64) float buffer[kSampleBlock], e[kSampleBlock], groups[kSampleGroups];
  float max, sum;
  const float* x = row.x + chosen * kSampleBlock;
  if (!filters.any()) {
    SampleColumns part = input.in;
    const int64_t column = chosen * kSampleBlock;
    part.q = static_cast<const char*>(part.q) + column * input.width;
    if (part.base) part.base = static_cast<const char*>(part.base) + column * input.width;
    part.length = std::min<int64_t>(kSampleBlock, part.length - column);
    part.sums = false;
    part.x = buffer;
    input.compose(part, {&max, groups, &sum});
    x = buffer;
  }
  int64_t token = 0;
  if (greedy) {
    while (x[token] != row.max) ++token;
  } else {
    table.masses(x, kSampleBlock, row.stats.max[chosen], row.scale2, e);
    int64_t equal = equals[chosen];
    double running = 0.0;
    for (int64_t j = 0; j < kSampleBlock; ++j) {
      const bool kept = x[j] > cut.pivot || (x[j] == cut.pivot && equal-- > 0);
      if (!kept || !(e[j] > 0)) continue;
      token = j;
      running += e[j];
      if (running > rest) break;
    }
  }
  const double logprob = (static_cast<double>(x[token]) - row.max) * row.scale - std::log(total);
  return {chosen * kSampleBlock + token, static_cast<float>(logprob)};
}

// Numbers from the start of a cache line on: vectors of 64 bytes are then in one line, not in two.
class Buffer {
 public:
  float* with_room_for(int64_t count) {
    if (static_cast<int64_t>(memory_.size()) < count + kLine) memory_.resize(count + kLine);
    void* start = memory_.data();
    size_t space = memory_.size() * sizeof(float);
    return static_cast<float*>(std::align(64, count * sizeof(float), start, space));
  }

 private:
  static constexpr int64_t kLine = 16;
  std::vector<float> memory_;
};

const double* doubles(const Tensor& t, int64_t n) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Double && t.is_contiguous() &&
                      (t.numel() == n || t.numel() == 1),
                  "qadapter: expected a contiguous float64 CPU tensor [B] or [1]");
  return static_cast<const double*>(t.const_data_ptr());
}

}  // namespace

std::tuple<Tensor, Tensor> sample(std::optional<Tensor> base_logits, Tensor q_logits, Tensor scale,
                                  Tensor base_weight, Tensor seed, Tensor position, bool greedy,
                                  int64_t top_k, double top_p, double min_p, int64_t isa) {
  const DType dtype = dtype_of(q_logits);
  const int64_t n = q_logits.size(0), vocab = q_logits.size(1);
  const Rows q_rows(q_logits, dtype);
  const Rows b_rows = base_rows(base_logits, q_logits);
  STD_TORCH_CHECK(vocab > 0, "qadapter: expected at least one column of logits");
  const double *scales = doubles(scale, n), *weights = doubles(base_weight, n);
  const int64_t* seeds = int64s(seed, seed.numel());
  const int64_t* positions = int64s(position, position.numel());
  STD_TORCH_CHECK((seed.numel() == n || seed.numel() == 1) &&
                      (position.numel() == n || position.numel() == 1),
                  "qadapter: expected seed and position of one number, or one per row");
  const auto step_of = [n](const Tensor& t) { return t.numel() == n ? 1 : 0; };
  const int64_t scale_step = step_of(scale), weight_step = step_of(base_weight);
  const int64_t seed_step = step_of(seed), position_step = step_of(position);

  const Filters filters{top_k < vocab ? top_k : 0, top_p, min_p};
  const bool keep_x = filters.any();
  const bool sums = filters.top_k == 0 && (top_p < 1.0 || !keep_x);
  const SampleTable& table = QADAPTER_FOR_ISA(choose_isa(isa), sample_table);
  const int64_t blocks = (vocab + kSampleBlock - 1) / kSampleBlock;

  Tensor tokens = torch::stable::new_empty(q_logits, {n}, ScalarType::Long);
  Tensor logprobs = new_floats(q_logits, {n});
  int64_t* tokens_out = static_cast<int64_t*>(tokens.mutable_data_ptr());
  float* logprobs_out = out(logprobs);

  const auto input_of = [&](int64_t row, float* x) {
    const double weight = b_rows.data ? weights[row * weight_step] : 0.0;
    const Mix mix = mix_of(weight);
    Row r;
    r.scale = scales[row * scale_step];
    r.width = bytes_of(dtype);
    r.compose = table.compose[static_cast<int>(dtype)][static_cast<int>(mix)];
    // 0 * inf must not arise where a difference of 0 is scaled
    const double scale2 = std::min(r.scale * kLog2E, static_cast<double>(FLT_MAX));
    r.in = {q_rows.row(row), mix == Mix::none ? nullptr : b_rows.row(row),
            vocab,           static_cast<float>(weight),
            std::max(static_cast<float>(scale2), FLT_MIN),
            sums,            x,
            keep_x ? kSampleBlock : 0};
    return r;
  };
  const auto finish = [&](int64_t row, const Row& input, BlockStats stats, const float* x,
                          std::vector<float>& one, std::vector<float>& two) {
    const float max = *std::max_element(stats.max, stats.max + blocks);
    const SampleRow done{x, stats, blocks, max, input.in.scale2, input.scale};
    if (!(max >= -FLT_MAX)) return;  // no token
    uint64_t key = static_cast<uint64_t>(seeds[row * seed_step]);
    if (seed_step == 0) {
      uint32_t w0, w1;
      philox(key, static_cast<uint64_t>(row), w0, w1);
      key = (uint64_t{w0} << 32) | w1;
    }
    const double u = uniform(key, static_cast<uint64_t>(positions[row * position_step]));
    const Drawn drawn = draw(table, input, done, filters, greedy, u, one, two);
    tokens_out[row] = drawn.token, logprobs_out[row] = drawn.logprob;
  };
  const auto stats_in = [&](float* numbers) {  // the groups first: they are stored as vectors
    float* max = numbers + blocks * kSampleGroups;
    return BlockStats{max, numbers, max + blocks};
  };
  const int64_t stats_size = (blocks * (2 + kSampleGroups) + 15) / 16 * 16;  // whole lines
  const int64_t x_size = keep_x ? blocks * kSampleBlock : kSampleBlock;
  for (int64_t row = 0; row < n; ++row) {
    tokens_out[row] = -1, logprobs_out[row] = __builtin_nanf("");
  }

  // Buffers live as long as their thread: fresh pages would cost more than the passes over them.
  static thread_local std::vector<float> one, two;
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t per_piece = 16, pieces = (blocks + per_piece - 1) / per_piece;
  if (n >= threads || pieces == 1) {
    for_each_piece(n, vocab, [&](int64_t row) {
      [[maybe_unused]] const FlushToZero mode;
      static thread_local Buffer x_buffer, numbers;
      float* x = x_buffer.with_room_for(x_size);
      const Row input = input_of(row, x);
      const BlockStats stats = stats_in(numbers.with_room_for(stats_size));
      if (input.blocks(0, blocks, stats)) finish(row, input, stats, x, one, two);
    });
    return {tokens, logprobs};
  }

  // Fewer rows than threads: the first pass in pieces of rows.
  Buffer x_buffer, numbers_buffer;
  float* x = x_buffer.with_room_for(n * (keep_x ? x_size : 0) + 1);
  float* numbers = numbers_buffer.with_room_for(n * stats_size);
  std::vector<char> broken(n * pieces, 0);
  for_each_piece(n * pieces, per_piece * kSampleBlock, [&](int64_t i) {
    [[maybe_unused]] const FlushToZero mode;
    const int64_t row = i / pieces, first = i % pieces * per_piece;
    alignas(64) float spare[kSampleBlock];
    const Row input = input_of(row, keep_x ? x + row * x_size : spare);
    broken[i] = !input.blocks(first, std::min(per_piece, blocks - first),
                              stats_in(numbers + row * stats_size));
  });
  for_each_piece(n, vocab, [&](int64_t row) {
    [[maybe_unused]] const FlushToZero mode;
    for (int64_t i = row * pieces; i < (row + 1) * pieces; ++i) {
      if (broken[i]) return;
    }
    float* row_x = x + row * (keep_x ? x_size : 0);
    finish(row, input_of(row, row_x), stats_in(numbers + row * stats_size), row_x, one, two);
  });
  return {tokens, logprobs};
}

STABLE_TORCH_LIBRARY_FRAGMENT(qadapter_C, library) {
  library.def(
      "sample(Tensor? base_logits, Tensor q_logits, Tensor scale, Tensor base_weight, Tensor seed, "
      "Tensor position, bool greedy, int top_k, float top_p, float min_p, int isa) "
      "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(qadapter_C, CPU, library) { library.impl("sample", TORCH_BOX(&sample)); }

}  // namespace qadapter
