"""KL(pi_base || pi) over the whole vocabulary, from moments of the base that are made once.

With p_b the base's distribution in a state, W the frozen head and s its logit scale, let

    u = s W^T p_b      e = E_pb[z_b]      c = E_pb[s bias]

Logits are linear in the hidden state, so E_pb[z_q] = u . h_q + c, and with the soft value V of the
composed policy

    KL(p_b || pi) = (V - E_pb[z_q] + (alpha_tilde - alpha_0 + center) e
                       - (alpha_tilde - alpha_0) lse_b) / alpha_tilde
    dKL/dh_q      = (s W^T pi - u) / alpha_tilde

`QF.linear_residual_values` has V, and s W^T pi is what its backward makes anyway: a state whose KL
is wanted is one more row of that operation, with action -100. Published in this form nowhere that
we know of; `qadapter.reference.kl_base_policy` is the definition.
"""

from typing import Any

import torch
from torch import Tensor

from qadapter.ops import checks, linear
from qadapter.outputs import BaseMoments


def base_moments(
    base_hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    chunk_size: int | None = None,
) -> BaseMoments:
    """What `kl_to_base` needs of the base in each state: of p_b = softmax(z_b), once, to be kept.

    Costs two products of 2 N D V FLOPs in float32, and for 16-bit hidden states two more in their
    own dtype; no [N, V] tensor is made.

    Args:
        base_hidden: [N, D], last hidden states of the base: float32, bfloat16 or float16 (float64
            on the torch backend).
        weight: [V, D], the frozen head; bias [V], entries of -inf are masked tokens. Soft caps are
            not linear in the hidden state: see `qadapter.reference.kl_base_policy` for those.
        logit_scale: what the model multiplies its logits with.
        chunk_size: as in `QF.linear_residual_values`.

    Returns:
        `BaseMoments` in float32 (float64 where an input is), without gradient. Sums run over
        unrounded probabilities whatever the dtype: KL is a small difference of large numbers.

    Raises:
        ValueError: an argument that does not fit, named.
    """
    scale, _ = checks.head(logit_scale, None)
    chunking = checks.chunk(chunk_size, None)
    checks.tensor("base_hidden", base_hidden, 2, checks.LOGIT_DTYPES)
    checks.tensor("weight", weight, 2, checks.LOGIT_DTYPES)
    if bias is not None:
        checks.tensor("bias", bias, 1, checks.LOGIT_DTYPES)
    hidden, head, bias = (
        None if given is None else given.detach()
        for given in (*linear.autocast(base_hidden, weight), bias)
    )
    assert hidden is not None and head is not None
    actions = torch.full((hidden.shape[0],), -100, device=hidden.device)
    like = torch.float64 if torch.float64 in (hidden.dtype, head.dtype) else torch.float32
    nothing = torch.zeros(hidden.shape[0], dtype=like, device=hidden.device)
    checks.linear_statistics(
        None, hidden, head, actions, bias, nothing, nothing, 0.0, q_name="base_hidden"
    )

    def lse_and_row(hidden: Tensor, head: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        # One stream alone: with alpha_0 = center = 0 the value is its logsumexp.
        composition = (0.0, 1.0, 0.0)
        _, value, *_, row = torch.ops.qadapter.linear_fwd(
            *(None, hidden, head, actions, bias, nothing, nothing),
            *(*composition, scale, 0.0, *chunking, True),
        )
        return value, row

    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        wide = hidden.to(like)
        if bias is None:
            own_lse, row = lse_and_row(wide, head, None)
            mean_bias = torch.zeros_like(nothing)
        else:
            # The bias as one more column of the head, which the hidden states are 0 in.
            column = torch.where(bias.isneginf(), 0, bias).to(like)[:, None]
            own_lse, row = lse_and_row(
                torch.cat((wide, nothing[:, None]), 1), torch.cat((head.to(like), column), 1), bias
            )
            mean_bias, row = row[:, -1].contiguous(), row[:, :-1].contiguous()
        gradient_row = row
        if hidden.dtype != like:
            # As the adapter stream's statistics are made, so that equal streams cancel.
            own_lse, gradient_row = lse_and_row(hidden, head, bias)
    mean_logit = (row * wide).sum(-1) + mean_bias
    return BaseMoments(own_lse, mean_logit, row, mean_bias, gradient_row)


def kl_to_base(
    value: Tensor,
    q_hidden: Tensor,
    moments: BaseMoments,
    *,
    alpha_0: float = 1.0,
    alpha_tilde: float = 1.0,
    center: float = 1.0,
) -> Tensor:
    """KL(pi_base || pi) of each row in nats, exact over the whole vocabulary.

    Where both streams are equal and alpha_0 = alpha_tilde, center = 1, it is 0 with gradient 0
    exactly (moments straight from `base_moments`, made for these rows).

    Args:
        value: [N], of `QF.linear_residual_values` for these rows with the same alpha_0,
            alpha_tilde, center and head; the rows' actions do not matter. Give it the base's hidden
            states where alpha_0 != center: with ``base_lse`` instead, 16-bit streams are mixed
            before the product, and KL loses digits.
        q_hidden: [N, D], the hidden states that it was given.
        moments: of the base in these rows, [N] and [N, D].
        alpha_0, alpha_tilde, center: see `QF.residual_values`.

    Returns:
        float32 [N] (float64 for float64), differentiable w.r.t. ``value`` and ``q_hidden``.
        Rounding can leave it some 1e-6 below 0.

    Raises:
        ValueError: an argument that does not fit, named.
    """
    alpha_0, alpha_tilde, center = checks.composition(alpha_0, alpha_tilde, center)
    checks.tensor("q_hidden", q_hidden, 2, checks.LOGIT_DTYPES)
    checks.tensor("value", value, 1, (torch.float32, torch.float64))
    checks.rows("value", value, q_hidden.shape[0], q_hidden.device, "q_hidden")
    if not isinstance(moments, BaseMoments):
        what = type(moments).__name__
        raise ValueError(f"moments: expected `BaseMoments`, as base_moments gives, got {what}")
    for name in ("lse", "mean_logit", "mean_bias"):
        field = checks.tensor(f"moments.{name}", getattr(moments, name), 1, (value.dtype,))
        checks.rows(f"moments.{name}", field, q_hidden.shape[0], q_hidden.device, "q_hidden")
    row = checks.tensor("moments.mean_row", moments.mean_row, 2, checks.LOGIT_DTYPES)
    checks.same("moments.mean_row", row, "q_hidden", q_hidden, dtype=False)
    (q_rows,) = linear.autocast(q_hidden)  # as the operation that gave the value took it
    mean_q = _MeanLogit.apply(q_rows, row, moments.gradient_row) + moments.mean_bias
    spread = alpha_tilde - alpha_0
    difference = mean_q - (spread + center) * moments.mean_logit
    return (value - difference - spread * moments.lse) / alpha_tilde


class _MeanLogit(torch.autograd.Function):
    """u . h [N]; its gradient is u as the linear operation rounds it, where that is known."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, row: Tensor, gradient_row: Tensor | None) -> Tensor:
        ctx.save_for_backward(row if gradient_row is None else gradient_row)
        ctx.dtype = hidden.dtype
        return (row * hidden.to(row.dtype)).sum(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (row,) = ctx.saved_tensors
        return (grad[:, None] * row.to(grad.dtype)).to(ctx.dtype), None, None
