"""What both torch operations, on logits and on hidden states, do with the statistics of a row."""

import torch
from torch import Tensor

NEG_INF = float("-inf")
NAN = float("nan")


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def finish_rows(
    actions: Tensor,
    vocab: int,
    q_action: Tensor,
    base_action: Tensor | None,
    x_action: Tensor | None,
    policy_sum: tuple[Tensor, Tensor],
    base_sum: tuple[Tensor, Tensor] | None,
    base_lse: Tensor | None,
    base_logp: Tensor | None,
    composition: tuple[float, float, float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The outputs of a row from its action's logits and its (shift, log_sum) pairs. All [N].

    ``x_action`` is the action's mixed logit, where it is not to be formed from the other two.
    """
    alpha_0, alpha_tilde, center = composition
    m = alpha_0 - center
    shift, log_sum = policy_sum
    dtype = shift.dtype
    has_action = actions != -100
    in_range = (actions >= 0) & (actions < vocab)

    if base_lse is None:
        assert base_sum is not None and base_action is not None
        base_lse = base_sum[0] + base_sum[1]
        logp = (base_action - base_sum[0]) - base_sum[1]
    else:
        base_lse = base_lse.to(dtype, copy=True)
        logp = base_lse if base_action is None else base_action - base_lse
    base_logp = logp if base_logp is None else base_logp.to(dtype, copy=True)
    if base_action is None:
        base_action = base_logp + base_lse

    value = shift + alpha_tilde * log_sum
    if alpha_0 != 0:
        value = value - alpha_0 * base_lse
    q = q_action
    if center != 0:
        q = (q_action - center * base_action).masked_fill(q_action == NEG_INF, NEG_INF)
    if x_action is None:
        x_action = q_action
        if m != 0:
            masked = (q_action == NEG_INF) | (base_action == NEG_INF)
            x_action = (q_action + m * base_action).masked_fill(masked, NEG_INF)
    policy_logp = (x_action - shift) / alpha_tilde - log_sum

    bad = has_action & ~in_range
    poison = torch.where(bad | log_sum.isnan(), NAN, 0.0)
    return (
        torch.where(has_action, q + poison, 0),
        value + torch.where(bad, NAN, 0.0),
        torch.where(has_action, base_logp + torch.where(bad, NAN, 0.0), 0),
        torch.where(has_action, policy_logp + poison, 0),
        base_lse,
        shift,
        log_sum,
    )
