"""Causal attention of one sequence in 16 bits on a CPU, by plain matrix products.

PyTorch's fused attention for CPUs works on small tiles, which costs most in its backward: at a few
hundred tokens and heads of 64 forward and backward take 1.5 to 2.7 times as long as what is done
here (docs/training-step.md). Scores exist for one sequence at a time, and are made again in
backward instead of kept; query heads that share a key head are rows of one product, so nothing is
repeated. As in the eager attention of transformers, scores are in the model's dtype, and the
softmax sums in float32; in bfloat16 csrc/cpu/causal_softmax.cpp takes it, over the keys that a
query sees.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qadapter.ops import cpp, layer_rows


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """[queries, keys], True where a query sees a key; the last of both are the same token."""
    ones = torch.ones(queries, keys, dtype=torch.bool, device=device)
    mask = ones.tril(keys - queries)
    return mask if window is None else mask & ones.triu(keys - queries - window + 1)


@functools.lru_cache(maxsize=64)
def _additive_mask(queries: int, keys: int, window: int | None, dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(queries, keys, dtype=dtype)
    return mask.masked_fill_(~causal_mask(queries, keys, window, mask.device), float("-inf"))


def serves(query: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether an attention call can be taken over; float32 is left to the fused kernel."""
    return (
        query.device.type == "cpu"
        and query.dtype in (torch.bfloat16, torch.float16)
        and kwargs.get("scaling") is not None
        and not kwargs.get("dropout")
        and all(kwargs.get(name) is None for name in ("softcap", "s_aux", "position_bias"))
    )


def _probabilities(q: Tensor, k: Tensor, scaling: float, window: int | None) -> Tensor:
    """q [Hk, G, Tq, d], k [Hk, Tk, d] -> [Hk, G Tq, Tk]."""
    heads, group, queries, dim = q.shape
    keys = k.shape[1]
    nothing = q.new_empty(1, 1, 1)
    rows = q.reshape(heads, group * queries, dim)
    scores = torch.baddbmm(nothing, rows, k.transpose(1, 2), beta=0, alpha=scaling)
    if scores.dtype == torch.bfloat16 and cpp.why_not_loaded() is None and scores.numel():
        layer_rows.causal_softmax_(scores, queries, window)
        return scores
    mask = _additive_mask(queries, keys, window, q.dtype)
    scores.view(heads, group, queries, keys).add_(mask)
    return torch.softmax(scores, -1)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scaling, ctx.window = scaling, window
        return torch.bmm(_probabilities(q, k, scaling, window), v).view(q.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        q, k, v = ctx.saved_tensors
        p = _probabilities(q, k, ctx.scaling, ctx.window)
        rows = q.reshape(p.shape[0], p.shape[1], -1)
        grad = grads[0].reshape(rows.shape)
        grad_v = torch.bmm(p.transpose(1, 2), grad)
        grad_p = torch.bmm(grad, v.transpose(1, 2))
        grad_s = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
        nothing = q.new_empty(1, 1, 1)
        grad_q = torch.baddbmm(nothing, grad_s, k, beta=0, alpha=ctx.scaling).view(q.shape)
        grad_k = torch.baddbmm(nothing, grad_s.transpose(1, 2), rows, beta=0, alpha=ctx.scaling)
        return grad_q, grad_k, grad_v, None, None


def attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None = None
) -> Tensor:
    """query [1, H, Tq, d], key and value [1, Hk, Tk, d], flush right -> [1, Tq, H, d]."""
    _, heads, queries, dim = query.shape
    groups = key.shape[1]
    q = query[0].reshape(groups, heads // groups, queries, dim)
    output = _Attention.apply(q, key[0], value[0], scaling, window)
    return output.view(heads, queries, dim).transpose(0, 1)[None]
