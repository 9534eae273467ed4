"""torch.library definitions of the operations on hidden states, where logits never exist.

    linear_fwd       per-row statistics, and u = sum_{j != a} p_j W_j, from hidden states
    linear_bwd       coef_p u + (coef_p p_a + coef_a) W_a: the gradient of any loss on
                     (q, value, policy_logp), from what linear_fwd left
    linear_loss_fwd  linear_fwd and preference_fwd in one call

The head W is frozen, so the gradient of the hidden state is known in the forward up to two factors
a row: p @ W needs nothing from upstream. The action's column is held out of that product, which is
taken in 16 bits where the weights have 16: with coef_a close to -coef_p and p_a close to 1 the two
terms of that column would cancel after rounding.
"""

from typing import Any

import torch
from torch import Tensor

from qadapter.ops import backends, library, linear_torch
from qadapter.ops.library import COMPOSITION, PREFERENCE, dense, rows_dense
from qadapter.ops.preference import preference_fwd, report_fake

_INPUTS = (
    "Tensor? base_hidden, Tensor q_hidden, Tensor weight, Tensor actions, Tensor? bias, "
    "Tensor? base_lse, Tensor? base_logp"
)
_HEAD = "float logit_scale, float logit_softcap, int chunk_size, float memory_mib, bool need_grad"


def _rows_within(memory_mib: float, backend: str, vocab: int, dim: int, two_streams: bool) -> int:
    """Rows per chunk for a memory budget; 0, the backend's own choice, where none is given."""
    if memory_mib == 0:
        return 0
    if backend == "cpp":  # no logits at all: accumulators of both streams, per thread
        per_row = 16.0 * dim * torch.get_num_threads()
    else:
        per_row = 4 * vocab * (2.5 if two_streams else 1.5)
    return max(1, int(memory_mib * 2**20 / per_row))


def autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """What autocast does to the operands of a matrix product."""
    device = next(t for t in tensors if t is not None).device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def needs_grad(q_hidden: Tensor) -> bool:
    return torch.is_grad_enabled() and q_hidden.requires_grad


def _check_base_lse(base_logp: Tensor, base_lse: Tensor) -> None:
    """No token is more likely than 1; the tolerance is for statistics of 16-bit logits."""
    if base_logp.device.type != "cpu" or base_logp.numel() == 0:
        return
    bad = base_logp > 0.05 + 0.01 * base_lse.abs()
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"base_lse[{row}] = {float(base_lse[row]):g} gives the action of its row the "
            f"log-probability {float(base_logp[row]):g}, above 0: it comes from another base or "
            "from other rows"
        )


def _linear_fwd(
    base_hidden: Tensor | None,
    q_hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    bias: Tensor | None,
    base_lse: Tensor | None,
    base_logp: Tensor | None,
    alpha_0: float,
    alpha_tilde: float,
    center: float,
    logit_scale: float,
    logit_softcap: float,
    chunk_size: int,
    memory_mib: float,
    need_grad: bool,
) -> tuple[Tensor, ...]:
    vocab, dim = weight.shape
    library.check_actions(actions, vocab)
    wide = weight if weight.dtype == torch.float64 else q_hidden
    implementation = backends.implementation(wide, linear_torch.linear_fwd)
    if chunk_size == 0 and memory_mib:
        two_streams = alpha_0 != center
        chunk_size = _rows_within(memory_mib, backends.serving(wide), vocab, dim, two_streams)
    with torch.autocast(q_hidden.device.type, enabled=False):
        outputs = implementation(
            rows_dense(base_hidden),
            rows_dense(q_hidden),
            rows_dense(weight),
            actions.contiguous(),
            dense(bias),
            dense(base_lse),
            dense(base_logp),
            alpha_0,
            alpha_tilde,
            center,
            logit_scale,
            logit_softcap,
            chunk_size,
            need_grad,
        )
    if base_lse is not None:
        _check_base_lse(outputs[2], base_lse)
    return outputs


def _linear_bwd(
    u: Tensor,
    weight: Tensor,
    actions: Tensor,
    p_action: Tensor,
    slope_action: Tensor,
    coef_p: Tensor,
    coef_a: Tensor,
) -> Tensor:
    wide = weight if weight.dtype == torch.float64 else u
    return backends.implementation(wide, linear_torch.linear_bwd)(
        rows_dense(u),
        rows_dense(weight),
        actions.contiguous(),
        *(row.contiguous() for row in (p_action, slope_action, coef_p, coef_a)),
    )


def _linear_loss_fwd(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, cu_seqlens, denominators = arguments[:7], arguments[7], arguments[8]
    composition_and_head, preference = arguments[9:17], arguments[17:]
    actions = inputs[3]
    library.check_cu_seqlens(cu_seqlens, actions.shape[0])
    q, value, _, _, _, p_action, slope_action, u = _linear_fwd(*inputs, *composition_and_head)
    *report, grad_q, grad_value = preference_fwd(
        q, value, actions, cu_seqlens, denominators, *preference
    )
    return (*report, p_action, slope_action, u, grad_value, grad_q)


# Fakes: shapes and dtypes only.


def _like_statistics(q_hidden: Tensor, weight: Tensor) -> Tensor:
    wide = torch.float64 in (q_hidden.dtype, weight.dtype)
    return q_hidden.new_empty((), dtype=torch.float64 if wide else torch.float32)


def _linear_fwd_fake(
    base_hidden: Any, q_hidden: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    like, rows = _like_statistics(q_hidden, weight), q_hidden.shape[0]
    u = q_hidden.new_empty((rows if rest[-1] else 0, q_hidden.shape[1]))
    return (*(like.new_empty(rows) for _ in range(7)), u)


def _linear_bwd_fake(u: Tensor, *_: Any) -> Tensor:
    return u.new_empty(u.shape)


def _linear_loss_fwd_fake(*arguments: Any) -> tuple[Tensor, ...]:
    q_hidden, weight, cu_seqlens, need_grad = (
        arguments[1],
        arguments[2],
        arguments[7],
        arguments[16],
    )
    like, rows = _like_statistics(q_hidden, weight), q_hidden.shape[0]
    u = q_hidden.new_empty((rows if need_grad else 0, q_hidden.shape[1]))
    p_action, slope_action, grad_value, grad_q = (like.new_empty(rows) for _ in range(4))
    return (*report_fake(like, cu_seqlens), p_action, slope_action, u, grad_value, grad_q)


# Autograd.


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    weight, actions = inputs[2], inputs[3]
    ctx.save_for_backward(output[7], weight, actions, output[5], output[6])
    ctx.alpha_tilde, ctx.need_grad = inputs[8], inputs[14]


def _require_u(need_grad: bool) -> None:
    if not need_grad:
        raise RuntimeError("qadapter: called with need_grad=False, so that there is no gradient")


def _linear_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    _require_u(ctx.need_grad)
    u, weight, actions, p_action, slope_action = ctx.saved_tensors
    grad_q, grad_value, grad_logp = grads[0], grads[1], grads[3]
    zero = torch.zeros_like(p_action)
    has_action = actions != -100
    coef_a = zero if grad_q is None else torch.where(has_action, grad_q, 0)
    coef_p = zero if grad_value is None else grad_value
    if grad_logp is not None:
        scaled = torch.where(has_action, grad_logp, 0) / ctx.alpha_tilde
        coef_a, coef_p = coef_a + scaled, coef_p - scaled
    grad = torch.ops.qadapter.linear_bwd(u, weight, actions, p_action, slope_action, coef_p, coef_a)
    return (None, grad, *(None,) * 13)


def _linear_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    p_action, slope_action, u, grad_value, grad_q = output[7:]
    ctx.save_for_backward(u, inputs[2], inputs[3], p_action, slope_action, grad_value, grad_q)
    ctx.need_grad = inputs[16]


def _linear_loss_backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    _require_u(ctx.need_grad)
    u, weight, actions, p_action, slope_action, coef_p, coef_a = ctx.saved_tensors
    grad = torch.ops.qadapter.linear_bwd(
        u, weight, actions, p_action, slope_action, coef_p * grad_loss, coef_a * grad_loss
    )
    return (None, grad, *(None,) * 20)


library.define(
    f"linear_fwd({_INPUTS}, {COMPOSITION}, {_HEAD}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _linear_fwd,
    _linear_fwd_fake,
    _linear_backward,
    _linear_setup,
)
library.define(
    "linear_bwd(Tensor u, Tensor weight, Tensor actions, Tensor p_action, Tensor slope_action, "
    "Tensor coef_p, Tensor coef_a) -> Tensor",
    _linear_bwd,
    _linear_bwd_fake,
    library.no_second_derivative,
)
library.define(
    f"linear_loss_fwd({_INPUTS}, Tensor cu_seqlens, Tensor? denominators, {COMPOSITION}, {_HEAD}, "
    f"{PREFERENCE}) -> ({', '.join(['Tensor'] * 12)})",
    _linear_loss_fwd,
    _linear_loss_fwd_fake,
    _linear_loss_backward,
    _linear_loss_setup,
)
