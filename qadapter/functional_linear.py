"""The public operations on hidden states: the head's logits never exist. See `functional`."""

import torch
from torch import Tensor

from qadapter import _checks, ops_linear  # noqa: F401  (registers torch.ops.qadapter.linear_*)
from qadapter.outputs import PreferenceLoss, ResidualValues


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """What autocast does to the operands of a matrix product."""
    device = next(t for t in tensors if t is not None).device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def _needs_grad(q_hidden: Tensor) -> bool:
    return torch.is_grad_enabled() and q_hidden.requires_grad


def linear_residual_values(
    base_hidden: Tensor | None,
    q_hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    *,
    bias: Tensor | None = None,
    alpha_0: float = 1.0,
    alpha_tilde: float = 1.0,
    center: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    base_lse: Tensor | None = None,
    base_logp: Tensor | None = None,
    chunk_size: int | None = None,
    memory_mib: float | None = None,
) -> ResidualValues:
    """`residual_values` from hidden states and a frozen head, without the logits.

    The logits of a row would be cap(logit_scale * (hidden W^T + bias)) with
    cap(s) = logit_softcap * tanh(s / logit_softcap). They are formed in float32 for a few rows (on
    the cpp backend for a few columns) at a time and reduced at once. As the head has no gradient,
    that of the hidden state is known in the forward up to two factors a row, whatever the loss on
    (q, value, policy_logp): forward costs three matrix products of 2 N D V FLOPs, or two where the
    base's logits are not needed; backward next to nothing.

    Args:
        base_hidden: [N, D], last hidden states of the frozen base; no gradient ever flows to them.
            None is allowed where alpha_0 == center and ``base_lse`` and ``base_logp`` are given.
        q_hidden: [N, D], those of the adapter stream: float32, bfloat16 or float16 (float64 on the
            torch backend).
        weight: [V, D], the head, in the dtype of the hidden states or another one (then products
            are taken in float32). It must not require a gradient.
        actions: int64 [N], token ids; -100 marks a row without action.
        bias: [V]; entries of -inf are masked tokens (a soft cap makes them finite: -logit_softcap).
        alpha_0, alpha_tilde, center: see `residual_values`.
        logit_scale, logit_softcap: what the model does to its logits.
        base_lse, base_logp: float32 [N], known logsumexp and log-probability of the base. With
            ``base_lse`` one product less is taken: none for the base where alpha_0 == center, else
            one for both streams, on q_hidden + (alpha_0 - center) * base_hidden rounded to the
            hidden states' dtype. They must belong to this base and these rows: a wrong value
            shifts every result and cannot be noticed here.
        chunk_size: rows whose logits may exist at a time; default, as many as fit in 48 MiB on a
            CPU, 1 GiB on a GPU. The cpp backend takes it as an upper bound, and needs none.
        memory_mib: the same as a budget in MiB.

    Returns:
        `ResidualValues`, float32 [N]; q, value and policy_logp are differentiable w.r.t. q_hidden.
        Under autocast hidden states and head are cast as for any matrix product.

    Raises:
        ValueError: as `residual_values`; and for a ``weight`` or ``bias`` that requires a gradient.
    """
    alpha_0, alpha_tilde, center = _checks.composition(alpha_0, alpha_tilde, center)
    scale, softcap = _checks.head(logit_scale, logit_softcap)
    chunking = _checks.chunk(chunk_size, memory_mib)
    _checks.linear_statistics(
        base_hidden, q_hidden, weight, actions, bias, base_lse, base_logp, alpha_0 - center
    )
    base_hidden, q_rows, head_weight = _autocast(base_hidden, q_hidden, weight)
    assert q_rows is not None
    q, value, base_logp, policy_logp, base_lse, *_ = torch.ops.qadapter.linear_fwd(
        base_hidden,
        q_rows,
        head_weight,
        actions,
        bias,
        base_lse,
        base_logp,
        alpha_0,
        alpha_tilde,
        center,
        scale,
        softcap,
        *chunking,
        _needs_grad(q_rows),
    )
    return ResidualValues(q, value, base_logp.detach(), policy_logp, base_lse.detach())


def linear_qadapter_loss(
    base_hidden: Tensor | None,
    q_hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    cu_seqlens: Tensor,
    *,
    bias: Tensor | None = None,
    alpha_0: float = 1.0,
    alpha_tilde: float = 1.0,
    center: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    base_lse: Tensor | None = None,
    base_logp: Tensor | None = None,
    chunk_size: int | None = None,
    memory_mib: float | None = None,
    gamma: float = 1.0,
    reg_coef: float = 0.1,
    bt_scale: float = 1.0,
    value_at: str = "next",
    length_norm: str = "response",
    denominators: Tensor | None = None,
) -> PreferenceLoss:
    """The whole Q-Adapter loss from hidden states: `preference_loss` of `linear_residual_values`.

    Arguments, result and errors are those of the two functions. What is kept for backward is one
    [N, D] tensor and a few floats a row.
    """
    composition = _checks.composition(alpha_0, alpha_tilde, center)
    scale, softcap = _checks.head(logit_scale, logit_softcap)
    chunking = _checks.chunk(chunk_size, memory_mib)
    _checks.linear_statistics(
        base_hidden, q_hidden, weight, actions, bias, base_lse, base_logp, alpha_0 - center
    )
    _checks.sequences(cu_seqlens, q_hidden.device)
    _checks.denominators(denominators, q_hidden.device)
    preference = _checks.preference(gamma, reg_coef, bt_scale, value_at, length_norm)
    base_hidden, q_rows, head_weight = _autocast(base_hidden, q_hidden, weight)
    assert q_rows is not None
    outputs = torch.ops.qadapter.linear_loss_fwd(
        base_hidden,
        q_rows,
        head_weight,
        actions,
        bias,
        base_lse,
        base_logp,
        cu_seqlens,
        denominators,
        *composition,
        scale,
        softcap,
        *chunking,
        _needs_grad(q_rows),
        *preference,
    )
    return PreferenceLoss.of(outputs)
