"""The preference loss on per-token values: torch.ops.qadapter.preference_fwd.

preference_fwd  rewards, segment sums, Bradley-Terry, regulariser, and d loss / d(q, value)
"""

from typing import Any

from torch import Tensor

from qadapter.ops import backends, library, preference_torch
from qadapter.ops.library import statistics


def preference_fwd(
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
    library.check_cu_seqlens(cu_seqlens, q.shape[0])
    return backends.implementation(q, preference_torch.preference_fwd)(
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


def report_fake(like: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    pairs = (cu_seqlens.shape[0] - 1) // 2
    scalars = [statistics(like) for _ in range(3)]
    per_pair = [statistics(like, pairs) for _ in range(3)]
    return [*scalars, *per_pair, statistics(like)]


def _preference_fwd_fake(
    q: Tensor, value: Tensor, actions: Tensor, cu_seqlens: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return (*report_fake(q, cu_seqlens), statistics(q, q.shape[0]), statistics(q, q.shape[0]))


def _preference_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[7], output[8])


def _preference_backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    grad_q, grad_value = ctx.saved_tensors
    return (grad_q * grad_loss, grad_value * grad_loss, *(None,) * 8)


library.define(
    "preference_fwd(Tensor q, Tensor value, Tensor actions, Tensor cu_seqlens, "
    f"Tensor? denominators, {library.PREFERENCE}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    preference_fwd,
    _preference_fwd_fake,
    _preference_backward,
    _preference_setup,
)
