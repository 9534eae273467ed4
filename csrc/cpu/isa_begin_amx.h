// Everything up to isa_end.h is compiled for AVX-512 (F, BW, DQ, VL), its bfloat16 dot product and
// AMX's. No include guard on purpose.
#if defined(__clang__)
#pragma clang attribute push(                                                                   \
    __attribute__((target(                                                                      \
        "amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"))),     \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target(                                                                             \
    "amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,"            \
    "prefer-vector-width=512")
#endif
