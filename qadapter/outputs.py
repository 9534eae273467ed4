"""The named tuples that the public functions return."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class ResidualValues(NamedTuple):
    """Per-row quantities of the residual Q-function, float32 [N] (float64 for float64 logits).

    ``q``, ``value`` and ``policy_logp`` are differentiable with respect to the adapter's logits (or
    hidden states); nothing is with respect to the base. Rows with action -100 have ``q``,
    ``base_logp`` and ``policy_logp`` 0 and still give ``value`` and ``base_lse``.
    """

    q: Tensor
    """Q(s, a) = z_q[a] - center * z_b[a]."""
    value: Tensor
    """V(s) = alpha_tilde * logsumexp((Q(s, .) + alpha_0 * log pi_base(. | s)) / alpha_tilde)."""
    base_logp: Tensor
    """log pi_base(a | s)."""
    policy_logp: Tensor
    """log pi(a | s) of the composed policy."""
    base_lse: Tensor
    """logsumexp of the base logits, the one float a token that a frozen base can be cached as."""


class PreferenceLoss(NamedTuple):
    """The Bradley-Terry loss on residual rewards and what people log about it."""

    loss: Tensor
    """bt_loss + reg_coef * reg_loss; scalar, the only differentiable field."""
    bt_loss: Tensor
    """mean over pairs of -log sigmoid(bt_scale * margin); scalar."""
    reg_loss: Tensor
    """mean of r^2 over all actions of the batch; scalar."""
    chosen_rewards: Tensor
    """R of the chosen responses [P], not multiplied by bt_scale."""
    rejected_rewards: Tensor
    """R of the rejected responses [P], not multiplied by bt_scale."""
    margins: Tensor
    """chosen_rewards - rejected_rewards [P]."""
    accuracy: Tensor
    """Share of pairs with a margin above 0; scalar."""

    @staticmethod
    def of(outputs: Sequence[Tensor]) -> "PreferenceLoss":
        """From what an operation returns; detached but for the loss, so that using another field
        in a graph fails loudly."""
        return PreferenceLoss(outputs[0], *(field.detach() for field in outputs[1:7]))


class _Moments(NamedTuple):
    lse: Tensor
    mean_logit: Tensor
    mean_row: Tensor
    mean_bias: Tensor


class BaseMoments(_Moments):
    """Of the base's distribution p_b in each state: ``lse`` [N], logsumexp of its logits;
    ``mean_logit`` [N], E[z_b]; ``mean_row`` [N, D], logit_scale * W^T p_b; ``mean_bias`` [N],
    E[logit_scale * bias]. float32 (float64 for float64 inputs), without gradient.

    ``gradient_row`` is no field of the tuple: ``mean_row`` as the linear operation rounds it in
    the dtype of the hidden states, by which a gradient of 0 is 0. None where it was not kept.
    """

    gradient_row: Tensor | None

    def __new__(
        cls,
        lse: Tensor,
        mean_logit: Tensor,
        mean_row: Tensor,
        mean_bias: Tensor,
        gradient_row: Tensor | None = None,
    ) -> "BaseMoments":
        made = super().__new__(cls, lse, mean_logit, mean_row, mean_bias)
        made.gradient_row = gradient_row
        return made

    def rows(self, index: Tensor | slice) -> "BaseMoments":
        """Those of some states."""
        kept = None if self.gradient_row is None else self.gradient_row[index]
        lse, mean_logit, mean_row, mean_bias = (field[index] for field in self)
        return BaseMoments(lse, mean_logit, mean_row, mean_bias, kept)


class Sample(NamedTuple):
    """Tokens drawn from the composed policy."""

    tokens: Tensor
    """int64 [B]."""
    logprobs: Tensor
    """float32 [B]: log-probability of each token under the filtered policy it was drawn from."""


class TwoStreamLogits(NamedTuple):
    """Logits of the selected rows, [N, V] in the model's dtype; ``q_logits`` has the gradient."""

    base_logits: Tensor
    q_logits: Tensor


class TwoStreamValues(NamedTuple):
    """`QF.residual_values` of the selected rows, and what else was asked for."""

    values: ResidualValues
    kl: Tensor | None
    """KL(base || policy) in nats at ``kl_rows``, float32; None where the base did not run."""


class AnchoredValues(NamedTuple):
    """`TwoStreamValues` of a batch with anchors."""

    values: ResidualValues
    kl: Tensor | None
    anchor_kl: Tensor
    """KL(base || policy) in nats in the anchors' states, float32 [A], differentiable."""
