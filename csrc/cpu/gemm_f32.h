// What the products of linear_fwd compute with where there is nothing better: float32
// multiply-adds. Included once per instruction set, inside namespace qadapter::<set>, hence no
// include guard.

namespace {

struct Product {
  using F = Simd::F;
  using Element = float;                                   // of packed operands
  static constexpr int kStep = 1;                          // elements in a dword
  static constexpr int kNv = 2;                            // vectors of columns of a register block
  static constexpr int kTile = 128;                        // columns of the vocabulary at a time

  static inline F multiply_add(F acc, F a, F b) { return Simd::fma(a, b, acc); }

  // kWidth dwords of one row of W
  template <class T>
  static inline F load(const T* p) {
    return Simd::load1(p);
  }
  // kWidth columns of kStep rows of W
  template <class T>
  static inline void interleave(const T* const* rows, int64_t at, float* out) {
    Simd::store1(out, Simd::load1(rows[0] + at));
  }
  static inline void put(float* out, F a, F b) {
    Simd::store1(out, a);
    Simd::store1(out + Simd::kWidth, b);
  }
  static inline Element round(float x) { return x; }
};

}  // namespace
