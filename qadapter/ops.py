"""torch.library definitions: schemas, fake implementations and autograd of every operation.

This is the only place where operations are defined. Each is one opaque call for torch.compile, and
picks its implementation (`qadapter.backends`) when it runs. Values that can only be checked by
reading a tensor (actions in range, cu_seqlens that fit) are checked here for CPU tensors; on a GPU
that would stall the stream, so there a wrong value turns into NaN instead.

    residual_fwd    statistics of both streams, one read of each logits tensor
    residual_bwd    coef_p * pi + coef_a * onehot(a), the gradient of any loss on (q, value, logp)
    preference_fwd  rewards, segment sums, Bradley-Terry, regulariser, and d loss / d(q, value)
    loss_fwd        the first and the third in one call
"""

from typing import Any

import torch
from torch import Tensor

from qadapter import backends

_LIB = torch.library.Library("qadapter", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)

_COMPOSITION = "float alpha_0, float alpha_tilde, float center"
_PREFERENCE = "float gamma, float reg_coef, float bt_scale, bool value_next, bool length_mean"
_LIB.define(
    "residual_fwd(Tensor? base_logits, Tensor q_logits, Tensor actions, Tensor? base_lse, "
    f"Tensor? base_logp, {_COMPOSITION}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_LIB.define(
    "residual_bwd(Tensor? base_logits, Tensor q_logits, Tensor actions, Tensor shift, "
    f"Tensor log_sum, Tensor coef_p, Tensor coef_a, {_COMPOSITION}) -> Tensor",
    tags=_TAGS,
)
_LIB.define(
    "preference_fwd(Tensor q, Tensor value, Tensor actions, Tensor cu_seqlens, "
    f"Tensor? denominators, {_PREFERENCE}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_LIB.define(
    "loss_fwd(Tensor? base_logits, Tensor q_logits, Tensor actions, Tensor cu_seqlens, "
    f"Tensor? base_lse, Tensor? base_logp, Tensor? denominators, {_COMPOSITION}, {_PREFERENCE}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def _check_actions(actions: Tensor, vocab: int) -> None:
    if actions.device.type != "cpu" or actions.numel() == 0:
        return
    bad = (actions != -100) & ((actions < 0) | (actions >= vocab))
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"actions[{row}] = {int(actions[row])} is not a token id: expected 0 <= id < {vocab} "
            "(the size of the vocabulary), or -100 for a row without action"
        )


def _check_cu_seqlens(cu_seqlens: Tensor, num_rows: int) -> None:
    if cu_seqlens.device.type != "cpu" or cu_seqlens.numel() == 0:
        return
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != num_rows:
        raise ValueError(
            f"cu_seqlens runs from {first} to {last}, expected from 0 to the number of rows, "
            f"{num_rows}"
        )
    if (cu_seqlens[1:] < cu_seqlens[:-1]).any():
        raise ValueError("cu_seqlens decreases; expected the running sum of sequence lengths")


def _rows_dense(logits: Tensor | None) -> Tensor | None:
    """Kernels want stride 1 along the vocabulary; any row stride is fine."""
    if logits is None or logits.shape[1] <= 1 or logits.stride(1) == 1:
        return logits
    return logits.contiguous()


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
    _check_actions(actions, q_logits.shape[1])
    return backends.implementation(q_logits).residual_fwd(
        _rows_dense(base_logits),
        _rows_dense(q_logits),
        actions.contiguous(),
        None if base_lse is None else base_lse.contiguous(),
        None if base_logp is None else base_logp.contiguous(),
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
    return backends.implementation(q_logits).residual_bwd(
        _rows_dense(base_logits),
        _rows_dense(q_logits),
        actions.contiguous(),
        shift,
        log_sum,
        coef_p.contiguous(),
        coef_a.contiguous(),
        alpha_0,
        alpha_tilde,
        center,
    )


def _preference_fwd(
    q: Tensor,
    value: Tensor,
    actions: Tensor,
    cu_seqlens: Tensor,
    denominators: Tensor | None,
    gamma: float,
    reg_coef: float,
    bt_scale: float,
    value_next: bool,
    length_mean: bool,
) -> tuple[Tensor, ...]:
    _check_cu_seqlens(cu_seqlens, q.shape[0])
    return backends.implementation(q).preference_fwd(
        q.contiguous(),
        value.contiguous(),
        actions.contiguous(),
        cu_seqlens.contiguous(),
        denominators,
        gamma,
        reg_coef,
        bt_scale,
        value_next,
        length_mean,
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
    _check_cu_seqlens(cu_seqlens, q_logits.shape[0])
    q, value, _, _, _, shift, log_sum = _residual_fwd(
        base_logits, q_logits, actions, base_lse, base_logp, alpha_0, alpha_tilde, center
    )
    preference = (gamma, reg_coef, bt_scale, value_next, length_mean)
    *report, grad_q, grad_value = _preference_fwd(
        q, value, actions, cu_seqlens, denominators, *preference
    )
    return (*report, shift, log_sum, grad_value, grad_q)


# Fakes: shapes and dtypes only.


def _stats(like: Tensor, *shape: int) -> Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return like.new_empty(shape, dtype=dtype)


def _residual_fwd_fake(base_logits: Any, q_logits: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(_stats(q_logits, q_logits.shape[0]) for _ in range(7))


def _residual_bwd_fake(base_logits: Any, q_logits: Tensor, *_: Any) -> Tensor:
    return q_logits.new_empty(q_logits.shape)


def _report_fake(like: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    pairs = (cu_seqlens.shape[0] - 1) // 2
    scalars = [_stats(like) for _ in range(3)]
    per_pair = [_stats(like, pairs) for _ in range(3)]
    return [*scalars, *per_pair, _stats(like)]


def _preference_fwd_fake(
    q: Tensor, value: Tensor, actions: Tensor, cu_seqlens: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return (*_report_fake(q, cu_seqlens), _stats(q, q.shape[0]), _stats(q, q.shape[0]))


def _loss_fwd_fake(
    base_logits: Any, q_logits: Tensor, actions: Tensor, cu_seqlens: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    rows = (_stats(q_logits, q_logits.shape[0]) for _ in range(4))
    return (*_report_fake(q_logits, cu_seqlens), *rows)


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


def _preference_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[7], output[8])


def _preference_backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    grad_q, grad_value = ctx.saved_tensors
    return (grad_q * grad_loss, grad_value * grad_loss, *(None,) * 8)


def _no_second_derivative(ctx: Any, *_: Any) -> Any:
    raise RuntimeError("qadapter: second derivatives are not implemented (create_graph=True)")


for _name, _implementation, _fake in (
    ("residual_fwd", _residual_fwd, _residual_fwd_fake),
    ("residual_bwd", _residual_bwd, _residual_bwd_fake),
    ("preference_fwd", _preference_fwd, _preference_fwd_fake),
    ("loss_fwd", _loss_fwd, _loss_fwd_fake),
):
    _LIB.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qadapter::{_name}", _fake, lib=_LIB)

torch.library.register_autograd(
    "qadapter::residual_fwd", _residual_backward, setup_context=_residual_setup, lib=_LIB
)
torch.library.register_autograd("qadapter::residual_bwd", _no_second_derivative, lib=_LIB)
torch.library.register_autograd(
    "qadapter::preference_fwd", _preference_backward, setup_context=_preference_setup, lib=_LIB
)
torch.library.register_autograd(
    "qadapter::loss_fwd", _loss_backward, setup_context=_loss_setup, lib=_LIB
)
