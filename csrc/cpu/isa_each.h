// Includes the header that QADAPTER_KERNEL names once per instruction set, compiled for that set,
// inside namespace qadapter::<set>. No include guard on purpose.
#include "cpu/isa.h"
#include "cpu/simd_plain.h"

namespace qadapter {
namespace plain {
#include QADAPTER_KERNEL
}  // namespace plain
}  // namespace qadapter

#if QADAPTER_X86
#include "cpu/isa_begin_avx2.h"
#include "cpu/simd_avx2.h"
namespace qadapter {
namespace avx2 {
#include QADAPTER_KERNEL
}  // namespace avx2
}  // namespace qadapter
#include "cpu/isa_end.h"

#include "cpu/isa_begin_avx512.h"
#include "cpu/simd_avx512.h"
namespace qadapter {
namespace avx512 {
#include QADAPTER_KERNEL
}  // namespace avx512
}  // namespace qadapter
#include "cpu/isa_end.h"
#endif
#undef QADAPTER_KERNEL
