"""One chunk of head products: float32 rows of h W^T in, row statistics and 16-bit weights p out.

    z = logit_scale * acc + bias         z = cap tanh(z / cap) where the head is soft-capped
    x = z_q + m z_b                      slope = logit_scale, or logit_scale (1 - tanh^2)
    sweep 1   (shift, log_sum) of x / alpha_tilde, those of z_b, and what the action's column holds
    sweep 2   p_j = exp2((x_j - shift) scale) slope_j / total, the action's column 0

One program per row, so both sweeps read what the same program reads: no second kernel, no partial
pairs. Chunks have a thousand rows and more, which fills a GPU without sharing rows.

p is written into the row it comes from, in the weight's dtype. With 16 bits the row of V' = stride
columns is 4 V' bytes long, and p takes its upper half: column j of p lies where the float32 columns
V' / 2 + j / 2 are. Sweep 2 goes from the last tile to the first, so a tile at columns [c, c + T) is
written to columns that start at V' / 2 + c / 2 >= c: that is either a tile read before or the tile
in hand, never one that is still to be read. One barrier between a tile's loads and its stores is
all this takes: other warps may not have loaded their part of the tile yet. Going down, sweep 2 also
begins with what sweep 1 has left in the L2 cache.

The row stride is a multiple of 32 columns, so every row starts on a 128-byte boundary whatever V
is; the last tile is masked by whole vectors, which keeps its accesses wide, and what it reads of
the padding is replaced.

Bytes per element: 4 + 4 + 2 (read, read again, write) with 16-bit p, of which the second read hits
the L2 in part: 6 is the floor, 10 what to expect. Float32 p: 12. Statistics alone: 4. Two streams:
18. At 3.0 TB/s and V = 128256 a chunk of 2048 rows takes 0.53 ms for 6 bytes, 0.88 ms for 10, next
to 2.7 ms for one of its products (D = 4096, 790 TFLOP/s). Not measured on a GPU.
"""

import triton
import triton.language as tl

from qadapter.kernels.common import (
    NEG_INF,
    finite_or_zero,
    merge_lanes,
    mix_streams,
    online_update,
)

VEC = 4  # float32 values of one 128-bit load
ROW_PADDING = 32


@triton.jit
def soft_cap(s, softcap, cap_inverse):
    """cap tanh(s / cap), and its derivative 1 - tanh^2 without the cancellation of that form.

    Where 1 - exp(-2 |y|) would cancel, the series up to y^9, which is exact there to 1e-8.
    """
    y = s * cap_inverse
    size = tl.abs(y)
    t = tl.exp2(size * -2.8853900817779268)  # exp(-2 |y|)
    square = y * y
    series = 2.0 / 15.0 + square * (-17.0 / 315.0 + square * (62.0 / 2835.0))
    series = size * (1.0 + square * (-1.0 / 3.0 + square * series))
    tanh = tl.where(size < 0.25, series, (1.0 - t) / (1.0 + t))
    return softcap * tl.where(y < 0.0, -tanh, tanh), 4.0 * t / ((1.0 + t) * (1.0 + t))


@triton.jit
def head_logit(acc, bias, logit_scale, softcap, cap_inverse, CAPPED: tl.constexpr):
    """(z, slope) of a product h . W_j; the bias has been scaled."""
    z = acc * logit_scale + bias
    slope = logit_scale
    if CAPPED:
        z, slope = soft_cap(z, softcap, cap_inverse)
        slope = slope * logit_scale
    return z, slope


@triton.jit(do_not_specialize=["first_row", "stride", "vocab"])
def linear_rows_kernel(
    z_ptr,
    zb_ptr,
    p_ptr,
    bias_ptr,
    actions_ptr,
    shift_out,
    log_sum_out,
    x_action_out,
    z_action_out,
    slope_out,
    base_shift_out,
    base_log_sum_out,
    base_action_out,
    first_row,
    stride,
    vocab,
    mix_weight,
    scale,
    base_scale,
    logit_scale,
    softcap,
    cap_inverse,
    SIGN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    SUM_BASE: tl.constexpr,
    WRITE: tl.constexpr,
    P_PER_FLOAT: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Row `program_id` of the chunk, which is row first_row + program_id of the outputs."""
    # Outside torch's own launcher Python floats may arrive as float64.
    mix_weight = tl.cast(mix_weight, tl.float32)
    scale = tl.cast(scale, tl.float32)
    base_scale = tl.cast(base_scale, tl.float32)
    logit_scale = tl.cast(logit_scale, tl.float32)
    softcap = tl.cast(softcap, tl.float32)
    cap_inverse = tl.cast(cap_inverse, tl.float32)

    row = tl.program_id(0).to(tl.int64)
    # 128-bit accesses hang on these hints; inside a helper function they would be lost.
    z_row = tl.multiple_of(z_ptr + row * stride, 16)
    zb_row = tl.multiple_of(zb_ptr + row * stride, 16)
    p_row = tl.multiple_of(p_ptr + row * stride * P_PER_FLOAT, 16)

    last = (vocab + VEC - 1) // VEC
    whole = vocab // (ROWS * VEC) * ROWS
    lane = tl.arange(0, ROWS)
    within = tl.arange(0, VEC)

    shift = tl.full([ROWS], NEG_INF, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    base_shift = tl.full([ROWS], NEG_INF, tl.float32)
    base_total = tl.zeros([ROWS], tl.float32)
    for start in range(0, whole, ROWS):
        offsets = (start + lane)[:, None] * VEC + within[None, :]
        bias = 0.0
        if HAS_BIAS:
            bias = tl.load(bias_ptr + offsets)
        z = tl.load(z_row + offsets)
        x, _ = head_logit(z, bias, logit_scale, softcap, cap_inverse, CAPPED)
        if SIGN != 0:
            zb = tl.load(zb_row + offsets)
            zb, _ = head_logit(zb, bias, logit_scale, softcap, cap_inverse, CAPPED)
            x = mix_streams(x, zb, mix_weight, SIGN)
            if SUM_BASE:
                base_shift, base_total = online_update(zb, base_scale, base_shift, base_total)
        shift, total = online_update(x, scale, shift, total)
    if whole < last:
        # Loads masked by whole vectors; the padding in the last of them is no token.
        offsets = (whole + lane)[:, None] * VEC + within[None, :]
        exists = (whole + lane < last)[:, None]
        token = offsets < vocab
        bias = 0.0
        if HAS_BIAS:
            bias = tl.load(bias_ptr + offsets, mask=exists, other=0.0)
        z = tl.load(z_row + offsets, mask=exists, other=0.0)
        x, _ = head_logit(z, bias, logit_scale, softcap, cap_inverse, CAPPED)
        if SIGN != 0:
            zb = tl.load(zb_row + offsets, mask=exists, other=0.0)
            zb, _ = head_logit(zb, bias, logit_scale, softcap, cap_inverse, CAPPED)
            x = mix_streams(x, zb, mix_weight, SIGN)
            if SUM_BASE:
                zb = tl.where(token, zb, NEG_INF)
                base_shift, base_total = online_update(zb, base_scale, base_shift, base_total)
        x = tl.where(token, x, NEG_INF)
        shift, total = online_update(x, scale, shift, total)
    shift, total = merge_lanes(shift, total, scale)

    # What the action's column holds, read before sweep 2 destroys it.
    row_out = first_row + row
    action = tl.load(actions_ptr + row_out)
    inside = (action >= 0) & (action < vocab)
    column = tl.where(inside, action, 0)
    bias_action = 0.0
    if HAS_BIAS:
        bias_action = tl.load(bias_ptr + column)
    x_action, slope_action = head_logit(
        tl.load(z_row + column), bias_action, logit_scale, softcap, cap_inverse, CAPPED
    )
    tl.store(z_action_out + row_out, x_action)
    tl.store(slope_out + row_out, slope_action)
    if SIGN != 0:
        base_action, _base_slope = head_logit(
            tl.load(zb_row + column), bias_action, logit_scale, softcap, cap_inverse, CAPPED
        )
        x_action = mix_streams(x_action, base_action, mix_weight, SIGN)
        tl.store(base_action_out + row_out, base_action)
        if SUM_BASE:
            base_shift, base_total = merge_lanes(base_shift, base_total, base_scale)
            base_log_sum = tl.where(base_shift == NEG_INF, float("nan"), tl.log(base_total))
            tl.store(base_shift_out + row_out, base_shift)
            tl.store(base_log_sum_out + row_out, base_log_sum)
    tl.store(x_action_out + row_out, x_action)
    tl.store(shift_out + row_out, shift)
    # A row without a token is NaN: its total is 0, and below 0 / 0 makes NaN of its p as well.
    tl.store(log_sum_out + row_out, tl.where(shift == NEG_INF, float("nan"), tl.log(total)))

    if WRITE:
        held_out = tl.where(inside, action, -1).to(tl.int32)
        origin = finite_or_zero(shift)
        share = 1.0 / total
        tl.debug_barrier()  # the action's column: every warp has it now
        if whole < last:
            offsets = (whole + lane)[:, None] * VEC + within[None, :]
            exists = (whole + lane < last)[:, None]
            bias = 0.0
            if HAS_BIAS:
                bias = tl.load(bias_ptr + offsets, mask=exists, other=0.0)
            z = tl.load(z_row + offsets, mask=exists, other=0.0)
            x, slope = head_logit(z, bias, logit_scale, softcap, cap_inverse, CAPPED)
            if SIGN != 0:
                zb = tl.load(zb_row + offsets, mask=exists, other=0.0)
                zb, _ = head_logit(zb, bias, logit_scale, softcap, cap_inverse, CAPPED)
                x = mix_streams(x, zb, mix_weight, SIGN)
            p = tl.exp2((x - origin) * scale) * (slope * share)
            p = tl.where(offsets == held_out, 0.0, p)
            if P_PER_FLOAT != 1:
                tl.debug_barrier()  # this tile's loads, in every warp, before its stores
            tl.store(p_row + offsets, p.to(p_ptr.dtype.element_ty), mask=exists)
        for done in range(0, whole, ROWS):
            offsets = (whole - ROWS - done + lane)[:, None] * VEC + within[None, :]
            bias = 0.0
            if HAS_BIAS:
                bias = tl.load(bias_ptr + offsets)
            z = tl.load(z_row + offsets)
            x, slope = head_logit(z, bias, logit_scale, softcap, cap_inverse, CAPPED)
            if SIGN != 0:
                zb = tl.load(zb_row + offsets)
                zb, _ = head_logit(zb, bias, logit_scale, softcap, cap_inverse, CAPPED)
                x = mix_streams(x, zb, mix_weight, SIGN)
            p = tl.exp2((x - origin) * scale) * (slope * share)
            p = tl.where(offsets == held_out, 0.0, p)
            if P_PER_FLOAT != 1:
                tl.debug_barrier()
            tl.store(p_row + offsets, p.to(p_ptr.dtype.element_ty))


def chunk_tile(vocab: int) -> tuple[int, int]:
    """(ROWS, num_warps): two vectors a thread, 512 threads from V = 4096 on.

    Many threads on few rows rather than the other way round: the fewer rows are under way, the more
    of each is still in the L2 cache for the second sweep.
    """
    rows = min(1024, max(64, triton.next_power_of_2(triton.cdiv(vocab, VEC))))
    return rows, rows // 64
