"""The operations on logits in PyTorch: any device, any floating dtype, no [N, V] temporary.

Rows are processed in chunks of a few million elements, so that the float32 copies stay small (and,
on a CPU, in cache). Semantics are those of `qadapter.reference`; results are float32, or float64
for float64 logits. Work is done in differences from the row's maximum, (x - shift) / alpha_tilde,
so that logits of 1e4 with a small alpha_tilde keep their digits.
"""

import torch
from torch import Tensor

from qadapter.ops.rows import NEG_INF, finish_rows, stats_dtype

CHUNK_ELEMENTS = 1 << 22


def _row_chunks(logits: Tensor) -> list[slice]:
    num_rows, vocab = logits.shape
    step = max(1, CHUNK_ELEMENTS // max(1, vocab))
    return [slice(start, start + step) for start in range(0, num_rows, step)]


def _mixed(base: Tensor | None, q_rows: Tensor, m: float, dtype: torch.dtype) -> Tensor:
    """x = z_q + m z_b for some rows, -inf where either stream is masked. [n, V]"""
    x = q_rows.to(dtype)
    if m == 0 or base is None:
        return x
    base = base.to(dtype)
    return (x + m * base).masked_fill_((x == NEG_INF) | (base == NEG_INF), NEG_INF)


def _shift_and_log_sum(x: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    shift = x.amax(-1)
    total = ((x - shift[:, None]) / alpha).exp_().sum(-1)
    return shift, total.log_()  # a row of -inf only: -inf - -inf = NaN, as specified


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
    num_rows, vocab = q_logits.shape
    dtype = stats_dtype(q_logits.dtype)
    m = alpha_0 - center
    in_range = (actions >= 0) & (actions < vocab)
    safe = torch.where(in_range, actions, 0)[:, None]

    q_action = q_logits.gather(1, safe)[:, 0].to(dtype) if num_rows else q_logits.new_empty(0)
    shift = torch.empty(num_rows, dtype=dtype, device=q_logits.device)
    log_sum, base_shift, base_log_sum = (torch.empty_like(shift) for _ in range(3))
    need_base_sum = base_logits is not None and base_lse is None
    for rows in _row_chunks(q_logits):
        base = base_logits[rows] if base_logits is not None else None
        x = _mixed(base, q_logits[rows], m, dtype)
        shift[rows], log_sum[rows] = _shift_and_log_sum(x, alpha_tilde)
        if need_base_sum and base is not None:
            base_shift[rows], base_log_sum[rows] = _shift_and_log_sum(base.to(dtype), 1.0)

    base_action = None
    if base_logits is not None:
        base_action = base_logits.gather(1, safe)[:, 0].to(dtype) if num_rows else shift.clone()
    base_sum = (base_shift, base_log_sum) if need_base_sum else None
    return finish_rows(
        actions,
        vocab,
        q_action,
        base_action,
        None,
        (shift, log_sum),
        base_sum,
        base_lse,
        base_logp,
        (alpha_0, alpha_tilde, center),
    )


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
    num_rows, vocab = q_logits.shape
    dtype = stats_dtype(q_logits.dtype)
    m = alpha_0 - center
    grad = torch.empty((num_rows, vocab), dtype=q_logits.dtype, device=q_logits.device)
    in_range = (actions >= 0) & (actions < vocab)
    safe = torch.where(in_range, actions, 0)[:, None]
    coef_a = torch.where(in_range, coef_a, 0)[:, None]
    for rows in _row_chunks(q_logits):
        base = base_logits[rows] if base_logits is not None else None
        x = _mixed(base, q_logits[rows], m, dtype)
        x = x - shift[rows, None]
        x.div_(alpha_tilde).sub_(log_sum[rows, None]).exp_().mul_(coef_p[rows, None])
        x.scatter_add_(1, safe[rows], coef_a[rows].to(dtype))
        grad[rows] = x
    return grad
