"""Gradient of the adapter logits for any loss on (q, value, policy_logp).

    grad_j = coef_p exp((x_j - shift) / alpha_tilde - log_sum) + coef_a [j == a]
    x_j    = z_q[j] + m z_b[j],   m = alpha_0 - center

computed in float32, the action's term included, and rounded once. A row whose log_sum is NaN gets a
NaN gradient. One program per row and block of 4096 columns (in float32 2048): no reduction, nothing
shared. The blocks of a row are neighbours in a flat grid, so what runs at a time reads and writes
some whole rows, 256 KB in one piece each, and not 8 KB of every row.

Bytes per element: 6 in bf16/fp16 (read both, write one; 4 with m = 0), 12 in fp32 (8). Floor at
3.0 TB/s for N = 8192, V = 128256, bf16: 2.10 ms; predicted, at 90 % of that bandwidth, 2.3 ms. Not
measured on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qadapter.kernels.common import (
    LOG2E,
    label_pointer,
    mix_streams,
    on_device,
    ragged_columns,
    row_head,
    row_pointer,
    row_walk,
    vectors_pointer,
)


@triton.jit
def column_gradient(x, columns, action, shift, log_sum2, coef_p, coef_a, scale):
    """float32 gradient of a tile; log_sum2 is log_sum in log2 units."""
    probability = tl.exp2((x - shift) * scale - log_sum2)
    return coef_p * probability + tl.where(columns == action, coef_a, 0.0)


@triton.jit(do_not_specialize=["base_stride", "q_stride", "skew", "vocab", "blocks"])
def residual_bwd_kernel(
    base_ptr,
    q_ptr,
    actions_ptr,
    shift_ptr,
    log_sum_ptr,
    coef_p_ptr,
    coef_a_ptr,
    grad_ptr,
    base_stride,
    q_stride,
    skew,
    vocab,
    blocks,
    mix_weight,
    scale,
    log2e,
    SIGN: tl.constexpr,
    RAGGED: tl.constexpr,
    ALIGN: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
):
    # Outside torch's own launcher Python floats may arrive as float64.
    mix_weight = tl.cast(mix_weight, tl.float32)
    scale = tl.cast(scale, tl.float32)

    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    q_row = row_pointer(q_ptr, row, q_stride, ALIGN)
    base_row = row_pointer(base_ptr, row, base_stride, ALIGN)
    grad_row = row_pointer(grad_ptr, row, vocab, ALIGN)
    head = row_head(row, q_stride, skew, vocab, ALIGN, VEC)

    shift = tl.load(shift_ptr + row)
    log_sum2 = tl.load(log_sum_ptr + row) * tl.cast(log2e, tl.float32)
    coef_p = tl.load(coef_p_ptr + row)
    coef_a = tl.load(coef_a_ptr + row)
    action = tl.load(actions_ptr + row)
    action = tl.where((action >= 0) & (action < vocab), action, -1).to(tl.int32)

    q_vectors = vectors_pointer(q_row, head, ALIGN)
    base_vectors = vectors_pointer(base_row, head, ALIGN)
    grad_vectors = vectors_pointer(grad_row, head, ALIGN)
    vector = block * ROWS + tl.arange(0, ROWS)
    offsets = vector[:, None] * VEC + tl.arange(0, VEC)[None, :]
    exists = (vector < (vocab - head) // VEC)[:, None]
    x = tl.load(q_vectors + offsets, mask=exists).to(tl.float32)
    if SIGN != 0:
        zb = tl.load(base_vectors + offsets, mask=exists)
        x = mix_streams(x, zb.to(tl.float32), mix_weight, SIGN)
    grad = column_gradient(x, head + offsets, action, shift, log_sum2, coef_p, coef_a, scale)
    tl.store(grad_vectors + offsets, grad.to(grad_ptr.dtype.element_ty), mask=exists)

    if RAGGED:  # noqa: SIM102 - this is decided when compiling, the next line when running
        if block == 0:
            columns, outside = ragged_columns(head, vocab, VEC)
            few = tl.load(q_row + columns, mask=outside, other=0.0).to(tl.float32)
            if SIGN != 0:
                few_base = tl.load(base_row + columns, mask=outside, other=0.0).to(tl.float32)
                few = mix_streams(few, few_base, mix_weight, SIGN)
            few_grad = column_gradient(few, columns, action, shift, log_sum2, coef_p, coef_a, scale)
            tl.store(grad_row + columns, few_grad.to(grad_ptr.dtype.element_ty), mask=outside)


def residual_bwd(
    base_logits: Tensor | None,
    q_logits: Tensor,
    actions: Tensor,
    shift: Tensor,
    log_sum: Tensor,
    coef_p: Tensor,
    coef_a: Tensor,
    alpha_0: float,
    alpha_tilde: float,
    center: float,
) -> Tensor:
    """grad [N, V] in the dtype of q_logits, contiguous."""
    num_rows, vocab = q_logits.shape
    grad = torch.empty((num_rows, vocab), dtype=q_logits.dtype, device=q_logits.device)
    if grad.numel() == 0:
        return grad
    mix_weight = alpha_0 - center
    sign = (mix_weight > 0) - (mix_weight < 0)
    if base_logits is None and sign != 0:
        raise ValueError("without base_logits alpha_0 must equal center")
    base = q_logits if sign == 0 or base_logits is None else base_logits
    skew, walk = row_walk(q_logits, base, grad)
    blocks = max(1, triton.cdiv(vocab // walk["VEC"], walk["ROWS"]))
    with on_device(q_logits.device):
        residual_bwd_kernel[(num_rows * blocks,)](
            base,
            q_logits,
            label_pointer(actions),
            shift,
            log_sum,
            coef_p,
            coef_a,
            grad,
            base.stride(0),
            q_logits.stride(0),
            skew,
            vocab,
            blocks,
            float(mix_weight),
            LOG2E / alpha_tilde,
            LOG2E,
            SIGN=sign,
            **walk,
            enable_fp_fusion=True,
        )
    return grad
