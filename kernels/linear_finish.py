"""The small ends of the linear operation: the action's logits by dot products, and the results.

    z[a]    = cap(logit_scale * (h . W_a + bias_a)), both streams, sums in float32
    value   = (shift + alpha_tilde log_sum) - alpha_0 base_lse
    q       = z_q[a] - center z_b[a]     policy_logp = (x_a - shift) / alpha_tilde - log_sum
    p_a     = exp(policy_logp)           base_logp = (z_b[a] - base_shift) - base_log_sum

The dots serve the calls in which the base's head product is not taken: D-long, one program per row,
both streams by the same instructions, so that equal streams give q = 0 exactly. They read 6 D bytes
per row in 16 bits (N = 8192, D = 4096: 201 MB, 67 us at 3.0 TB/s, 0.2 % of the products); finishing
reads and writes some 70 bytes a row, a launch and nothing to stream. Not measured on a GPU.
"""

import triton
import triton.language as tl
from torch import Tensor

from qadapter.kernels.common import NEG_INF, NO_ACTION
from qadapter.kernels.linear_chunk import head_logit
from qadapter.kernels.linear_head import Head

DOT_BLOCK = 1024
FINISH_BLOCK = 256


@triton.jit(do_not_specialize=["vocab"])
def action_logits_kernel(
    q_ptr,
    base_ptr,
    weight_ptr,
    bias_ptr,
    actions_ptr,
    q_action_out,
    base_action_out,
    q_stride,
    base_stride,
    weight_stride,
    dim,
    vocab,
    logit_scale,
    softcap,
    cap_inverse,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    action = tl.load(actions_ptr + row)
    action = tl.where((action >= 0) & (action < vocab), action, 0)
    q_row = q_ptr + row * q_stride
    base_row = base_ptr + row * base_stride
    weight_row = weight_ptr + action * weight_stride
    q_sum = tl.zeros([BLOCK], tl.float32)
    base_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, dim, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        exists = columns < dim
        w = tl.load(weight_row + columns, mask=exists, other=0.0).to(tl.float32)
        q_sum += w * tl.load(q_row + columns, mask=exists, other=0.0).to(tl.float32)
        base_sum += w * tl.load(base_row + columns, mask=exists, other=0.0).to(tl.float32)
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + action)
    logit_scale = tl.cast(logit_scale, tl.float32)
    softcap = tl.cast(softcap, tl.float32)
    cap_inverse = tl.cast(cap_inverse, tl.float32)
    zq, _ = head_logit(tl.sum(q_sum, axis=0), bias, logit_scale, softcap, cap_inverse, CAPPED)
    zb, _ = head_logit(tl.sum(base_sum, axis=0), bias, logit_scale, softcap, cap_inverse, CAPPED)
    tl.store(q_action_out + row, zq)
    tl.store(base_action_out + row, zb)


@triton.jit(do_not_specialize=["num_rows", "vocab"])
def linear_finish_kernel(
    actions_ptr,
    base_lse_ptr,
    base_logp_ptr,
    shift_ptr,
    log_sum_ptr,
    x_action_ptr,
    q_action_ptr,
    slope_ptr,
    base_shift_ptr,
    base_log_sum_ptr,
    base_action_ptr,
    q_out,
    value_out,
    base_logp_out,
    policy_logp_out,
    base_lse_out,
    p_action_out,
    slope_action_out,
    num_rows,
    vocab,
    alpha_0,
    alpha_tilde,
    center,
    HAS_BASE: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_LOGP: tl.constexpr,
    SUBTRACT_LSE: tl.constexpr,
    CENTERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Statistics of BLOCK rows -> their seven results. HAS_BASE: z_b[a] is known."""
    alpha_0 = tl.cast(alpha_0, tl.float32)
    alpha_tilde = tl.cast(alpha_tilde, tl.float32)
    center = tl.cast(center, tl.float32)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = row < num_rows
    action = tl.load(actions_ptr + row, mask=here, other=0)
    present = action != NO_ACTION
    inside = (action >= 0) & (action < vocab)
    wrong = present & (inside == 0)
    shift = tl.load(shift_ptr + row, mask=here, other=0.0)
    log_sum = tl.load(log_sum_ptr + row, mask=here, other=0.0)
    x_action = tl.load(x_action_ptr + row, mask=here, other=0.0)
    zq = tl.load(q_action_ptr + row, mask=here, other=0.0)
    slope = tl.load(slope_ptr + row, mask=here, other=0.0)

    base_shift = shift
    base_log_sum = log_sum
    if HAS_LSE:
        base_lse = tl.load(base_lse_ptr + row, mask=here, other=0.0)
    else:
        base_shift = tl.load(base_shift_ptr + row, mask=here, other=0.0)
        base_log_sum = tl.load(base_log_sum_ptr + row, mask=here, other=0.0)
        base_lse = base_shift + base_log_sum
    if HAS_BASE:
        zb = tl.load(base_action_ptr + row, mask=here, other=0.0)
        if HAS_LOGP:
            base_logp = tl.load(base_logp_ptr + row, mask=here, other=0.0)
        elif HAS_LSE:
            base_logp = zb - base_lse
        else:
            base_logp = (zb - base_shift) - base_log_sum
    else:
        base_logp = tl.load(base_logp_ptr + row, mask=here, other=0.0)
        zb = base_logp + base_lse

    value = shift + alpha_tilde * log_sum
    if SUBTRACT_LSE:  # a factor of 0 would still let a NaN through
        value -= alpha_0 * base_lse
    q = zq
    if CENTERED:
        q = tl.where(zq == NEG_INF, zq, zq - center * zb)
    policy_logp = (x_action - shift) / alpha_tilde - log_sum

    nan = float("nan")
    spoilt = wrong | (log_sum != log_sum)
    policy_logp = tl.where(spoilt, nan, policy_logp)
    q = tl.where(present, tl.where(spoilt, nan, q), 0.0)
    tl.store(q_out + row, q, mask=here)
    tl.store(value_out + row, tl.where(wrong, nan, value), mask=here)
    base_logp = tl.where(present, tl.where(wrong, nan, base_logp), 0.0)
    tl.store(base_logp_out + row, base_logp, mask=here)
    tl.store(policy_logp_out + row, tl.where(present, policy_logp, 0.0), mask=here)
    tl.store(base_lse_out + row, base_lse, mask=here)
    tl.store(p_action_out + row, tl.where(present, tl.exp(policy_logp), 0.0), mask=here)
    tl.store(slope_action_out + row, tl.where(inside, slope, 0.0), mask=here)


def action_logits(
    q_hidden: Tensor,
    base_hidden: Tensor,
    head: Head,
    bias: Tensor,
    actions: Tensor,
    q_action: Tensor,
    base_action: Tensor,
) -> None:
    """Launch: the action's logits of both streams, written to q_action and base_action."""
    num_rows, dim = q_hidden.shape
    action_logits_kernel[(num_rows,)](
        q_hidden,
        base_hidden,
        head.weight,
        bias,
        actions,
        q_action,
        base_action,
        q_hidden.stride(0),
        base_hidden.stride(0),
        head.weight.stride(0),
        dim,
        head.weight.shape[0],
        *head.scalars(),
        HAS_BIAS=head.bias is not None,
        CAPPED=head.softcap != 0.0,
        BLOCK=min(DOT_BLOCK, triton.next_power_of_2(dim)),
        num_warps=4,
        enable_fp_fusion=True,
    )


def finish_rows(
    actions: Tensor,
    vocab: int,
    columns: tuple[Tensor, ...],
    base_action_known: bool,
    base_lse: Tensor | None,
    base_logp: Tensor | None,
    composition: tuple[float, float, float],
    outputs: tuple[Tensor, ...],
) -> None:
    """Launch: what the row kernels left in ``columns`` -> ``outputs``."""
    num_rows = actions.shape[0]
    alpha_0, alpha_tilde, center = composition
    linear_finish_kernel[(triton.cdiv(num_rows, FINISH_BLOCK),)](
        actions,
        columns[0] if base_lse is None else base_lse,
        columns[0] if base_logp is None else base_logp,
        *columns,
        *outputs,
        num_rows,
        vocab,
        float(alpha_0),
        float(alpha_tilde),
        float(center),
        HAS_BASE=base_action_known,
        HAS_LSE=base_lse is not None,
        HAS_LOGP=base_logp is not None,
        SUBTRACT_LSE=alpha_0 != 0,
        CENTERED=center != 0,
        BLOCK=FINISH_BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
