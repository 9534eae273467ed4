// Instruction sets: which exist, and which one this machine may use.
//
// Vector code is written once per kernel, in a header that is included once per instruction set
// into its own namespace (avx512, avx2, plain), between isa_begin_<set>.h and isa_end.h. Those hold
// the compiler's target pragma, so that no file needs flags of its own and the rest of the library
// stays runnable on the oldest CPU of the platform. isa_each.h does all of it for a kernel of one
// header, and QADAPTER_FOR_ISA takes what the kernel defines from the namespace of a set.
#pragma once

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define QADAPTER_X86 1
// GCC 12 warns some thousand times of undefined vectors that its own intrinsics make on purpose;
// what it has to say about the code here would drown in that.
#pragma GCC diagnostic push
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#define QADAPTER_X86 0
#endif

namespace qadapter {

enum class Isa : int { plain = 0, avx2 = 1, avx512 = 2 };

#if QADAPTER_X86
#define QADAPTER_FOR_ISA(isa, name) \
  ((isa) == Isa::avx512 ? avx512::name : ((isa) == Isa::avx2 ? avx2::name : plain::name))
#else
#define QADAPTER_FOR_ISA(isa, name) (static_cast<void>(isa), plain::name)
#endif

// The best instruction set of the running CPU (and operating system).
inline Isa detect_isa() {
#if QADAPTER_X86
  static const Isa best = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      return Isa::avx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c")) {
      return Isa::avx2;
    }
    return Isa::plain;
  }();
  return best;
#else
  return Isa::plain;
#endif
}

// `wanted` < 0: the best one. Never more than the CPU has.
inline Isa choose_isa(int64_t wanted) {
  const Isa best = detect_isa();
  if (wanted < 0 || wanted >= static_cast<int64_t>(best)) return best;
  return static_cast<Isa>(static_cast<int>(wanted));
}

// Whether vdpbf16ps (AVX512_BF16) may be used: the CPU has it, and no set was asked for.
inline bool choose_bf16_dot(int64_t wanted) {
#if QADAPTER_X86
  static const bool has = [] {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16") != 0;
  }();
  return wanted < 0 && has && detect_isa() == Isa::avx512;
#else
  (void)wanted;
  return false;
#endif
}

}  // namespace qadapter
