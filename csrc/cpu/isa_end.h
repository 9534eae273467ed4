// Ends what an isa_begin_<set>.h began. No include guard on purpose.
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
