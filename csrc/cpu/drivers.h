// How a [rows, vocab] problem is cut into pieces of work, and how threads take them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace qadapter {

// Rows are cut along the vocabulary only when there are few of them. The cut depends on the shape
// alone, never on the number of threads, so that results do not depend on it either.
struct Pieces {
  int64_t rows, per_row, length;  // the last piece of a row may be shorter

  Pieces(int64_t n, int64_t vocab) : rows(n) {
    constexpr int64_t kWanted = 256, kShortest = 8192;
    const int64_t cuts = n > 0 ? std::min(vocab / kShortest, kWanted / n) : 1;
    per_row = std::max<int64_t>(1, cuts);
    length = (vocab + per_row - 1) / per_row;
    length = (length + 63) / 64 * 64;
    per_row = std::max<int64_t>(1, (vocab + length - 1) / length);
  }
  int64_t count() const { return rows * per_row; }
};

// Calls f(piece) for every piece. Threads take pieces as they get free: cores that are slower, or
// busy with something else, then do not hold up the others. torch.set_num_threads rules.
template <class F>
void for_each_piece(int64_t count, int64_t elements_per_piece, const F& f) {
  constexpr int64_t kWorthwhile = 16384;  // elements, to start a thread or to take a turn for
  const int64_t most = std::max<int64_t>(1, count * elements_per_piece / kWorthwhile);
  const int64_t threads =
      std::min<int64_t>({count, most, static_cast<int64_t>(torch::stable::get_num_threads())});
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
  const int64_t batch = kWorthwhile / std::max<int64_t>(1, elements_per_piece) + 1;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (;;) {
        const int64_t first = next.fetch_add(batch, std::memory_order_relaxed);
        if (first >= count) break;
        for (int64_t i = first; i < std::min(first + batch, count); ++i) f(i);
      }
    }
  });
}

}  // namespace qadapter
