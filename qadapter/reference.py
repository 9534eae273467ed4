"""The specification: every public operation in plain PyTorch, gradients by autograd.

Nothing here is fast. Everything is computed in the dtype that comes in, so the same function is the
oracle (float64) and the same-dtype eager baseline that tolerances are taken from. Formulas follow
Q-Adapter (Li et al., ICLR 2025, arXiv 2407.03856):

    Q(s,a)   = z_q[a] - center * z_b[a]
    pi(a|s)  = softmax_a((Q(s,a) + alpha_0 * log pi_base(a|s)) / alpha_tilde)
    V(s)     = alpha_tilde * logsumexp_a((Q(s,a) + alpha_0 * log pi_base(a|s)) / alpha_tilde)
    r(s,a)   = Q(s,a) - gamma * V(s'),   V(terminal) = 0
    loss     = -log sigmoid(bt_scale * (R_chosen - R_rejected)) + reg_coef * mean(r^2)

With m = alpha_0 - center the sum Q + alpha_0 * log pi_base is z_q + m * z_b - alpha_0 * lse(z_b),
so V = alpha_tilde * lse((z_q + m * z_b) / alpha_tilde) - alpha_0 * lse(z_b).

Masked tokens: a logit of -inf in a stream that enters with a non-zero weight has probability 0.
With m = 0 the base does not enter the policy's logits, so a mask in the base alone does nothing. A
row without any token left, in the policy or in the base, is NaN.
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qadapter.outputs import BaseMoments, PreferenceLoss, ResidualValues

NEG_INF = float("-inf")


def policy_logits(
    base_logits: Tensor | None, q_logits: Tensor, alpha_0: float, alpha_tilde: float, center: float
) -> Tensor:
    """(z_q + m z_b) / alpha_tilde: the policy's logits up to a constant per row. [N, V]."""
    m = alpha_0 - center
    if m == 0:
        return q_logits / alpha_tilde
    assert base_logits is not None
    masked = (q_logits == NEG_INF) | (base_logits == NEG_INF)
    return (q_logits + m * base_logits).masked_fill(masked, NEG_INF) / alpha_tilde


def _take(rows: Tensor, actions: Tensor) -> Tensor:
    return rows.gather(-1, actions.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def residual_values(
    base_logits: Tensor | None,
    q_logits: Tensor,
    actions: Tensor,
    *,
    alpha_0: float = 1.0,
    alpha_tilde: float = 1.0,
    center: float = 1.0,
    base_lse: Tensor | None = None,
    base_logp: Tensor | None = None,
) -> ResidualValues:
    """`qadapter.functional.residual_values`, computed and returned in the dtype of the logits."""
    has_action = actions >= 0
    if base_logits is not None:
        base_logits = base_logits.detach()
        base_action = _take(base_logits, actions)
        if base_lse is None:
            base_lse = torch.logsumexp(base_logits, -1)
            base_lse = base_lse.masked_fill(base_lse == NEG_INF, float("nan"))
        if base_logp is None:
            base_logp = base_action - base_lse
    else:
        assert base_lse is not None and base_logp is not None
        base_action = base_logp + base_lse

    c = policy_logits(base_logits, q_logits, alpha_0, alpha_tilde, center)
    lse = torch.logsumexp(c, -1)
    lse = lse.masked_fill(lse == NEG_INF, float("nan"))
    value = alpha_tilde * lse
    if alpha_0 != 0:
        value = value - alpha_0 * base_lse

    q = q_action = _take(q_logits, actions)
    if center != 0:
        q = (q_action - center * base_action).masked_fill(q_action == NEG_INF, NEG_INF)
    policy_logp = _take(c, actions) - lse
    poison = torch.where(lse.isnan(), lse.detach(), 0)
    return ResidualValues(
        q=torch.where(has_action, q + poison, 0),
        value=value,
        base_logp=torch.where(has_action, base_logp, 0),
        policy_logp=torch.where(has_action, policy_logp, 0),
        base_lse=base_lse,
    )


def head_logits(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> Tensor:
    """[N, V] logits of a language-model head: cap(logit_scale * (hidden W^T + bias))."""
    logits = F.linear(hidden, weight, bias) * logit_scale
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    return logits


def linear_residual_values(
    base_hidden: Tensor | None,
    q_hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    **kwargs: Any,
) -> ResidualValues:
    """`qadapter.functional.linear_residual_values`: the logits, then `residual_values`."""

    def logits(hidden: Tensor) -> Tensor:
        return head_logits(
            hidden, weight, bias=bias, logit_scale=logit_scale, logit_softcap=logit_softcap
        )

    base = None if base_hidden is None else logits(base_hidden.detach())
    return residual_values(base, logits(q_hidden), actions, **kwargs)


def preference_loss(
    values: ResidualValues,
    actions: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float = 1.0,
    reg_coef: float = 0.1,
    bt_scale: float = 1.0,
    value_at: str = "next",
    length_norm: str = "response",
    denominators: Tensor | None = None,
) -> PreferenceLoss:
    """`qadapter.functional.preference_loss`, one sequence at a time."""
    bounds = cu_seqlens.tolist()
    num_pairs = (len(bounds) - 1) // 2
    zero = values.q.new_zeros(())
    returns, squares, count = [], zero, 0
    for start, end in itertools.pairwise(bounds):
        q, value = values.q[start:end], values.value[start:end]
        if value_at == "next":
            value = torch.cat([value[1:], value.new_zeros(min(1, end - start))])
        has_action = actions[start:end] != -100
        r = (q - gamma * value)[has_action]
        total = r.sum()
        if length_norm == "response":
            total = total / max(1, r.numel())
        returns.append(total)
        squares = squares + r.square().sum()
        count += r.numel()
    rewards = torch.stack(returns) if returns else values.q.new_zeros(0)
    chosen, rejected = rewards[:num_pairs], rewards[num_pairs:]
    margins = chosen - rejected
    pair_count, action_count = float(max(1, num_pairs)), float(max(1, count))
    if denominators is not None:
        pair_count, action_count = denominators.clamp(min=1).tolist()
    bt_loss = -F.logsigmoid(bt_scale * margins).sum() / pair_count
    reg_loss = squares / action_count
    return PreferenceLoss(
        loss=bt_loss + reg_coef * reg_loss,
        bt_loss=bt_loss.detach(),
        reg_loss=reg_loss.detach(),
        chosen_rewards=chosen.detach(),
        rejected_rewards=rejected.detach(),
        margins=margins.detach(),
        accuracy=(margins > 0).to(margins.dtype).sum().detach() / max(1, num_pairs),
    )


def qadapter_loss(
    base_logits: Tensor | None,
    q_logits: Tensor,
    actions: Tensor,
    cu_seqlens: Tensor,
    *,
    alpha_0: float = 1.0,
    alpha_tilde: float = 1.0,
    center: float = 1.0,
    base_lse: Tensor | None = None,
    base_logp: Tensor | None = None,
    gamma: float = 1.0,
    reg_coef: float = 0.1,
    bt_scale: float = 1.0,
    value_at: str = "next",
    length_norm: str = "response",
    denominators: Tensor | None = None,
) -> PreferenceLoss:
    """`qadapter.functional.qadapter_loss`: the two functions above, one after the other."""
    values = residual_values(
        base_logits,
        q_logits,
        actions,
        alpha_0=alpha_0,
        alpha_tilde=alpha_tilde,
        center=center,
        base_lse=base_lse,
        base_logp=base_logp,
    )
    return preference_loss(
        values,
        actions,
        cu_seqlens,
        gamma=gamma,
        reg_coef=reg_coef,
        bt_scale=bt_scale,
        value_at=value_at,
        length_norm=length_norm,
        denominators=denominators,
    )


def filtered_logprobs(
    base_logits: Tensor | None,
    q_logits: Tensor,
    *,
    alpha_0: float = 1.0,
    alpha_tilde: float = 1.0,
    center: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """Log-probabilities [B, V] of the distribution that `qadapter.functional.sample` draws from.

    Temperature first, then top-k, then top-p of what is left, then min-p, each on renormalised
    probabilities, as transformers' processors do. Ties are resolved for the lowest token id. At
    temperature 0 the filters act on the policy at temperature 1.
    """
    c = policy_logits(base_logits, q_logits, alpha_0, alpha_tilde, center)
    c = c / (temperature or 1.0)
    sorted_c, order = torch.sort(c, dim=-1, descending=True, stable=True)
    rank = torch.arange(c.shape[-1], device=c.device)
    keep = torch.ones_like(sorted_c, dtype=torch.bool)
    if top_k > 0:
        keep &= rank < top_k
    if top_p < 1.0:
        probs = torch.softmax(sorted_c.masked_fill(~keep, NEG_INF), -1)
        keep &= (probs.cumsum(-1) - probs < top_p) | (rank == 0)
    if min_p > 0.0:
        probs = torch.softmax(sorted_c.masked_fill(~keep, NEG_INF), -1)
        keep &= (probs >= min_p * probs[..., :1]) | (rank == 0)
    kept = torch.zeros_like(keep).scatter(-1, order, keep)
    return torch.log_softmax(c.masked_fill(~kept, NEG_INF), -1)


def kl_base_policy(
    base_logits: Tensor, q_logits: Tensor, *, alpha_0: float, alpha_tilde: float, center: float
) -> Tensor:
    """KL(pi_base || pi) of each row, nats, [N]."""
    base_logp = torch.log_softmax(base_logits, -1)
    c = policy_logits(base_logits, q_logits, alpha_0, alpha_tilde, center)
    terms = base_logp.exp() * (base_logp - torch.log_softmax(c, -1))
    return terms.masked_fill(base_logp == NEG_INF, 0.0).sum(-1)


def base_moments(
    base_hidden: Tensor, weight: Tensor, *, bias: Tensor | None = None, logit_scale: float = 1.0
) -> BaseMoments:
    """Of p_b = softmax(z_b) with z_b = logit_scale (h W^T + bias): logsumexp, E[z_b],
    logit_scale W^T p_b and E[logit_scale bias], by the [N, V] probabilities."""
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    logits = logit_scale * (base_hidden @ weight.T + bias)
    p = torch.softmax(logits, -1)
    finite = torch.where(bias == NEG_INF, 0.0, logit_scale * bias)
    row = logit_scale * p @ weight
    mean_bias = p @ finite
    return BaseMoments(
        torch.logsumexp(logits, -1), (row * base_hidden).sum(-1) + mean_bias, row, mean_bias
    )


def kl_to_base(
    base_hidden: Tensor,
    q_hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    alpha_0: float,
    alpha_tilde: float,
    center: float,
) -> Tensor:
    """What `QF.kl_to_base` gives, [N]: `kl_base_policy` of the logits."""
    base_logits, q_logits = (
        logit_scale * (hidden @ weight.T + (0.0 if bias is None else bias))
        for hidden in (base_hidden, q_hidden)
    )
    return kl_base_policy(
        base_logits, q_logits, alpha_0=alpha_0, alpha_tilde=alpha_tilde, center=center
    )


def released_loss(
    base_logits: Tensor,
    q_logits: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    *,
    alpha_0: float,
    alpha_tilde: float,
    gamma: float,
    beta: float,
) -> Tensor:
    """The number that the paper's released research code computes, for comparison only.

    ``base_logits``, ``q_logits`` [2P, T, V], the chosen rows first; ``input_ids``,
    ``attention_mask``, ``labels`` [2P, T], labels -100 on the prompt. Returns a scalar. Kept are
    its departures from the paper's equations:

    - the value is taken at s_t, not at s_{t+1};
    - the mask is that of token t, while the reward at index t is the one of token t + 1: the first
      response token is dropped and, in rows shorter than T, one padding token is scored;
    - both returns are divided by the padded length T - 1, whatever the length of the responses;
    - Q is the adapter's raw logits (``center`` = 0).
    """
    compute = torch.promote_types(q_logits.dtype, torch.float32)
    q_all = q_logits.to(compute)
    base_logp = torch.log_softmax(base_logits.detach().to(compute), -1)
    values = alpha_tilde * torch.logsumexp((q_all + alpha_0 * base_logp) / alpha_tilde, -1)
    q = q_all[:, :-1].gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    rewards = q - gamma * values[:, :-1]
    mask = (attention_mask.bool() & (labels != -100))[:, :-1].to(compute)
    returns = (rewards * mask).sum(1) / rewards.shape[1]
    chosen, rejected = returns.chunk(2)
    pref_loss = -F.logsigmoid(chosen - rejected).mean()
    return pref_loss + beta * (rewards.square() * mask).sum() / mask.sum()
