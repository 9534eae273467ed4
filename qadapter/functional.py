"""The stateless public API: fused operations on logits and on per-token values.

Rows are flat: row n is one state s_n, its action is ``actions[n]``. Sequences are consecutive rows,
delimited by ``cu_seqlens``; the P chosen responses come first, then the P rejected ones. Equations
are those of Q-Adapter (arXiv 2407.03856); `qadapter.reference` is the same in plain PyTorch.
"""

import torch
from torch import Tensor

from qadapter import _checks, ops  # noqa: F401  (ops registers torch.ops.qadapter)
from qadapter.functional_linear import linear_qadapter_loss, linear_residual_values
from qadapter.outputs import PreferenceLoss, ResidualValues, Sample
from qadapter.sampling import sample

__all__ = [
    "PreferenceLoss",
    "ResidualValues",
    "Sample",
    "linear_qadapter_loss",
    "linear_residual_values",
    "preference_loss",
    "qadapter_loss",
    "residual_values",
    "sample",
]


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
    """Q(s, a), V(s) and both log-probabilities of the actions, in one read of each logits tensor.

    With z_b, z_q the two logits and m = alpha_0 - center:

        q     = z_q[a] - center * z_b[a]
        value = alpha_tilde * lse((z_q + m z_b) / alpha_tilde) - alpha_0 * lse(z_b)

    Args:
        base_logits: [N, V], the frozen base's logits; no gradient ever flows to them. None is
            allowed where m == 0 and both ``base_lse`` and ``base_logp`` are given.
        q_logits: [N, V], float32, bfloat16 or float16 (float64 on the torch backend, which then
            returns float64); any row stride. Logits of -inf are masked tokens.
        actions: int64 [N], token ids; -100 marks a row without action, whose q, base_logp and
            policy_logp are 0 and whose value is still given.
        alpha_0, alpha_tilde: entropy weights of the base and of the composed policy (paper's
            alpha_0 and alpha-tilde).
        center: 1 if q_logits hold z_b + Q, 0 if they hold Q itself.
        base_lse, base_logp: float32 [N], known logsumexp and log-probability of the base.

    Returns:
        `ResidualValues`, float32 [N]; q, value and policy_logp are differentiable w.r.t. q_logits.

    Raises:
        ValueError: a shape, dtype, device or parameter that does not fit, named. An action out of
            range is an error on a CPU; on a GPU, where looking would stall, it gives NaN in its
            row. So does, on any device, a row with a NaN or without a finite logit.
    """
    alpha_0, alpha_tilde, center = _checks.composition(alpha_0, alpha_tilde, center)
    _checks.statistics(base_logits, q_logits, actions, base_lse, base_logp, alpha_0 - center)
    q, value, base_logp, policy_logp, base_lse, _, _ = torch.ops.qadapter.residual_fwd(
        base_logits, q_logits, actions, base_lse, base_logp, alpha_0, alpha_tilde, center
    )
    return ResidualValues(q, value, base_logp.detach(), policy_logp, base_lse.detach())


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
    """Bradley-Terry loss and squared-reward regulariser on per-token values.

    r_t = q_t - gamma * V(s_{t+1}) with V = 0 after the last row of a sequence (inverse soft Bellman
    operator); R = mean (or sum) of r over the response; loss = mean over pairs of
    -log sigmoid(bt_scale * (R_chosen - R_rejected)) + reg_coef * mean of r^2 over all actions.

    Args:
        values: of `residual_values`; only ``q`` and ``value`` are used, float32 [N].
        actions: int64 [N]; rows with -100 have no reward (their value still counts for the row
            before: the end of a truncated response).
        cu_seqlens: int32 or int64 [2P+1]; sequences 0..P-1 chosen, P..2P-1 rejected, pair i is
            (i, P+i).
        gamma: discount of the Bellman operator.
        reg_coef: weight of the regulariser (``beta`` of the released code).
        bt_scale: inverse temperature of Bradley-Terry; reported rewards and margins are unscaled.
        value_at: "next" is the maths; "same" takes V(s_t), as the released code does.
        length_norm: "response" takes the mean over the response's actions, "none" the sum. A
            sequence without actions has R = 0.
        denominators: float32 [2], numbers of pairs and of actions to divide by instead of this
            batch's own: the totals of a gradient-accumulated batch.

    Returns:
        `PreferenceLoss`; only ``loss`` carries a gradient. Nothing is copied to the host.

    Raises:
        ValueError: arguments that do not fit, named; on a CPU also cu_seqlens that do not run from
            0 to N in non-decreasing steps (on a GPU the loss is NaN then).
    """
    q, value = values.q, values.value
    _checks.tensor("values.q", q, 1, (torch.float32, torch.float64))
    _checks.same("values.value", value, "values.q", q)
    _checks.tensor("actions", actions, 1, (torch.int64,))
    _checks.rows("actions", actions, q.shape[0], q.device, "values")
    _checks.sequences(cu_seqlens, q.device)
    _checks.denominators(denominators, q.device)
    arguments = _checks.preference(gamma, reg_coef, bt_scale, value_at, length_norm)
    return PreferenceLoss.of(
        torch.ops.qadapter.preference_fwd(q, value, actions, cu_seqlens, denominators, *arguments)
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
    """The whole Q-Adapter loss from logits: `preference_loss` of `residual_values`, fused.

    Arguments, result and errors are those of the two functions. Forward reads each logits tensor
    once and keeps four floats a row; backward reads each once more and writes the gradient of
    ``q_logits``, the only [N, V] tensor that is made.
    """
    composition = _checks.composition(alpha_0, alpha_tilde, center)
    _checks.statistics(base_logits, q_logits, actions, base_lse, base_logp, alpha_0 - center)
    _checks.sequences(cu_seqlens, q_logits.device)
    _checks.denominators(denominators, q_logits.device)
    arguments = _checks.preference(gamma, reg_coef, bt_scale, value_at, length_norm)
    return PreferenceLoss.of(
        torch.ops.qadapter.loss_fwd(
            base_logits,
            q_logits,
            actions,
            cu_seqlens,
            base_lse,
            base_logp,
            denominators,
            *composition,
            *arguments,
        )
    )
