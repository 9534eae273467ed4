"""The torch backend's sampler: any device, any floating dtype, a few rows at a time.

Masses are float64. A filter is a pivot (the smallest kept value) and how many of the tokens that
equal it are kept, the lowest ids first; it follows from sorted values, and no order of ids is ever
made. Nothing is read back to the host.
"""

import math

import torch
from torch import Tensor

from qadapter.ops.philox import row_keys, uniform
from qadapter.ops.rows import NEG_INF

CHUNK_ELEMENTS = 1 << 20


def _kept(y: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor | None:
    """Which tokens the filters keep, bool [n, V]; None for all. ``y`` [n, V], its maximum 0."""
    vocab = y.shape[1]
    keep = None
    if 0 < top_k < vocab or top_p < 1.0:
        if 0 < top_k < vocab:
            values = y.topk(top_k).values
        else:
            values = y.sort(descending=True).values
        count = torch.full((y.shape[0], 1), values.shape[1], device=y.device)
        if top_p < 1.0:
            mass = values.exp().cumsum_(-1)
            # A token stays where the mass before it is less than the share.
            count = 1 + (mass[:, :-1] < top_p * mass[:, -1:]).sum(-1, keepdim=True)
        pivot = values.gather(-1, count - 1)
        above, equal = y > pivot, y == pivot
        quota = count - above.sum(-1, keepdim=True)
        keep = above | (equal & (equal.cumsum(-1) <= quota))
    if min_p > 0.0:
        near = y >= math.log(min_p)
        keep = near if keep is None else keep & near
    return keep


def _chunk(
    x: Tensor,
    scale: Tensor,
    u: Tensor,
    greedy: bool,
    filters: tuple[int, float, float],
) -> tuple[Tensor, Tensor]:
    top, first = x.max(-1, keepdim=True).values, x.argmax(-1)
    # Differences before scaling, so that logits of 1e4 keep their digits.
    y = (x.double() - top.double()).mul_(scale[:, None])
    mass = y.exp()
    keep = _kept(y, *filters)
    if keep is not None:
        mass.masked_fill_(~keep, 0.0)
    cumulative = mass.cumsum_(-1)
    total = cumulative[:, -1:].contiguous()
    if greedy:
        tokens = first[:, None]
    else:
        # Below the total even after rounding, so that a token of mass 0 is never drawn.
        at = torch.minimum(u[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
        tokens = torch.searchsorted(cumulative, at, right=True).clamp_(max=x.shape[1] - 1)
    logprobs = (y.gather(-1, tokens) - total.log())[:, 0]
    # NaN, +inf or nothing but -inf: the maximum shows all three.
    broken = ~top[:, 0].isfinite()
    return (
        torch.where(broken, -1, tokens[:, 0]),
        torch.where(broken, math.nan, logprobs).float(),
    )


def composed(base: Tensor | None, q: Tensor, weight: Tensor) -> Tensor:
    """q + weight * base, -inf where either is, in the dtype of the arithmetic. [n, V]

    +inf in the base is NaN: under a negative weight it must not pass for a mask.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    x = q.to(dtype)
    if base is None:
        return x
    base = base.to(dtype)
    masked = (x == NEG_INF) | (base == NEG_INF)
    mixed = (x + weight.to(dtype)[:, None] * base).masked_fill_(base == math.inf, math.nan)
    mixed.masked_fill_(masked, NEG_INF)
    return torch.where(weight[:, None] == 0, x, mixed)


def _expanded(values: Tensor, batch: int, device: torch.device) -> Tensor:
    """[B] on the device; a number for all rows may lie on the CPU."""
    if values.device != device:
        values = torch.full((1,), values.item(), dtype=values.dtype, device=device)
    return values.expand(batch)


def sample(
    base_logits: Tensor | None,
    q_logits: Tensor,
    scale: Tensor,
    base_weight: Tensor,
    seed: Tensor,
    position: Tensor,
    greedy: bool,
    top_k: int,
    top_p: float,
    min_p: float,
) -> tuple[Tensor, Tensor]:
    """`qadapter.ops.sample` has the arguments."""
    batch, vocab = q_logits.shape
    device = q_logits.device
    scale, base_weight = (_expanded(t, batch, device) for t in (scale, base_weight))
    seeds = _expanded(seed, batch, device)
    key = seeds if seed.shape[0] == batch else row_keys(seeds[:1], batch)
    u = uniform(key, _expanded(position, batch, device))
    tokens = torch.empty(batch, dtype=torch.int64, device=device)
    logprobs = torch.empty(batch, dtype=torch.float32, device=device)
    filters = (top_k, top_p, min_p)
    step = max(1, CHUNK_ELEMENTS // max(1, vocab))
    for start in range(0, batch, step):
        rows = slice(start, start + step)
        base = None if base_logits is None else base_logits[rows]
        x = composed(base, q_logits[rows], base_weight[rows])
        tokens[rows], logprobs[rows] = _chunk(x, scale[rows], u[rows], greedy, filters)
    invalid = ~((scale > 0) & scale.isfinite() & base_weight.isfinite())
    return tokens.masked_fill_(invalid, -1), logprobs.masked_fill_(invalid, math.nan)
