// The vector code of lora_add. Included inside a namespace that has Simd, behind
// rows_linear_sums.h and rows_linear_kernel.h, once per instruction set.

namespace {

// h = x A^T of rows [first, end).
template <class X, class W>
void lora_low(const LoraJob& job, int64_t first, int64_t end, float* h) {
  using All = Tiles<X, W>;
  const int64_t rows = end - first, stride = lora_stride(job.r);
  const W* a = reinterpret_cast<const W*>(job.a);
  for (int64_t j = 0; j < job.r; j += kRowsW) {
    const W* w[kRowsW];
    for (int r = 0; r < kRowsW; ++r) {
      w[r] = a + (j + r < job.r ? j + r : job.r - 1) * job.a_stride;
    }
    for (int64_t i = 0; i < rows; i += All::kMost) {
      const int64_t n = rows - i < All::kMost ? rows - i : All::kMost;
      const X* x[All::kMost] = {};
      float sums[All::kMost][kRowsW];
      for (int64_t c = 0; c < n; ++c) x[c] = reinterpret_cast<const X*>(job.x.row(first + i + c));
      All::run(n, x, w, job.k, Ahead{nullptr, 0}, sums);
      for (int64_t c = 0; c < n; ++c) {
        std::memcpy(h + (i + c) * stride + j, sums[c], sizeof(sums[c]));
      }
    }
  }
  if (job.low) {
    for (int64_t i = 0; i < rows; ++i) {
      std::memcpy(job.low + (first + i) * job.r, h + i * stride, job.r * sizeof(float));
    }
  }
}

// Columns [o, o + kWidth) of B^T and `depth` of its rows from j on: rows of B become columns, which
// lie across the lanes. Those past the last are not used.
template <class W>
inline void turned_block(const LoraJob& job, int64_t o, int64_t j, int64_t depth, F* block) {
  constexpr int kWidth = Simd::kWidth;
  const W* b = reinterpret_cast<const W*>(job.b);
  const int64_t last = (job.o - 1) * job.b_stride + job.r;  // elements of B
  if ((o + kWidth - 1) * job.b_stride + j + kWidth <= last) {
    // elements behind the row's end are read, but not used
    for (int c = 0; c < kWidth; ++c) block[c] = Simd::load1(b + (o + c) * job.b_stride + j);
  } else {
    for (int c = 0; c < kWidth; ++c) {
      W padded[kWidth] = {};
      if (o + c < job.o) std::memcpy(padded, b + (o + c) * job.b_stride + j, depth * sizeof(W));
      block[c] = Simd::load1(padded);
    }
  }
  Simd::transpose(block);
}

// Columns [from, to) of rows [first, end) of out += scaling h B^T.
template <class X, class W>
void lora_delta(const LoraJob& job, int64_t first, int64_t end, const float* h, int64_t from,
                int64_t to) {
  constexpr int kWidth = Simd::kWidth;
  const int64_t rows = end - first, stride = lora_stride(job.r);
  for (int64_t o = from; o < to; o += kWidth) {
    const int columns = static_cast<int>(to - o < kWidth ? to - o : kWidth);
    alignas(64) float delta[kLoraRows][kWidth] = {};
    for (int64_t j = 0; j < job.r; j += kWidth) {
      const int64_t depth = job.r - j < kWidth ? job.r - j : kWidth;
      F block[kWidth];
      turned_block<W>(job, o, j, depth, block);
      for (int64_t i = 0; i < rows; ++i) {
        F sum = Simd::load1(delta[i]);
        for (int64_t d = 0; d < depth; ++d) {
          sum = Simd::fma(Simd::set1(h[i * stride + j + d]), block[d], sum);
        }
        Simd::store1(delta[i], sum);
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      X* out = reinterpret_cast<X*>(job.out.row(first + i)) + o;
      const auto add = [&](int n) {  // with n known, it becomes vectors
        for (int c = 0; c < n; ++c) narrow(widen(out[c]) + job.scaling * delta[i][c], out + c);
      };
      if (columns == kWidth) {
        add(kWidth);
      } else {
        add(columns);
      }
    }
  }
}

// B^T in blocks of kWidth columns, [block][r][kWidth], for lora_rows.
template <class W>
void lora_pack(const LoraJob& job, float* packed) {
  constexpr int kWidth = Simd::kWidth;
  for (int64_t o = 0; o < lora_columns(job.o); o += kWidth, packed += job.r * kWidth) {
    for (int64_t j = 0; j < job.r; j += kWidth) {
      const int64_t depth = job.r - j < kWidth ? job.r - j : kWidth;
      F block[kWidth];
      turned_block<W>(job, o, j, depth, block);
      for (int64_t d = 0; d < depth; ++d) Simd::store1(packed + (j + d) * kWidth, block[d]);
    }
  }
}

// ROWS rows of out += scaling h B^T, along them: a tile of ROWS by two vectors stays in registers,
// and out is read and written in order.
template <class X, int ROWS>
void lora_stripe(const LoraJob& job, const float* packed, int64_t first, const float* h) {
  constexpr int kWidth = Simd::kWidth, kColumns = 2 * kWidth;
  const int64_t stride = lora_stride(job.r), block = job.r * kWidth;
  const F scaling = Simd::set1(job.scaling);
  X* rows[ROWS];
  for (int i = 0; i < ROWS; ++i) rows[i] = reinterpret_cast<X*>(job.out.row(first + i));
  for (int64_t o = 0; o < job.o; o += kColumns, packed += 2 * block) {
    F sums[ROWS][2];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) sums[i][0] = sums[i][1] = Simd::zero();
    for (int64_t d = 0; d < job.r; ++d) {
      const F a = Simd::load1(packed + d * kWidth), b = Simd::load1(packed + block + d * kWidth);
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) {
        const F factor = Simd::set1(h[i * stride + d]);
        sums[i][0] = Simd::fma(factor, a, sums[i][0]);
        sums[i][1] = Simd::fma(factor, b, sums[i][1]);
      }
    }
    const auto add = [&](int i, X* out) {
      put_all(Simd::fma(scaling, sums[i][0], Simd::load1(out)), out);
      put_all(Simd::fma(scaling, sums[i][1], Simd::load1(out + kWidth)), out + kWidth);
    };
    if (o + kColumns <= job.o) {
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) add(i, rows[i] + o);
    } else {
      const int64_t bytes = (job.o - o) * sizeof(X);
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) {
        X padded[kColumns] = {};
        std::memcpy(padded, rows[i] + o, bytes);
        add(i, padded);
        std::memcpy(rows[i] + o, padded, bytes);
      }
    }
  }
}

// lora_delta of all columns for many rows, with what lora_pack has made: the same sums.
template <class X>
void lora_rows(const LoraJob& job, const float* packed, int64_t first, int64_t end,
               const float* h) {
  constexpr int kRows = Simd::kWidth == 16 ? 8 : 4;
  const int64_t stride = lora_stride(job.r);
  for (; first + kRows <= end; first += kRows, h += kRows * stride) {
    lora_stripe<X, kRows>(job, packed, first, h);
  }
  for (; first < end; ++first, h += stride) lora_stripe<X, 1>(job, packed, first, h);
}

template <class X, class W>
constexpr LoraTable lora_functions() {
  return {&lora_low<X, W>, &lora_delta<X, W>, &lora_pack<W>, &lora_rows<X>};
}

// Sums stay in registers over all rows: kDeep rows of out, two vectors wide.
template <class X>
void outer_columns(const OuterJob& job, int64_t first, int64_t end) {
  constexpr int kWidth = Simd::kWidth, kDeep = kWidth == 16 ? 8 : 4, kColumns = 2 * kWidth;
  constexpr int64_t kAhead = 16;  // rows: each is another line, and may come from memory
  for (int64_t c = first; c < end; c += kColumns) {
    const int64_t columns = end - c < kColumns ? end - c : kColumns;
    for (int64_t j = 0; j < job.r; j += kDeep) {
      const int deep = static_cast<int>(job.r - j < kDeep ? job.r - j : kDeep);
      F sums[kDeep][2];
#pragma GCC unroll 8
      for (int d = 0; d < kDeep; ++d) sums[d][0] = sums[d][1] = Simd::zero();
      for (int64_t i = 0; i < job.x.count; ++i) {
        const X* x = reinterpret_cast<const X*>(job.x.row(i)) + c;
        X padded[kColumns] = {};
        if (columns < kColumns) {
          std::memcpy(padded, x, columns * sizeof(X));
          x = padded;
        }
        __builtin_prefetch(job.x.row(i + kAhead) + c * sizeof(X));  // never faults, wherever it is
        const F a = Simd::load1(x), b = Simd::load1(x + kWidth);
        const float* low = job.low + i * job.r + j;
#pragma GCC unroll 8
        for (int d = 0; d < kDeep; ++d) {
          const F factor = Simd::set1(low[d < deep ? d : 0]);
          sums[d][0] = Simd::fma(factor, a, sums[d][0]);
          sums[d][1] = Simd::fma(factor, b, sums[d][1]);
        }
      }
      const F scaling = Simd::set1(job.scaling);
#pragma GCC unroll 8
      for (int d = 0; d < kDeep; ++d) {  // all of them: an index that is not constant is memory's
        if (d >= deep) break;
        float whole[kColumns];
        Simd::store1(whole, Simd::mul(scaling, sums[d][0]));
        Simd::store1(whole + kWidth, Simd::mul(scaling, sums[d][1]));
        std::memcpy(job.out + (j + d) * job.k + c, whole, columns * sizeof(float));
      }
    }
  }
}

}  // namespace
