"""What a loss needs of the two streams, from their logits or, without making those, from hidden
states."""

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qadapter import functional as QF
from qadapter import reference
from qadapter.model.checkpoint import is_ordinary
from qadapter.model.sharded import vocab_rows
from qadapter.model.streams import evaluating
from qadapter.outputs import (
    AnchoredValues,
    BaseMoments,
    ResidualValues,
    TwoStreamLogits,
    TwoStreamValues,
)

KL_ROWS = 32  # whose float32 logits exist at a time


class KnownBase(NamedTuple):
    """Results of the base stream that need not be computed: float32 [N], [N] and [N, D]."""

    lse: Tensor | None
    logp: Tensor | None
    hidden: Tensor | None

    def rows(self, index: Tensor) -> "KnownBase":
        return KnownBase(*(None if known is None else known[index] for known in self))

    def suffices(self, alpha_0: float, center: float) -> bool:
        """Whether the base need not run: where alpha_0 = center its logits cancel from Q's soft
        value, and only their statistics are left."""
        rest = self.logp if alpha_0 == center else self.hidden
        return self.lse is not None and rest is not None


def values_of_logits(
    logits: TwoStreamLogits, actions: Tensor, kl_rows: Tensor | None, composition: dict[str, Any]
) -> TwoStreamValues:
    values = QF.residual_values(*logits, actions, **composition)
    return TwoStreamValues(values, _kl(None, logits, kl_rows, composition))


def values_of_hidden(
    head: Any,
    base_hidden: Tensor | None,
    q_hidden: Tensor,
    actions: Tensor,
    known: KnownBase,
    kl_rows: Tensor | None,
    composition: dict[str, Any],
) -> TwoStreamValues:
    """From the last hidden states of both streams, and what is known of the base instead of its
    own; no logits but those of ``kl_rows``."""
    values = QF.linear_residual_values(
        base_hidden,
        q_hidden,
        head.weight,
        actions,
        bias=head.bias,
        base_lse=known.lse,
        base_logp=known.logp,
        **composition,
    )
    if base_hidden is None:
        return TwoStreamValues(values, None)
    return TwoStreamValues(values, _kl(head, (base_hidden, q_hidden), kl_rows, composition))


def anchored_values_of_logits(
    logits: TwoStreamLogits, actions: Tensor, kl_rows: Tensor | None, composition: dict[str, Any]
) -> AnchoredValues:
    """Of the pairs' rows and, behind them, the anchors': whose KL is summed over the vocabulary,
    with several [A, V] tensors."""
    pairs = TwoStreamLogits(*(stream[: actions.shape[0]] for stream in logits))
    base, q = (stream[actions.shape[0] :] for stream in logits)
    made = values_of_logits(pairs, actions, kl_rows, composition)
    return AnchoredValues(*made, _kl_of_logits(base, q, composition))


def _kl_of_logits(base: Tensor, q: Tensor, composition: dict[str, Any]) -> Tensor:
    """KL(base || policy) float32 [N] of [N, V] logits."""
    parts = [
        reference.kl_base_policy(b.float(), z.float(), **composition)
        for b, z in zip(base.split(KL_ROWS), q.split(KL_ROWS), strict=True)
    ]
    return torch.cat(parts)


class BothStreams:
    """Both streams in N states: their last hidden states [N, D], or logits [N, V] where there is no
    ``head``. What is asked of them at some composition takes no further pass of the model."""

    def __init__(self, head: Any, base: Tensor, q: Tensor) -> None:
        self.head, self.base, self.q = head, base, q

    def first(self, count: int) -> "BothStreams":
        """The first ``count`` states."""
        return BothStreams(self.head, self.base[:count], self.q[:count])

    def values(self, actions: Tensor, composition: dict[str, Any]) -> ResidualValues:
        if self.head is None:
            return QF.residual_values(self.base, self.q, actions, **composition)
        return QF.linear_residual_values(
            self.base, self.q, self.head.weight, actions, bias=self.head.bias, **composition
        )

    def kl(self, composition: dict[str, Any], value: Tensor | None = None) -> Tensor:
        """KL(base || policy) in nats, float32 [N]; ``value`` [N] if `values` has given it."""
        if self.head is None:
            return _kl_of_logits(self.base, self.q, composition)
        if value is None:
            actions = torch.full(self.q.shape[:1], -100, device=self.q.device)
            value = self.values(actions, composition).value
        return QF.kl_to_base(value, self.q, self.moments, **composition)

    @cached_property
    def moments(self) -> BaseMoments:
        return QF.base_moments(self.base, self.head.weight, bias=self.head.bias)


def anchored_values_of_hidden(
    head: Any,
    base_hidden: Tensor | None,
    q_hidden: Tensor,
    actions: Tensor,
    known: KnownBase,
    kl_rows: Tensor | None,
    anchors: dict[str, Any],
    composition: dict[str, Any],
) -> AnchoredValues:
    """`values_of_hidden` where ``q_hidden`` has the anchors' states behind the pairs' N rows.

    ``anchors`` holds their `BaseMoments` by field and, where alpha_0 != center, the base's hidden
    states, ``hidden`` [A, D].
    """
    count, more = actions.shape[0], q_hidden.shape[0] - actions.shape[0]
    moments = BaseMoments(*(anchors[name] for name in BaseMoments._fields))
    head_of_op = {"bias": head.bias, **composition}
    behind = torch.cat((actions, actions.new_full((more,), -100)))
    if composition["alpha_0"] == composition["center"]:
        lse, logp = known.lse, known.logp
        if lse is None or logp is None:
            assert base_hidden is not None
            made = base_statistics(head, base_hidden, actions)
            lse, logp = made["base_lse"], made["base_logp"]
        of_base = None
        head_of_op["base_lse"] = torch.cat((lse, moments.lse))
        head_of_op["base_logp"] = torch.cat((logp, torch.zeros_like(moments.lse)))
    else:
        # Without base_lse, which would have the streams rounded after they are mixed.
        assert base_hidden is not None
        of_base = torch.cat((base_hidden, anchors["hidden"]))
    all_values = QF.linear_residual_values(of_base, q_hidden, head.weight, behind, **head_of_op)
    anchor_kl = QF.kl_to_base(all_values.value[count:], q_hidden[count:], moments, **composition)
    values = ResidualValues(*(field[:count] for field in all_values))
    kl = None
    if base_hidden is not None:
        kl = _kl(head, (base_hidden, q_hidden[:count]), kl_rows, composition)
    return AnchoredValues(values, kl, anchor_kl)


@torch.no_grad()
def _kl(
    head: Any,
    streams: tuple[Tensor, Tensor],
    kl_rows: Tensor | None,
    composition: dict[str, Any],
) -> Tensor | None:
    """KL(base || policy) float32 [K] at ``kl_rows``; the streams are what ``head`` takes, or logits
    where it is None."""
    if kl_rows is None:
        return None
    # Not by calling the head: ZeRO-3 would gather it at every call, and processes have different
    # numbers of rows.
    weight, bias = (None, None) if head is None else (head.weight, head.bias)

    def logits(rows: Tensor) -> Tensor:
        return (rows if weight is None else nn.functional.linear(rows, weight, bias)).float()

    parts = [
        reference.kl_base_policy(*(logits(stream[at]) for stream in streams), **composition)
        for at in kl_rows.split(KL_ROWS)
    ]
    return torch.cat(parts)


@torch.no_grad()
def base_statistics(head: Any, hidden: Tensor, actions: Tensor) -> dict[str, Tensor]:
    """See `QAdapterModel.base_statistics`; ``hidden`` [N, D] of the base."""
    nothing = torch.zeros(hidden.shape[0], device=hidden.device)
    # One stream alone: with alpha_0 = center = 0 the value is its logsumexp.
    values = QF.linear_residual_values(
        None,
        hidden,
        head.weight,
        actions,
        bias=head.bias,
        alpha_0=0.0,
        center=0.0,
        base_lse=nothing,
        base_logp=nothing,
    )
    return {"base_lse": values.value, "base_logp": values.policy_logp, "base_hidden": hidden}


def head_is_plain(model: PreTrainedModel) -> bool:
    """Whether logits are exactly head(last hidden state): tried, not read off the config."""
    head: Any = model.get_output_embeddings()
    trunk: Any = model.base_model
    if not isinstance(head, nn.Linear) or trunk is model:
        return False
    if head.weight.ndim != 2 or not is_ordinary(head.weight):
        return False  # quantised
    ids = torch.arange(1, 5, device=model.device).clamp(max=vocab_rows(model) - 1)[None]
    with evaluating(model), torch.no_grad():
        hidden = trunk(input_ids=ids, use_cache=False)[0]
        return torch.equal(head(hidden), model(input_ids=ids, use_cache=False).logits)
