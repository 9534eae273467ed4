"""A head in shards over processes: each holds V / P rows of the vocabulary and all rows of states.

With x = z_q + (alpha_0 - center) z_b, the operation on a shard, where the actions of the others are
masked, gives X_s = alpha_tilde lse_s(x / alpha_tilde) over its columns and b_s = lse_s(z_b). Six
floats a row are gathered, and every process has

    b = lse(b_s)      X = alpha_tilde lse(X_s / alpha_tilde)      V = X - alpha_0 b      q = sum q_s

The own slot is the live tensor, so that autograd has dX/dX_s = exp((X_s - X) / alpha_tilde); times
the shard's dX_s/dh = p_s W_s that is the softmax over the whole vocabulary. The gradients of the
hidden states are added up over the shards: one collective forward, one backward.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from qadapter.ops import sample_torch
from qadapter.ops.philox import row_keys, uniform
from qadapter.ops.rows import NEG_INF
from qadapter.outputs import ResidualValues


class _Replicated(torch.autograd.Function):
    """The identity, whose backward adds up what the shards say."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def check(group: Any, vocab_offset: int | None) -> int:
    """``vocab_offset``; ValueError where the two do not say which shard this is."""
    if group is None or isinstance(vocab_offset, bool) or not isinstance(vocab_offset, int):
        raise ValueError(
            "group, vocab_offset: expected both, a process group and the id of the first row of "
            f"this shard of the head, got {group!r} and {vocab_offset!r}"
        )
    if vocab_offset < 0:
        raise ValueError(f"vocab_offset: expected 0 or more, got {vocab_offset}")
    return vocab_offset


def residual_values(
    of_shard: Callable[..., ResidualValues],
    streams: tuple[Tensor | None, Tensor],
    weight: Tensor,
    actions: Tensor,
    group: Any,
    vocab_offset: int | None,
    *,
    alpha_0: float,
    alpha_tilde: float,
    bias: Tensor | None,
    base_lse: Tensor | None,
    base_logp: Tensor | None,
    **options: Any,
) -> ResidualValues:
    """`functional.linear_residual_values` of a head in shards; ``of_shard`` is that function, for
    one of them. Collective: all processes of ``group`` call it with the same rows."""
    vocab_offset = check(group, vocab_offset)
    base_hidden, q_hidden = streams
    local = actions - vocab_offset
    mine = (local >= 0) & (local < weight.shape[0]) & (actions >= 0)
    q_rows = _Replicated.apply(q_hidden, group)
    # A shard of masked tokens alone has no logsumexp: it is computed without the mask, and dropped.
    empty = None
    if bias is not None:
        empty = torch.isneginf(bias).all()
        bias = torch.where(empty, 0, bias)
    part = of_shard(
        base_hidden,
        q_rows,
        weight,
        torch.where(mine, local, -100),
        bias=bias,
        alpha_0=alpha_0,
        alpha_tilde=alpha_tilde,
        base_lse=base_lse,  # where known, the whole vocabulary's
        base_logp=None if base_logp is None else torch.where(mine, base_logp, 0),
        **options,
    )
    q, value, logp_b, logp, b = part
    x = value + alpha_0 * b
    x_a = torch.where(mine, alpha_tilde * logp + x, 0)
    b_a = torch.where(mine, logp_b + b, 0)
    if empty is not None:
        x, b, q, x_a, b_a = (
            torch.where(empty, nothing, value)
            for value, nothing in ((x, NEG_INF), (b, NEG_INF), (q, 0), (x_a, 0), (b_a, 0))
        )
    own = torch.stack([x, b, q, x_a, b_a, mine.to(x.dtype)])
    slots = _gathered(own.detach(), group)
    slots[dist.get_rank(group)] = own
    xs, bs, qs, xs_a, bs_a, holders = torch.stack(slots, -1).unbind()

    whole_x = alpha_tilde * torch.logsumexp(xs / alpha_tilde, -1)
    lse = torch.logsumexp(bs.detach(), -1) if base_lse is None else base_lse.to(own.dtype)
    has = actions != -100
    # An action that is in no shard, or in two, is nobody's token.
    astray = has & (holders.sum(-1).detach() != 1)

    def of_action(values: Tensor) -> Tensor:
        return torch.where(has, values, 0).masked_fill(astray, float("nan"))

    return ResidualValues(
        of_action(qs.sum(-1)),
        whole_x - alpha_0 * lse,
        of_action(bs_a.detach().sum(-1) - lse),
        of_action((xs_a.sum(-1) - whole_x) / alpha_tilde),
        lse,
    )


def _gathered(own: Tensor, group: Any) -> list[Tensor]:
    """Those of all processes, by rank."""
    slots = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(slots, own, group=group)
    return slots


@torch.no_grad()
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
    *,
    group: Any,
    vocab_offset: int,
) -> tuple[Tensor, Tensor]:
    """`qadapter.ops.sample` of logits whose columns are in shards, [B, V_s] here: the draw that the
    whole rows give. Collective: all processes call it with the same numbers.

    What is exchanged: the largest logits of each shard (``top_k`` of them, or one), the mass that
    each keeps, and what the shard has drawn in which the draw lies.
    """
    arguments = (scale, base_weight, seed, position, greedy, top_k, top_p, min_p)
    if top_p < 1.0 and top_k == 0:
        # How far down the nucleus reaches, no few of the largest logits say.
        whole = (
            None if one is None else whole_logits(one, group) for one in (base_logits, q_logits)
        )
        return torch.ops.qadapter.sample(*whole, *arguments)
    batch, width = q_logits.shape
    scale, base_weight = scale.expand(batch)[:, None], base_weight.expand(batch)
    x = sample_torch.composed(base_logits, q_logits, base_weight).double()
    count = max(top_k, 1)
    largest = x.new_full((batch, count), NEG_INF)
    largest[:, : min(count, width)] = x.topk(min(count, width)).values
    every = torch.stack(_gathered(largest, group))  # [P, B, count]
    order = every.transpose(0, 1).flatten(1).sort(descending=True).values[:, :count]
    top = order[:, :1]
    y, every, order = ((one - top) * scale for one in (x, every, order))
    mass = y.exp()
    if top_k > 0:
        last = torch.full((batch, 1), count, device=x.device)
        if top_p < 1.0:
            held = order.exp().cumsum(-1)
            last = 1 + (held[:, :-1] < top_p * held[:, -1:]).sum(-1, keepdim=True)
        pivot = order.gather(-1, last - 1)
        # Of those that equal it the lowest ids are kept: they come in the order of the ranks.
        left = last - (order > pivot).sum(-1, keepdim=True)
        before = (every == pivot).sum(-1)[: dist.get_rank(group)].sum(0)[:, None]
        equal = y == pivot
        mass = mass.masked_fill(~((y > pivot) | (equal & (equal.cumsum(-1) + before <= left))), 0)
    if min_p > 0.0:
        mass = mass.masked_fill(y < math.log(min_p), 0)
    cumulative = mass.cumsum(-1)
    ends = torch.stack(_gathered(cumulative[:, -1].contiguous(), group), -1).cumsum(-1)  # [B, P]
    total, rank = ends[:, -1:], dist.get_rank(group)
    if greedy:
        owner = (every[..., 0] == 0).int().argmax(0)
        token = x.argmax(-1)
    else:
        key = seed if seed.shape[0] == batch else row_keys(seed, batch)
        u = uniform(key, position.expand(batch))[:, None]
        at = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
        owner = torch.searchsorted(ends, at, right=True)[:, 0].clamp_(max=ends.shape[1] - 1)
        own = cumulative[:, -1:]
        inside = at - (ends[:, rank : rank + 1] - own)
        inside = torch.minimum(inside, torch.nextafter(own, torch.zeros_like(own)))
        token = torch.searchsorted(cumulative, inside, right=True)[:, 0].clamp_(max=width - 1)
    drawn = torch.stack([token.double() + vocab_offset, y.gather(-1, token[:, None])[:, 0]])
    drawn = torch.where(owner == rank, drawn, 0)
    dist.all_reduce(drawn, group=group)
    valid = top[:, 0].isfinite() & (scale[:, 0] > 0) & scale[:, 0].isfinite()
    valid &= base_weight.isfinite()
    logprobs = (drawn[1] - total[:, 0].log()).float().masked_fill(~valid, math.nan)
    return torch.where(valid, drawn[0], -1.0).long(), logprobs


def whole_logits(shard: Tensor, group: Any) -> Tensor:
    """Logits [B, V] of a decoding step, in all processes of a group, from the columns [B, V_s] that
    each of them has, in the order of their ranks: for `functional.sample`, which with one ``seed``
    everywhere draws the same tokens everywhere. Collective; no gradient."""
    width = torch.tensor([shard.shape[-1]], device=shard.device)
    widths = [torch.empty_like(width) for _ in range(dist.get_world_size(group))]
    dist.all_gather(widths, width, group=group)
    columns = [int(one) for one in widths]
    padded = shard.new_zeros(*shard.shape[:-1], max(columns))
    padded[..., : shard.shape[-1]] = shard.detach()
    slots = [torch.empty_like(padded) for _ in columns]
    dist.all_gather(slots, padded, group=group)
    return torch.cat([one[..., :count] for one, count in zip(slots, columns, strict=True)], -1)
