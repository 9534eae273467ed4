// Instruction sets: which exist, and which one this machine may use.
//
// Vector code is written once per kernel, in a header that is included once per instruction set
// into its own namespace (avx512, avx2, plain), between isa_begin_<set>.h and isa_end.h. Those hold
// the compiler's target pragma, so that no file needs flags of its own and the rest of the library
// stays runnable on the oldest CPU of the platform. isa_each.h does all of it for a kernel of one
// header, and QADAPTER_FOR_ISA takes what the kernel defines from the namespace of a set.
//
// The sets are a ladder, each with all that is below it. avx512_bf16 and amx add products of
// bfloat16; kernels without products, or without their own for these, take avx512 there.
#pragma once

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define QADAPTER_X86 1
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
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

enum class Isa : int { plain = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };

#if QADAPTER_X86
#define QADAPTER_FOR_ISA(isa, name) \
  ((isa) >= Isa::avx512 ? avx512::name : ((isa) == Isa::avx2 ? avx2::name : plain::name))
#else
#define QADAPTER_FOR_ISA(isa, name) (static_cast<void>(isa), plain::name)
#endif

#if QADAPTER_X86
// Whether the CPU has AMX with bfloat16 products and this process may use it. Linux wants to be
// asked before the first use, once for all threads: it then makes room for 8 KB of tiles.
inline bool may_use_amx() {
#if defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;  // cpuid 7, edx
  constexpr long kRequestPermission = 0x1023;             // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;                          // XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (~d & (kBf16 | kTile)) != 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// The best instruction set of the running CPU (and operating system).
inline Isa detect_isa() {
#if QADAPTER_X86
  static const Isa best = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      if (!__builtin_cpu_supports("avx512bf16")) return Isa::avx512;
      return may_use_amx() ? Isa::amx : Isa::avx512_bf16;
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

// Whether the core is AMD's, for what was measured there to want other fetching.
inline bool is_amd() {
#if QADAPTER_X86
  static const bool amd = [] {
    __builtin_cpu_init();
    return __builtin_cpu_is("amd") != 0;
  }();
  return amd;
#else
  return false;
#endif
}

// `wanted` < 0: the best one. Never more than the CPU has.
inline Isa choose_isa(int64_t wanted) {
  const Isa best = detect_isa();
  if (wanted < 0 || wanted >= static_cast<int64_t>(best)) return best;
  return static_cast<Isa>(static_cast<int>(wanted));
}

}  // namespace qadapter
