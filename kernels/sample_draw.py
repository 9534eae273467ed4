"""The sampler's draw where nothing is filtered: inverse CDF over groups, then inside one of them.

    u      = 53 bits of Philox4x32-10 (key = seed, counter = position)
    token  = first id whose cumulative mass exceeds u * total, in token-id order
    logp   = (x - max) scale - ln total            greedy: the lowest id with x = max

One program per row: the masses of its groups in one tile, one float64 prefix sum over them, one
group of tokens read again, one float64 prefix sum over that. No atomics and no loop.

Bytes: 8 V / GROUP + 4 GROUP per row, 5 KB at V = 128256, GROUP = 256: nothing next to the pass
before. What it costs is one launch and a chain of three dependent loads and four reductions over
4 warps, some 3 us by the latencies. Not measured on a GPU.
"""

import triton
import triton.language as tl

from qadapter.kernels.common import NEG_INF, POS_INF, finite_or_zero
from qadapter.kernels.sample_common import (
    NUMBERS,
    at,
    first_beyond,
    load_groups,
    row_scalars,
    row_uniform,
    store_nothing,
    store_token,
)

_RUNTIME = ["base_stride", "q_stride", "scale_step", "base_weight_step", "position_step", "groups"]
_RUNTIME += NUMBERS


@triton.jit(do_not_specialize=_RUNTIME)
def sample_draw_kernel(
    base_ptr,
    q_ptr,
    scale_ptr,
    base_weight_ptr,
    seed_ptr,
    position_ptr,
    group_max_ptr,
    group_sum_ptr,
    tokens_out,
    logprobs_out,
    base_stride,
    q_stride,
    scale_step,
    base_weight_step,
    position_step,
    vocab,
    groups,
    HAS_BASE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    SHARED_SEED: tl.constexpr,
    GREEDY: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    scale, scale2, weight, legal = row_scalars(
        row, scale_ptr, base_weight_ptr, scale_step, base_weight_step
    )
    index = tl.arange(0, GROUPS)
    exists = index < groups
    group_max = tl.load(group_max_ptr + row * groups + index, mask=exists, other=NEG_INF)
    group_sum = tl.load(group_sum_ptr + row * groups + index, mask=exists, other=0.0)
    maximum = tl.max(group_max, axis=0)
    share = tl.exp2((group_max - finite_or_zero(maximum)) * scale2)
    mass = group_sum.to(tl.float64) * share.to(tl.float64)
    total = tl.sum(mass, axis=0)
    # A NaN is in its group's sum; a row without a token has none.
    if (total != total) | (maximum == NEG_INF) | (maximum == POS_INF) | (legal == 0):
        store_nothing(row, tokens_out, logprobs_out)
        return

    threshold = total
    if GREEDY:
        group = tl.min(tl.where(group_max == maximum, index, GROUPS), axis=0)
    else:
        threshold = row_uniform(row, seed_ptr, position_ptr, position_step, SHARED_SEED) * total
        group, before = first_beyond(mass, threshold, GROUPS)
        threshold = (threshold - before) / at(share.to(tl.float64), group, GROUPS)
    one = group + tl.zeros([1], tl.int32)
    q_row, base_row = q_ptr + row * q_stride, base_ptr + row * base_stride
    x = load_groups(q_row, base_row, one, one >= 0, vocab, weight, HAS_BASE, GROUP)
    x = tl.reshape(x, [GROUP])
    # Relative to the group's own maximum: a group that has mass then has a token with mass.
    top = tl.max(x, axis=0)
    if GREEDY:
        inside = tl.min(tl.where(x == top, tl.arange(0, GROUP), GROUP), axis=0)
    else:
        inside, _before = first_beyond(tl.exp2((x - top) * scale2).to(tl.float64), threshold, GROUP)
    x_token = tl.sum(tl.where(tl.arange(0, GROUP) == inside, x, 0.0), axis=0)
    store_token(row, group, inside, x_token, maximum, scale, total, tokens_out, logprobs_out, GROUP)
