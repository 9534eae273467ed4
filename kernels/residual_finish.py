"""The end of the forward: a row's merged statistics -> its seven results.

    log_sum = ln total      value = (shift + alpha_tilde log_sum) - alpha_0 base_lse
    q = z_q[a] - center z_b[a]      logp = (z_b[a] - max_b) - log_sum_b, (x_a - shift) / alpha_tilde
    - log_sum

Called at the end of the one-program kernel, and by the kernel below where several programs shared a
row. That one reads 16 bytes per partial pair and writes 28 per row: a few microseconds of launch,
nothing to stream, so no floor to speak of. Not measured on a GPU.
"""

import triton
import triton.language as tl

from qadapter.kernels.common import NEG_INF, NO_ACTION, merge_lanes, mix_streams


@triton.jit
def finish_row(
    row,
    vocab,
    q_row,
    base_row,
    actions_ptr,
    base_lse_ptr,
    base_logp_ptr,
    q_out,
    value_out,
    base_logp_out,
    policy_logp_out,
    base_lse_out,
    shift_out,
    log_sum_out,
    alpha_0,
    alpha_tilde,
    center,
    mix_weight,
    shift,
    total,
    base_shift,
    base_total,
    SIGN: tl.constexpr,
    HAS_BASE: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_LOGP: tl.constexpr,
):
    """Statistics of one row -> its seven results."""
    log_sum = tl.where(shift == NEG_INF, float("nan"), tl.log(total))
    action = tl.load(actions_ptr + row)
    present = action != NO_ACTION
    inside = (action >= 0) & (action < vocab)
    wrong = present & (inside == 0)
    zq = tl.load(q_row + action, mask=inside, other=0.0).to(tl.float32)

    base_log_sum = log_sum
    if HAS_LSE:
        base_lse = tl.load(base_lse_ptr + row)
    else:
        base_log_sum = tl.where(base_shift == NEG_INF, float("nan"), tl.log(base_total))
        base_lse = base_shift + base_log_sum
    if HAS_BASE:
        zb = tl.load(base_row + action, mask=inside, other=0.0).to(tl.float32)
        if HAS_LOGP:
            base_logp = tl.load(base_logp_ptr + row)
        elif HAS_LSE:
            base_logp = zb - base_lse
        else:
            base_logp = (zb - base_shift) - base_log_sum
    else:
        base_logp = tl.load(base_logp_ptr + row)
        zb = base_logp + base_lse

    value = shift + alpha_tilde * log_sum
    value = tl.where(alpha_0 == 0.0, value, value - alpha_0 * base_lse)
    q = tl.where((center == 0.0) | (zq == NEG_INF), zq, zq - center * zb)
    x = mix_streams(zq, zb, mix_weight, SIGN)
    policy_logp = (x - shift) / alpha_tilde - log_sum

    spoilt = wrong | (log_sum != log_sum)
    tl.store(q_out + row, tl.where(present, tl.where(spoilt, float("nan"), q), 0.0))
    tl.store(value_out + row, tl.where(wrong, float("nan"), value))
    tl.store(base_logp_out + row, tl.where(present, tl.where(wrong, float("nan"), base_logp), 0.0))
    tl.store(
        policy_logp_out + row, tl.where(present, tl.where(spoilt, float("nan"), policy_logp), 0.0)
    )
    tl.store(base_lse_out + row, base_lse)
    tl.store(shift_out + row, shift)
    tl.store(log_sum_out + row, log_sum)


@triton.jit(do_not_specialize=["base_stride", "q_stride", "vocab", "splits"])
def residual_fwd_merge_kernel(
    base_ptr,
    q_ptr,
    actions_ptr,
    base_lse_ptr,
    base_logp_ptr,
    q_out,
    value_out,
    base_logp_out,
    policy_logp_out,
    base_lse_out,
    shift_out,
    log_sum_out,
    partial_ptr,
    base_stride,
    q_stride,
    vocab,
    splits,
    alpha_0,
    alpha_tilde,
    center,
    mix_weight,
    scale,
    base_scale,
    SIGN: tl.constexpr,
    HAS_BASE: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_LOGP: tl.constexpr,
    LANES: tl.constexpr,
):
    """The partial pairs of one row -> its results."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    exists = lane < splits
    here = partial_ptr + (row * splits + lane) * 4
    shift = tl.load(here, mask=exists, other=NEG_INF)
    total = tl.load(here + 1, mask=exists, other=0.0)
    base_shift = tl.load(here + 2, mask=exists, other=NEG_INF)
    base_total = tl.load(here + 3, mask=exists, other=0.0)
    shift, total = merge_lanes(shift, total, tl.cast(scale, tl.float32))
    base_shift, base_total = merge_lanes(base_shift, base_total, tl.cast(base_scale, tl.float32))
    finish_row(
        row,
        vocab,
        q_ptr + row * q_stride,
        base_ptr + row * base_stride,
        actions_ptr,
        base_lse_ptr,
        base_logp_ptr,
        q_out,
        value_out,
        base_logp_out,
        policy_logp_out,
        base_lse_out,
        shift_out,
        log_sum_out,
        tl.cast(alpha_0, tl.float32),
        tl.cast(alpha_tilde, tl.float32),
        tl.cast(center, tl.float32),
        tl.cast(mix_weight, tl.float32),
        shift,
        total,
        base_shift,
        base_total,
        SIGN,
        HAS_BASE,
        HAS_LSE,
        HAS_LOGP,
    )
