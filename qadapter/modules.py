"""nn.Module wrappers for code that composes modules rather than functions."""

from typing import Any

from torch import Tensor, nn

from qadapter import functional as QF
from qadapter.ops import checks
from qadapter.outputs import PreferenceLoss


class QAdapterLoss(nn.Module):
    """`qadapter.functional.qadapter_loss` with its hyper-parameters held as attributes.

    Called with (base_logits, q_logits, actions, cu_seqlens); see the function for shapes, and for
    ``base_lse``, ``base_logp`` and ``denominators``.
    """

    def __init__(
        self,
        *,
        alpha_0: float = 1.0,
        alpha_tilde: float = 1.0,
        center: float = 1.0,
        gamma: float = 1.0,
        reg_coef: float = 0.1,
        bt_scale: float = 1.0,
        value_at: str = "next",
        length_norm: str = "response",
    ) -> None:
        super().__init__()
        checks.composition(alpha_0, alpha_tilde, center)
        checks.preference(gamma, reg_coef, bt_scale, value_at, length_norm)
        self.alpha_0, self.alpha_tilde, self.center = alpha_0, alpha_tilde, center
        self.gamma, self.reg_coef, self.bt_scale = gamma, reg_coef, bt_scale
        self.value_at, self.length_norm = value_at, length_norm

    def extra_repr(self) -> str:
        names = ("alpha_0", "alpha_tilde", "center", "gamma", "reg_coef", "bt_scale")
        numbers = ", ".join(f"{name}={getattr(self, name):g}" for name in names)
        return f"{numbers}, value_at={self.value_at!r}, length_norm={self.length_norm!r}"

    def forward(
        self,
        base_logits: Tensor | None,
        q_logits: Tensor,
        actions: Tensor,
        cu_seqlens: Tensor,
        *,
        base_lse: Tensor | None = None,
        base_logp: Tensor | None = None,
        denominators: Tensor | None = None,
    ) -> PreferenceLoss:
        return QF.qadapter_loss(
            base_logits,
            q_logits,
            actions,
            cu_seqlens,
            alpha_0=self.alpha_0,
            alpha_tilde=self.alpha_tilde,
            center=self.center,
            gamma=self.gamma,
            reg_coef=self.reg_coef,
            bt_scale=self.bt_scale,
            value_at=self.value_at,
            length_norm=self.length_norm,
            base_lse=base_lse,
            base_logp=base_logp,
            denominators=denominators,
        )


class QAdapterLinearLoss(QAdapterLoss):
    """`qadapter.functional.linear_qadapter_loss` with its hyper-parameters held as attributes.

    Called with (base_hidden, q_hidden, weight, actions, cu_seqlens); see the function for shapes.
    """

    def __init__(
        self,
        *,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
        chunk_size: int | None = None,
        memory_mib: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        checks.head(logit_scale, logit_softcap)
        checks.chunk(chunk_size, memory_mib)
        self.logit_scale, self.logit_softcap = logit_scale, logit_softcap
        self.chunk_size, self.memory_mib = chunk_size, memory_mib

    def forward(  # type: ignore[override]
        self,
        base_hidden: Tensor | None,
        q_hidden: Tensor,
        weight: Tensor,
        actions: Tensor,
        cu_seqlens: Tensor,
        *,
        bias: Tensor | None = None,
        base_lse: Tensor | None = None,
        base_logp: Tensor | None = None,
        denominators: Tensor | None = None,
    ) -> PreferenceLoss:
        return QF.linear_qadapter_loss(
            base_hidden,
            q_hidden,
            weight,
            actions,
            cu_seqlens,
            bias=bias,
            alpha_0=self.alpha_0,
            alpha_tilde=self.alpha_tilde,
            center=self.center,
            logit_scale=self.logit_scale,
            logit_softcap=self.logit_softcap,
            base_lse=base_lse,
            base_logp=base_logp,
            chunk_size=self.chunk_size,
            memory_mib=self.memory_mib,
            gamma=self.gamma,
            reg_coef=self.reg_coef,
            bt_scale=self.bt_scale,
            value_at=self.value_at,
            length_norm=self.length_norm,
            denominators=denominators,
        )
