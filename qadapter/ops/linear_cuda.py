"""The CUDA backend's linear operation: head products by torch, a chunk's rows by csrc/cuda.

The same cases as in `qadapter.kernels.linear_fwd`, which has them in a table, with the same memory.
Between the products stands one kernel that reads a chunk once, `linear_chunk.cu`; the ends, per-row
numbers and the dot products of the actions' tokens, are plain torch.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qadapter.kernels.linear_head import (
    Head,
    aligned_rows,
    chunk_buffers,
    rows_per_chunk,
    weights_view,
)
from qadapter.ops.rows import finish_rows

ROW_PADDING = 32  # columns; rows then start on 128-byte boundaries
SHIFT, LOG_SUM, X_ACTION, Z_ACTION, SLOPE, BASE_ROW = range(6)  # as in linear_chunk.h
LOG2E = math.log2(math.e)


def _capped(head: Head, z: Tensor) -> Tensor:
    return z if head.softcap == 0.0 else head.softcap * torch.tanh(z / head.softcap)


def _action_logits(head: Head, hidden: Tensor, bias: Tensor, safe: Tensor) -> Tensor:
    """[N]: the logits of the actions' tokens, by dot products in float32."""
    dots = (hidden.float() * head.weight[safe].float()).sum(-1)
    z = dots * head.logit_scale
    return _capped(head, z if head.bias is None else z + bias[safe])


def linear_fwd(
    chunk_kernel: Callable[..., Any],
    base_hidden: Tensor | None,
    q_hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    bias: Tensor | None,
    base_lse: Tensor | None,
    base_logp: Tensor | None,
    alpha_0: float,
    alpha_tilde: float,
    center: float,
    logit_scale: float,
    logit_softcap: float,
    chunk_size: int,
    need_grad: bool,
) -> tuple[Tensor, ...]:
    """q, value, base_logp, policy_logp, base_lse, p_action, slope_action, each float32 [N]; u."""
    num_rows, dim = q_hidden.shape
    vocab, device = weight.shape[0], q_hidden.device
    m = float(alpha_0 - center)
    merged = m != 0 and base_lse is not None and logit_softcap == 0.0
    two_streams = m != 0 and not merged
    base_first = m == 0 and base_lse is None
    if base_hidden is None and (m != 0 or base_lse is None or base_logp is None):
        raise ValueError(
            "without base_hidden: alpha_0 == center, base_lse and base_logp are needed"
        )
    head = Head(weight, bias, logit_scale, logit_softcap)
    stride = -(-vocab // ROW_PADDING) * ROW_PADDING
    rows = max(1, rows_per_chunk(num_rows, stride, 2 if two_streams else 1, chunk_size))
    buffers = chunk_buffers(rows, stride, 1 + two_streams, chunk_size, device)
    buffer, base_buffer = buffers[0], buffers[1] if two_streams else None
    p_rows = weights_view(buffer, weight.dtype)
    plain_bias = head.scaled_bias(1.0, stride)
    x_bias = head.scaled_bias(1.0 + m, stride) if merged else plain_bias
    statistics = torch.empty((2 * BASE_ROW, num_rows), dtype=torch.float32, device=device)
    u = torch.empty((num_rows if need_grad else 0, dim), dtype=q_hidden.dtype, device=device)
    q_hidden = aligned_rows(q_hidden)
    base_hidden = None if base_hidden is None else aligned_rows(base_hidden)

    def run_rows(
        chunk: slice, into: Tensor, bias_row: Tensor, alpha: float, second: Tensor | None, p: bool
    ) -> None:
        chunk_kernel(
            buffer,
            second,
            p_rows if p else None,
            None if bias is None else bias_row,
            actions[chunk],
            into[:, chunk],
            vocab,
            m if second is not None else 0.0,
            LOG2E / alpha,
            float(logit_scale),
            float(logit_softcap),
            base_lse is None,
        )

    for start in range(0, num_rows, rows):
        chunk = slice(start, min(start + rows, num_rows))
        z = buffer[: chunk.stop - start, :vocab]
        hidden = q_hidden[chunk]
        if base_first:
            assert base_hidden is not None
            head.product(base_hidden[chunk], z)
            run_rows(chunk, statistics[BASE_ROW:], plain_bias, 1.0, None, False)
        elif merged:
            assert base_hidden is not None
            mixed = torch.add(hidden.float(), base_hidden[chunk].float(), alpha=m)
            hidden = mixed.to(hidden.dtype) if hidden.dtype == weight.dtype else mixed
        elif base_buffer is not None:
            assert base_hidden is not None
            head.product(base_hidden[chunk], base_buffer[: chunk.stop - start, :vocab])
        head.product(hidden, z)
        run_rows(chunk, statistics, x_bias, float(alpha_tilde), base_buffer, need_grad)
        if need_grad:
            head.pull_back(p_rows[: chunk.stop - start, :vocab], u[chunk])

    in_range = (actions >= 0) & (actions < vocab)
    safe = torch.where(in_range, actions, 0)
    q_action, base_action = statistics[Z_ACTION], statistics[BASE_ROW + Z_ACTION]
    if base_hidden is not None and not two_streams and not base_first:
        # Both logits of the action by the same arithmetic, so that equal streams cancel.
        q_action = _action_logits(head, q_hidden, plain_bias, safe)
        base_action = _action_logits(head, base_hidden, plain_bias, safe)
    base_sum = (statistics[BASE_ROW + SHIFT], statistics[BASE_ROW + LOG_SUM])
    results = finish_rows(
        actions,
        vocab,
        q_action,
        None if base_hidden is None else base_action,
        statistics[X_ACTION],
        (statistics[SHIFT], statistics[LOG_SUM]),
        base_sum if base_lse is None else None,
        base_lse,
        base_logp,
        (alpha_0, alpha_tilde, center),
    )
    p_action = torch.where(actions != -100, results[3].exp(), 0)
    slope_action = torch.where(in_range, statistics[SLOPE], 0)
    return (*results[:5], p_action, slope_action, u)
