// Register-blocked products on packed operands, in terms of Simd and Product. Included once per
// instruction set, after gemm_pack.h, inside namespace qadapter::<set>, hence no include guard and
// no includes.
//
// One step of a block of MR rows and kNr columns is MR broadcasts, kNv loads and MR * kNv
// multiply-adds: 14 x 2 vectors take 28 of AVX-512's 32 registers, and 28 cycles of the one
// multiply-add a cycle that Zen 4 does, against 9 for the loads. The right panel streams from the
// second-level cache at 128 bytes in that time. How an element is summed depends on k alone, not on
// the block it is in.

namespace {

constexpr int kMr = Simd::kWidth == 16 ? 14 : 6;  // rows of a register block
constexpr int kRowUnit = 1;                       // blocks have a multiple of this many rows
constexpr int kLeftSteps = 1;                     // steps of a row that lie together
constexpr int kMostRows = 256;                    // rows that go through the vocabulary together
constexpr int kDepth = 1024;  // steps of a packed panel of W; logits are added up over more
constexpr int kChain = 256;

struct Tiles {};  // nothing to set up

// c = a b, or c += a b; c has `stride` floats from row to row. Sums are put down every kChain
// steps: one chain of rounded additions over a long row of W would lose digits.
template <int MR, Left LEFT>
void multiply(int64_t k, const float* a, const float* b, float* c, int64_t stride, bool add,
              Ahead ahead) {
  using F = Simd::F;
  constexpr int kNv = Product::kNv;
  for (int64_t start = 0; start < k; start += kChain, add = true) {
    F acc[MR][kNv];
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      for (int j = 0; j < kNr; j += 16) __builtin_prefetch(c + i * stride + j, 1);
#pragma GCC unroll 4
      for (int j = 0; j < kNv; ++j) acc[i][j] = Simd::zero();
    }
    for (int64_t steps = std::min<int64_t>(kChain, k - start); steps > 0; --steps) {
      F right[kNv];
#pragma GCC unroll 4
      for (int j = 0; j < kNv; ++j) right[j] = Simd::load1(b + j * Simd::kWidth);
      b += kNr;
      __builtin_prefetch(ahead.at, 0, 2);  // never faults, wherever it ends up
      ahead.at += ahead.pace;
      if (LEFT == Left::packed) __builtin_prefetch(a + 256);
      for (int j = 0; j < kNr; j += 16) __builtin_prefetch(b + 8 * kNr + j);
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        const F left = Simd::set1(LEFT == Left::packed ? a[i] : a[i * kTileStride]);
#pragma GCC unroll 4
        for (int j = 0; j < kNv; ++j) {
          acc[i][j] = Product::multiply_add(acc[i][j], left, right[j]);
        }
      }
      a += LEFT == Left::packed ? MR : 1;
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kNv; ++j) {
        float* at = c + i * stride + j * Simd::kWidth;
        if (add) acc[i][j] = Simd::add(Simd::load1(at), acc[i][j]);
        Simd::store1(at, acc[i][j]);
      }
    }
  }
}

// multiply for 1 .. kMr rows
template <Left LEFT>
struct Multiplies {
  decltype(&multiply<1, LEFT>) of[kMr + 1] = {};

  constexpr Multiplies() { fill<1>(); }
  template <int MR>
  constexpr void fill() {
    of[MR] = &multiply<MR, LEFT>;
    if constexpr (MR < kMr) fill<MR + 1>();
  }
};

template <Left LEFT>
void multiply_rows(int rows, int64_t k, const float* a, const float* b, float* c, int64_t stride,
                   bool add, Ahead ahead) {
  static constexpr Multiplies<LEFT> kernels{};
  kernels.of[rows](k, a, b, c, stride, add, ahead);
}

}  // namespace
