"""Both streams of a batch, as training needs them.

The base stream runs under no_grad with the adapter off, the adapter stream with it on; their logits
z_b and z_q are what `qadapter.functional` composes.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from qadapter import functional as QF
from qadapter.model import locking, packed_attention, values
from qadapter.model.sharded import vocab_rows
from qadapter.model.trainer_hooks import TrainerHooks
from qadapter.ops import checks
from qadapter.outputs import (
    AnchoredValues,
    BaseMoments,
    ResidualValues,
    TwoStreamLogits,
    TwoStreamValues,
)


class TwoStreamForward(TrainerHooks):
    """The forward of `QAdapterModel`; a base class."""

    alpha_0: float
    alpha_tilde: float
    center: float
    selects_hidden_rows: bool  # logits are the head's of the last hidden state
    adapter_off: Callable[[], AbstractContextManager[None]]

    @property
    def composition(self) -> dict[str, Any]:
        """alpha_0, alpha_tilde and center, as keywords of `qadapter.functional`."""
        return {"alpha_0": self.alpha_0, "alpha_tilde": self.alpha_tilde, "center": self.center}

    def composition_at(self, strength: float) -> dict[str, Any]:
        """The same of a strength, which is above 0."""
        return {**self.composition, "alpha_0": 1.0 / strength, "alpha_tilde": 1.0 / strength}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        rows: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        actions: Tensor | None = None,
        base_lse: Tensor | None = None,
        base_logp: Tensor | None = None,
        base_hidden: Tensor | None = None,
        kl_rows: Tensor | None = None,
        unique_rows: Tensor | None = None,
        unique_index: Tensor | None = None,
        use_logits: bool = False,
        anchors: dict[str, Any] | None = None,
        **packing: Any,
    ) -> Any:
        """Both streams at the selected positions: their logits, or what a loss needs of them.

        Other threads that run the model meanwhile wait (`qadapter.model.locking`).

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, T], 1 for tokens, 0 for padding.
            rows: int64 [N], indices into the B*T flattened positions; None takes all of them. Only
                these positions reach the language-model head.
            position_ids: int64 [B, T].
            actions: int64 [N]; given, the result is `TwoStreamValues`, and where the head is a
                plain linear layer no logits are made (`QF.linear_residual_values`).
            base_lse, base_logp, base_hidden: float32 [N], [N] and [N, D], known results of the base
                stream in these rows. Given all that the composition needs (the first two where
                alpha_0 == center; the first and the third else), the base does not run.
            kl_rows: int64 [K], indices into the N rows, at which KL is computed exactly.
            unique_rows, unique_index: int64 [U] and [N], indices into the N rows of those that
                differ in position or action, and of every row among these U: each is computed once.
            use_logits: take the logits of both streams also where that could be avoided.
            anchors: of a batch with anchors, as the collators and `qadapter.training.anchors` give
                it: KL(base || policy) is computed in their states too, and the base runs on the
                pairs alone.
            **packing: of a packed batch, see `qadapter.model.packed_attention`.

        Returns:
            `TwoStreamLogits` of [N, V]; with ``actions``, `TwoStreamValues`; with ``anchors`` too,
            `AnchoredValues`.
        """
        checks.tensor("input_ids", input_ids, 2, (torch.int64, torch.int32))
        with locking.alone(self.hf_model):
            input_ids = self._with_known_padding(input_ids, attention_mask)
            given = {"attention_mask": attention_mask, "position_ids": position_ids, **packing}
            arguments = {name: value for name, value in given.items() if value is not None}
            if actions is None or use_logits or not self.selects_hidden_rows:
                made_of: Callable[..., Any] = values.values_of_logits
                if anchors is not None and rows is not None:
                    rows = torch.cat((rows, anchors["rows"]))
                    made_of = values.anchored_values_of_logits
                with torch.no_grad(), self.adapter_off():
                    base_logits = self._stream_logits(input_ids, rows, arguments)
                logits = TwoStreamLogits(
                    base_logits, self._stream_logits(input_ids, rows, arguments)
                )
                if actions is None:
                    return logits
                return made_of(logits, actions, kl_rows, self.composition)
            known = values.KnownBase(base_lse, base_logp, base_hidden)
            if unique_rows is None or unique_index is None or rows is None:
                return self._values(input_ids, rows, arguments, actions, known, kl_rows, anchors)
            made = self._values(
                input_ids,
                rows[unique_rows],
                arguments,
                actions[unique_rows],
                known.rows(unique_rows),
                None if kl_rows is None else unique_index[kl_rows],
                anchors,
            )
            of_rows = ResidualValues(*(value[unique_index] for value in made.values))
            return made._replace(values=of_rows)

    def _values(
        self,
        input_ids: Tensor,
        rows: Tensor | None,
        arguments: dict[str, Any],
        actions: Tensor,
        known: values.KnownBase,
        kl_rows: Tensor | None,
        anchors: dict[str, Any] | None,
    ) -> TwoStreamValues | AnchoredValues:
        """Both trunks, the base's only where ``known`` does not do without; then the head's op."""
        base_hidden = known.hidden
        if not known.suffices(self.alpha_0, self.center):
            pairs = {"input_ids": input_ids, **arguments}
            if anchors is not None:
                pairs = dict(anchors["pair_inputs"])
            base_hidden = self._base_hidden(pairs.pop("input_ids"), rows, pairs)
        head = self.hf_model.get_output_embeddings()
        if anchors is not None and rows is not None:
            every = torch.cat((rows, anchors["rows"]))
            q_hidden = self._stream_hidden(input_ids, every, arguments)
            return values.anchored_values_of_hidden(
                head, base_hidden, q_hidden, actions, known, kl_rows, anchors, self.composition
            )
        q_hidden = self._stream_hidden(input_ids, rows, arguments)
        return values.values_of_hidden(
            head, base_hidden, q_hidden, actions, known, kl_rows, self.composition
        )

    @torch.no_grad()
    def base_statistics(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What a training step needs of the base: base_lse, base_logp float32 [N] (base_logp is 0
        in rows without action), base_hidden [N, D], for a collated batch on the model's device."""
        if not self.selects_hidden_rows:
            raise ValueError(
                f"{type(self.hf_model).__name__} does more to its logits than one head on the last "
                "hidden state; its base cannot be cached"
            )
        hidden = self._base_hidden(batch["input_ids"], batch["rows"], _arguments(batch))
        head = self.hf_model.get_output_embeddings()
        return values.base_statistics(head, hidden, batch["actions"])

    @torch.no_grad()
    def base_moments(self, batch: dict[str, Any]) -> tuple[BaseMoments, Tensor]:
        """Of the base in the anchors' states of a collated batch without pairs, on the model's
        device: `QF.base_moments` [A], and its hidden states [A, D]."""
        hidden = self._base_hidden(*_anchor_inputs(batch))
        head = self.hf_model.get_output_embeddings()
        return QF.base_moments(hidden, head.weight, bias=head.bias), hidden

    @torch.no_grad()
    def anchor_hidden(self, batch: dict[str, Any]) -> Tensor:
        """The adapter stream's hidden states [A, D] in the anchors' states of a batch without
        pairs."""
        return self._stream_hidden(*_anchor_inputs(batch))

    @torch.no_grad()
    def kl_at_strength(
        self, q_hidden: Tensor, of_base: dict[str, Tensor], strength: float
    ) -> Tensor:
        """KL(base || policy) [A] at another strength, from `anchor_hidden` and what an anchor set
        knows of the base there."""
        head = self.hf_model.get_output_embeddings()
        streams = values.BothStreams(head, of_base["hidden"], q_hidden)
        streams.moments = BaseMoments(*(of_base[name] for name in BaseMoments._fields))
        return streams.kl(self.composition_at(strength))

    @torch.no_grad()
    def both_streams(
        self, input_ids: Tensor, rows: Tensor, attention_mask: Tensor | None = None
    ) -> values.BothStreams:
        """Both streams at the positions ``rows`` (arguments as in `forward`), without gradient, for
        values and KL at any composition."""
        with locking.alone(self.hf_model):
            input_ids = self._with_known_padding(input_ids, attention_mask)
            arguments = {} if attention_mask is None else {"attention_mask": attention_mask}
            plain = self.selects_hidden_rows
            run = self._stream_hidden if plain else self._stream_logits
            with self.adapter_off():
                base = run(input_ids, rows, arguments)
            head = self.hf_model.get_output_embeddings() if plain else None
            return values.BothStreams(head, base, run(input_ids, rows, arguments))

    def _with_known_padding(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Any id may stand in the padding, also one that the embedding has no row for."""
        if attention_mask is None or attention_mask.shape != input_ids.shape:
            return input_ids
        in_range = input_ids.clamp(0, vocab_rows(self.hf_model) - 1)
        return torch.where(attention_mask == 0, in_range, input_ids)

    def _base_hidden(
        self, input_ids: Tensor, rows: Tensor | None, arguments: dict[str, Any]
    ) -> Tensor:
        with torch.no_grad(), self.adapter_off():
            return self._stream_hidden(input_ids, rows, arguments)

    def _stream_hidden(
        self, input_ids: Tensor, rows: Tensor | None, arguments: dict[str, Any]
    ) -> Tensor:
        hidden = packed_attention.trunk(self.hf_model, input_ids, arguments).flatten(0, 1)
        return hidden if rows is None else hidden[rows]

    def _stream_logits(
        self, input_ids: Tensor, rows: Tensor | None, arguments: dict[str, Any]
    ) -> Tensor:
        model = self.hf_model
        if self.selects_hidden_rows:
            return model.get_output_embeddings()(self._stream_hidden(input_ids, rows, arguments))
        arguments = packed_attention.arguments_for(model, input_ids, arguments)
        logits = model(**arguments).logits.flatten(0, 1)
        return logits if rows is None else logits[rows]


def _arguments(batch: dict[str, Any]) -> dict[str, Any]:
    """Of a collated batch, what a trunk takes besides the ids."""
    names = ("attention_mask", "position_ids", *packed_attention.ARGUMENTS)
    return {name: batch[name] for name in names if batch.get(name) is not None}


def _anchor_inputs(batch: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    return batch["input_ids"], batch["anchors"]["rows"], _arguments(batch)
