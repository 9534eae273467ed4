"""The sampler's one pass over the logits: maximum and sum of every group of GROUP tokens.

    x_j   = z_q[j] + base_weight z_b[j]      c_j = scale x_j
    max_g = max_{j in g} x_j                 sum_g = sum_{j in g} exp2((x_j - max_g) scale log2 e)

Grid (row, tile); a tile is 2048 tokens, 16 a thread, so that 64 bytes of loads are in flight per
thread and one row is enough to keep 63 processors busy at V = 128256. Sums are relative to their
group's own maximum, so no program waits for another, and a NaN or +inf stays in its group's sum.

Two sizes of group: 256 tokens where nothing is filtered (in 16 bits one warp reads one group), and
32 where filters need to know which groups can hold a token that they keep.

Bytes: 4 V per row for two 16-bit streams, and 8 V / GROUP written: 32.8 MB + 0.3 MB (GROUP = 256)
or 2.1 MB (GROUP = 32) at B = 64, V = 128256; floor 11 us at 3.0 TB/s. About 20 instructions per
token, one of them exp2: 5 us of issue slots on 132 processors, hidden behind the loads.
Not measured on a GPU.
"""

import triton
import triton.language as tl

from qadapter.kernels.common import finite_or_zero
from qadapter.kernels.sample_common import NUMBERS, load_groups, row_scalars

TILE = 2048
WARPS = 4

_RUNTIME = [*NUMBERS[:2], "base_stride", "q_stride", "scale_step", "base_weight_step", "groups"]


@triton.jit(do_not_specialize=_RUNTIME)
def sample_blocks_kernel(
    base_ptr,
    q_ptr,
    scale_ptr,
    base_weight_ptr,
    group_max_out,
    group_sum_out,
    base_stride,
    q_stride,
    scale_step,
    base_weight_step,
    vocab,
    groups,
    HAS_BASE: tl.constexpr,
    ALIGNED: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    _scale, scale2, weight, _legal = row_scalars(
        row, scale_ptr, base_weight_ptr, scale_step, base_weight_step
    )
    q_row = q_ptr + row * q_stride
    base_row = base_ptr + row * base_stride
    if ALIGNED:
        # 128-bit accesses hang on these hints; inside a helper function they would be lost.
        q_row = tl.multiple_of(q_row, 16)
        base_row = tl.multiple_of(base_row, 16)
    group = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    live = group < groups
    x = load_groups(q_row, base_row, group, live, vocab, weight, HAS_BASE, GROUP)
    maximum = tl.max(x, axis=1)
    total = tl.sum(tl.exp2((x - finite_or_zero(maximum)[:, None]) * scale2), axis=1)
    here = row * groups + group
    tl.store(group_max_out + here, maximum, mask=live)
    tl.store(group_sum_out + here, total, mask=live)
