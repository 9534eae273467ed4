"""A head in shards over processes: each holds V / P rows of the vocabulary and all rows of states.

With x = z_q + (alpha_0 - center) z_b, the operation on a shard, where the actions of the others are
masked, gives X_s = alpha_tilde lse_s(x / alpha_tilde) over its columns and b_s = lse_s(z_b). Six
floats a row are gathered, and every process has

    b = lse(b_s)      X = alpha_tilde lse(X_s / alpha_tilde)      V = X - alpha_0 b      q = sum q_s

The own slot is the live tensor, so that autograd has dX/dX_s = exp((X_s - X) / alpha_tilde); times
the shard's dX_s/dh = p_s W_s that is the softmax over the whole vocabulary. The gradients of the
hidden states are added up over the shards: one collective forward, one backward.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from qadapter.outputs import ResidualValues

NEG_INF = float("-inf")


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
    if group is None or isinstance(vocab_offset, bool) or not isinstance(vocab_offset, int):
        raise ValueError(
            "group, vocab_offset: expected both, a process group and the id of the first row of "
            f"this shard of the head, got {group!r} and {vocab_offset!r}"
        )
    if vocab_offset < 0:
        raise ValueError(f"vocab_offset: expected 0 or more, got {vocab_offset}")
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
    slots = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(slots, own.detach(), group=group)
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
