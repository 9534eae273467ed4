"""Q, soft value and log-probabilities of every row: one read of each logits tensor.

    m = alpha_0 - center      x_j = z_q[j] + m z_b[j]      shift = max_j x_j
    log_sum  = ln sum_j exp((x_j - shift) / alpha_tilde)
    base_lse = max_b + ln sum_j exp(z_b[j] - max_b)
    value    = (shift + alpha_tilde log_sum) - alpha_0 base_lse
    q        = z_q[a] - center z_b[a]
    logp     = (z_b[a] - max_b) - log_sum_b  and  (x_a - shift) / alpha_tilde - log_sum

Both streams run the same instructions on the same tiles, so equal logits with alpha_0 = alpha_tilde
= center = 1 give value exactly 0. One exp2 per element and stream plus one per 16-byte vector; with
base_lse given the base's exp is skipped, and with m = 0 its row is not read apart from z_b[a].

One program per row; when the rows are too few to fill the GPU, SPLIT programs per row write partial
pairs and a second small kernel merges them.

Bytes per element: 4 in bf16/fp16, 8 in fp32 (half of that where the base row is not read), and 40
or so per row. Floor at 3.0 TB/s for N = 8192, V = 128256, bf16: 1.40 ms. Not measured on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qadapter.kernels.common import (
    LOG2E,
    NEG_INF,
    elements_pair,
    label_pointer,
    merge_lanes,
    merge_pairs,
    mix_streams,
    on_device,
    online_update,
    processor_count,
    ragged_columns,
    row_head,
    row_pointer,
    row_walk,
    vectors_pointer,
)
from qadapter.kernels.residual_finish import finish_row, residual_fwd_merge_kernel

PROGRAMS_PER_PROCESSOR = 4
LARGEST_SPLIT = 256

_RUNTIME = ["base_stride", "q_stride", "skew", "vocab", "vectors_per_split"]


@triton.jit(do_not_specialize=_RUNTIME)
def residual_fwd_kernel(
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
    skew,
    vocab,
    vectors_per_split,
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
    SPLIT: tl.constexpr,
    RAGGED: tl.constexpr,
    ALIGN: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
):
    SUM_BASE: tl.constexpr = not HAS_LSE
    READ_BASE: tl.constexpr = SUM_BASE or SIGN != 0
    # Outside torch's own launcher Python floats may arrive as float64.
    mix_weight = tl.cast(mix_weight, tl.float32)
    scale = tl.cast(scale, tl.float32)
    base_scale = tl.cast(
        base_scale, tl.float32
    )  # a run-time value: both streams compile to the same code

    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    q_row = row_pointer(q_ptr, row, q_stride, ALIGN)
    base_row = row_pointer(base_ptr, row, base_stride, ALIGN)
    head = row_head(row, q_stride, skew, vocab, ALIGN, VEC)
    q_vectors = vectors_pointer(q_row, head, ALIGN)
    base_vectors = vectors_pointer(base_row, head, ALIGN)

    first = split * vectors_per_split
    last = tl.maximum(first, tl.minimum(first + vectors_per_split, (vocab - head) // VEC))
    whole = first + (last - first) // ROWS * ROWS
    lane = tl.arange(0, ROWS)
    within = tl.arange(0, VEC)

    shift = tl.full([ROWS], NEG_INF, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    base_shift = tl.full([ROWS], NEG_INF, tl.float32)
    base_total = tl.zeros([ROWS], tl.float32)
    for start in range(first, whole, ROWS):
        offsets = (start + lane)[:, None] * VEC + within[None, :]
        x = tl.load(q_vectors + offsets).to(tl.float32)
        if READ_BASE:
            zb = tl.load(base_vectors + offsets).to(tl.float32)
            x = mix_streams(x, zb, mix_weight, SIGN)
            if SUM_BASE:
                base_shift, base_total = online_update(zb, base_scale, base_shift, base_total)
        shift, total = online_update(x, scale, shift, total)
    if whole < last:
        # Masked by whole vectors, never inside one, which keeps these loads 128 bits wide, too.
        offsets = (whole + lane)[:, None] * VEC + within[None, :]
        exists = (whole + lane < last)[:, None]
        x = tl.load(q_vectors + offsets, mask=exists, other=NEG_INF).to(tl.float32)
        if READ_BASE:
            zb = tl.load(base_vectors + offsets, mask=exists, other=NEG_INF).to(tl.float32)
            x = mix_streams(x, zb, mix_weight, SIGN)
            if SUM_BASE:
                base_shift, base_total = online_update(zb, base_scale, base_shift, base_total)
        shift, total = online_update(x, scale, shift, total)

    shift, total = merge_lanes(shift, total, scale)
    if SUM_BASE:
        base_shift, base_total = merge_lanes(base_shift, base_total, base_scale)
    else:
        base_shift, base_total = shift, total  # not used
    if RAGGED:
        columns, exists = ragged_columns(head, vocab, VEC)
        exists = exists & (columns < tl.where(split == 0, vocab, 0))
        x = tl.load(q_row + columns, mask=exists, other=NEG_INF).to(tl.float32)
        if READ_BASE:
            zb = tl.load(base_row + columns, mask=exists, other=NEG_INF).to(tl.float32)
            x = mix_streams(x, zb, mix_weight, SIGN)
            if SUM_BASE:
                few_max, few_total = elements_pair(zb, base_scale)
                base_shift, base_total = merge_pairs(
                    base_shift, base_total, few_max, few_total, base_scale
                )
        few_max, few_total = elements_pair(x, scale)
        shift, total = merge_pairs(shift, total, few_max, few_total, scale)

    if SPLIT:
        here = partial_ptr + (row * tl.num_programs(1) + split) * 4
        tl.store(here, shift)
        tl.store(here + 1, total)
        tl.store(here + 2, base_shift)
        tl.store(here + 3, base_total)
    else:
        finish_row(
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
            tl.cast(alpha_0, tl.float32),
            tl.cast(alpha_tilde, tl.float32),
            tl.cast(center, tl.float32),
            mix_weight,
            shift,
            total,
            base_shift,
            base_total,
            SIGN,
            HAS_BASE,
            HAS_LSE,
            HAS_LOGP,
        )


def choose_splits(num_rows: int, vectors: int, tile: int, processors: int) -> int:
    """Programs per row: 1 unless one program per row would leave the GPU half empty."""
    if num_rows >= 2 * processors:
        return 1
    wanted = triton.cdiv(PROGRAMS_PER_PROCESSOR * processors, num_rows)
    return max(1, min(wanted, triton.cdiv(vectors, tile), LARGEST_SPLIT))


def residual_fwd(
    base_logits: Tensor | None,
    q_logits: Tensor,
    actions: Tensor,
    base_lse: Tensor | None,
    base_logp: Tensor | None,
    alpha_0: float,
    alpha_tilde: float,
    center: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(q, value, base_logp, policy_logp, base_lse, shift, log_sum), each float32 [N]."""
    return launch(
        base_logits, q_logits, actions, base_lse, base_logp, alpha_0, alpha_tilde, center, None
    )


def launch(
    base_logits: Tensor | None,
    q_logits: Tensor,
    actions: Tensor,
    base_lse: Tensor | None,
    base_logp: Tensor | None,
    alpha_0: float,
    alpha_tilde: float,
    center: float,
    splits: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`residual_fwd` with a given number of programs per row (None: chosen for the GPU)."""
    num_rows, vocab = q_logits.shape
    outputs = tuple(
        torch.empty(num_rows, dtype=torch.float32, device=q_logits.device) for _ in range(7)
    )
    if num_rows == 0:
        return outputs  # type: ignore[return-value]
    mix_weight = alpha_0 - center
    sign = (mix_weight > 0) - (mix_weight < 0)
    if base_logits is None and (sign != 0 or base_lse is None or base_logp is None):
        raise ValueError(
            "without base_logits: alpha_0 == center, base_lse and base_logp are needed"
        )
    base = q_logits if base_logits is None else base_logits  # a pointer that is never followed
    streams = [q_logits] if base_lse is not None and sign == 0 else [q_logits, base]
    skew, walk = row_walk(*streams)
    tile, vectors = walk["ROWS"], vocab // walk["VEC"]
    if splits is None:
        splits = choose_splits(num_rows, vectors, tile, processor_count(q_logits.device))
    per_split = max(1, triton.cdiv(triton.cdiv(vectors, splits), tile)) * tile
    splits = max(1, triton.cdiv(vectors, per_split))
    partial = outputs[0]
    if splits > 1:
        partial = torch.empty((num_rows, splits, 4), dtype=torch.float32, device=q_logits.device)
    pointers = (
        base,
        q_logits,
        label_pointer(actions),
        outputs[0] if base_lse is None else base_lse,
        outputs[0] if base_logp is None else base_logp,
        *outputs,
        partial,
    )
    strides = (base.stride(0), q_logits.stride(0))
    scalars = (alpha_0, alpha_tilde, center, mix_weight, LOG2E / alpha_tilde, LOG2E)
    scalars = tuple(float(scalar) for scalar in scalars)
    given = (base_logits is not None, base_lse is not None, base_logp is not None)
    with on_device(q_logits.device):
        residual_fwd_kernel[(num_rows, splits)](
            *pointers,
            *strides,
            skew,
            vocab,
            per_split,
            *scalars,
            sign,
            *given,
            SPLIT=splits > 1,
            **walk,
            enable_fp_fusion=True,
        )
        if splits > 1:
            residual_fwd_merge_kernel[(num_rows,)](
                *pointers,
                *strides,
                vocab,
                splits,
                *scalars,
                sign,
                *given,
                LANES=triton.next_power_of_2(splits),
                num_warps=1 if splits <= 32 else 4,
                enable_fp_fusion=True,
            )
    return outputs  # type: ignore[return-value]
