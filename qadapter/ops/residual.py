"""The operations on logits, torch.ops.qadapter.residual_fwd, residual_bwd and loss_fwd.

residual_fwd    statistics of both streams, one read of each logits tensor
residual_bwd    coef_p * pi + coef_a * onehot(a), the gradient of any loss on (q, value, logp)
loss_fwd        residual_fwd and preference_fwd in one call
"""

from typing import Any

import torch
from torch import Tensor

from qadapter.ops import backends, library, residual_torch
from qadapter.ops.library import COMPOSITION, PREFERENCE, dense, rows_dense, statistics
from qadapter.ops.preference import preference_fwd, report_fake


def _residual_fwd(
    base_logits: Tensor | None,
    q_logits: Tensor,
    actions: Tensor,
    base_lse: Tensor | None,
    base_logp: Tensor | None,
    alpha_0: float,
    alpha_tilde: float,
    center: float,
) -> tuple[Tensor, ...]:
    library.check_actions(actions, q_logits.shape[1])
    return backends.implementation(q_logits, residual_torch.residual_fwd)(
        rows_dense(base_logits),
        rows_dense(q_logits),
        actions.contiguous(),
        dense(base_lse),
        dense(base_logp),
        alpha_0,
        alpha_tilde,
        center,
    )


def _residual_bwd(
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
    return backends.implementation(q_logits, residual_torch.residual_bwd)(
        rows_dense(base_logits),
        rows_dense(q_logits),
        actions.contiguous(),
        shift,
        log_sum,
        coef_p.contiguous(),
        coef_a.contiguous(),
        alpha_0,
        alpha_tilde,
        center,
    )


def _loss_fwd(
    base_logits: Tensor | None,
    q_logits: Tensor,
    actions: Tensor,
    cu_seqlens: Tensor,
    base_lse: Tensor | None,
    base_logp: Tensor | None,
    denominators: Tensor | None,
    alpha_0: float,
    alpha_tilde: float,
    center: float,
    gamma: float,
    reg_coef: float,
    bt_scale: float,
    value_next: bool,
    length_mean: bool,
) -> tuple[Tensor, ...]:
    library.check_cu_seqlens(cu_seqlens, q_logits.shape[0])
    q, value, _, _, _, shift, log_sum = _residual_fwd(
        base_logits, q_logits, actions, base_lse, base_logp, alpha_0, alpha_tilde, center
    )
    preference = (gamma, reg_coef, bt_scale, value_next, length_mean)
    *report, grad_q, grad_value = preference_fwd(
        q, value, actions, cu_seqlens, denominators, *preference
    )
    return (*report, shift, log_sum, grad_value, grad_q)


# Fakes: shapes and dtypes only.


def _residual_fwd_fake(base_logits: Any, q_logits: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(statistics(q_logits, q_logits.shape[0]) for _ in range(7))


def _residual_bwd_fake(base_logits: Any, q_logits: Tensor, *_: Any) -> Tensor:
    return q_logits.new_empty(q_logits.shape)


def _loss_fwd_fake(
    base_logits: Any, q_logits: Tensor, actions: Tensor, cu_seqlens: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    rows = (statistics(q_logits, q_logits.shape[0]) for _ in range(4))
    return (*report_fake(q_logits, cu_seqlens), *rows)


# Autograd.


def _residual_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    base_logits, q_logits, actions, _, _, alpha_0, alpha_tilde, center = inputs
    ctx.save_for_backward(base_logits, q_logits, actions, output[5], output[6])
    ctx.composition = (alpha_0, alpha_tilde, center)


def _residual_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    base_logits, q_logits, actions, shift, log_sum = ctx.saved_tensors
    grad_q, grad_value, grad_logp = grads[0], grads[1], grads[3]
    zero = torch.zeros_like(shift)
    # A row without action has constant q and policy_logp, so their gradient goes nowhere.
    has_action = actions != -100
    coef_a = zero if grad_q is None else torch.where(has_action, grad_q, 0)
    coef_p = zero if grad_value is None else grad_value
    if grad_logp is not None:
        scaled = torch.where(has_action, grad_logp, 0) / ctx.composition[1]
        coef_a, coef_p = coef_a + scaled, coef_p - scaled
    grad = torch.ops.qadapter.residual_bwd(
        base_logits, q_logits, actions, shift, log_sum, coef_p, coef_a, *ctx.composition
    )
    return (None, grad, *(None,) * 6)


def _loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], inputs[2], *output[7:])
    ctx.composition = inputs[7:10]


def _loss_backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    base_logits, q_logits, actions, shift, log_sum, coef_p, coef_a = ctx.saved_tensors
    grad = torch.ops.qadapter.residual_bwd(
        base_logits,
        q_logits,
        actions,
        shift,
        log_sum,
        coef_p * grad_loss,
        coef_a * grad_loss,
        *ctx.composition,
    )
    return (None, grad, *(None,) * 13)


library.define(
    "residual_fwd(Tensor? base_logits, Tensor q_logits, Tensor actions, Tensor? base_lse, "
    f"Tensor? base_logp, {COMPOSITION}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _residual_fwd,
    _residual_fwd_fake,
    _residual_backward,
    _residual_setup,
)
library.define(
    "residual_bwd(Tensor? base_logits, Tensor q_logits, Tensor actions, Tensor shift, "
    f"Tensor log_sum, Tensor coef_p, Tensor coef_a, {COMPOSITION}) -> Tensor",
    _residual_bwd,
    _residual_bwd_fake,
    library.no_second_derivative,
)
library.define(
    "loss_fwd(Tensor? base_logits, Tensor q_logits, Tensor actions, Tensor cu_seqlens, "
    f"Tensor? base_lse, Tensor? base_logp, Tensor? denominators, {COMPOSITION}, {PREFERENCE}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _loss_fwd,
    _loss_fwd_fake,
    _loss_backward,
    _loss_setup,
)
