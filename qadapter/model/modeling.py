"""The two-stream model: a frozen causal LM and the same LM with a LoRA adapter.

Both streams share every frozen weight. The base stream runs under no_grad with the adapter off, the
adapter stream with it on; their logits z_b and z_q are what `qadapter.functional` composes.
"""

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from qadapter.composition import Composition, PerRow, blend
from qadapter.model import locking, packed_attention, probes, saving, values
from qadapter.model.adapters import AdapterStreams
from qadapter.model.checkpoint import is_adapter_folder, resolve_model
from qadapter.model.generate import check_prompts, generate, without_settings
from qadapter.model.recompute import recompute_cheap
from qadapter.model.trainer_hooks import without_dropout
from qadapter.model.wrapping import add_lora, load_base, refuse_unsupported
from qadapter.ops import checks
from qadapter.outputs import ResidualValues, TwoStreamLogits, TwoStreamValues

logger = logging.getLogger(__name__)


class QAdapterModel(AdapterStreams):
    """A frozen causal LM, its LoRA adapter, and the weights they are composed with.

    Args:
        peft_model: a `peft.PeftModel` around a decoder-only causal LM, with one active LoRA.
        alpha_0, alpha_tilde, center, gamma: see `qadapter.functional`; stored with the adapter.

    Raises:
        ValueError: the model cannot be composed exactly: no language-model head, an
            encoder-decoder, attention to later tokens, trained base weights, training of an
            embedding that is tied to the head, or an adapter that is merged into the weights.
    """

    def __init__(
        self,
        peft_model: PeftModel,
        *,
        alpha_0: float = 1.0,
        alpha_tilde: float = 1.0,
        center: float = 1.0,
        gamma: float = 1.0,
    ) -> None:
        super().__init__()
        if not isinstance(peft_model, PeftModel):
            raise ValueError(
                f"peft_model: expected a peft.PeftModel, got {type(peft_model).__name__}; "
                "QAdapterModel.from_pretrained makes one from a model name or folder"
            )
        self.peft_model = peft_model
        self.set_composition(alpha_0, alpha_tilde, center)
        self.gamma = checks.number("gamma", gamma)
        refuse_unsupported(peft_model)
        if (reason := probes.sees_later_tokens(self.hf_model)) is not None:
            raise ValueError(
                f"{type(self.hf_model).__name__} is no causal model: {reason} (of an encoder's "
                "class, is_decoder=True in its config makes one)"
            )
        self._see_adapters()
        if not self.selects_hidden_rows:
            logger.warning(
                "%s does more to its logits than one language-model head on the last hidden state "
                "(soft cap, scale or adapted head): logits are computed at every position and then "
                "selected, which is exact and slower.",
                type(self.hf_model).__name__,
            )
        self.eval()
        without_dropout(self.hf_model)
        recompute_cheap(self.hf_model, self.config.get_text_config().hidden_size)

    # Construction and files.

    @classmethod
    def from_pretrained(
        cls,
        base_or_adapter_dir: str | Path,
        *,
        lora_config: LoraConfig | None = None,
        alpha_0: float | None = None,
        alpha_tilde: float | None = None,
        center: float | None = None,
        gamma: float | None = None,
        dtype: torch.dtype | str = "auto",
        base_model: str | Path | None = None,
        **from_pretrained_kwargs: Any,
    ) -> "QAdapterModel":
        """A new adapter on a base model, or a saved adapter with the base it was trained on.

        Args:
            base_or_adapter_dir: a Hub id or folder of a causal LM, "smollm2" for the packaged
                model, or a folder that `save_pretrained` wrote.
            lora_config: LoRA of a new adapter; default r=8, lora_alpha=16, no dropout, on all
                linear layers but the head. A config without ``target_modules`` takes PEFT's default
                of the architecture (query and value projections).
            alpha_0, alpha_tilde, center, gamma: default 1 for a new adapter, the saved values for a
                saved one.
            dtype: of the base, as transformers takes it.
            base_model: where the base of a saved adapter is, if not where it was at training.
            **from_pretrained_kwargs: passed to `AutoModelForCausalLM.from_pretrained`.

        Raises:
            ValueError: an adapter without ``qadapter_config.json``, for another base, or a base
                that cannot be composed exactly.
            FileNotFoundError: a folder that does not exist or holds no model.
        """
        given = {"alpha_0": alpha_0, "alpha_tilde": alpha_tilde, "center": center, "gamma": gamma}
        composition = {name: value for name, value in given.items() if value is not None}
        source = resolve_model(base_or_adapter_dir)
        if not is_adapter_folder(source):
            if base_model is not None:
                raise ValueError(f"base_model: {source} is not an adapter, it is itself a base")
            base = load_base(source, dtype, from_pretrained_kwargs)
            return cls.from_base(base, lora_config=lora_config, **composition)

        if lora_config is not None:
            raise ValueError(f"lora_config: {source} is a saved adapter and has its own")
        peft_model, saved = saving.load(source, base_model, dtype, from_pretrained_kwargs)
        return cls(peft_model, **{**saved, **composition})

    @classmethod
    def from_base(
        cls, base: PreTrainedModel, *, lora_config: LoraConfig | None = None, **composition: float
    ) -> "QAdapterModel":
        """A new adapter on a model in memory (LoRA layers are put into it in place)."""
        return cls(add_lora(base, lora_config), **composition)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a plain PEFT LoRA (safetensors), ``qadapter_config.json`` and a model card.

        Any PEFT loader reads the LoRA; alone it is the adapter stream, softmax(z_q). Raises
        OSError, leaving ``directory`` as it was, if something cannot be written.
        """
        composition = {**self.composition, "gamma": self.gamma}
        saving.save(self.peft_model, composition, directory)

    def load_adapter_weights(self, directory: str | Path) -> None:
        """Replace the adapter's weights by those saved in ``directory`` (same LoRA, same base)."""
        saving.load_weights(self.peft_model, directory)

    # Properties.

    @property
    def config(self) -> Any:
        return self.hf_model.config

    @property
    def generation_config(self) -> Any:
        return self.hf_model.generation_config

    @property
    def device(self) -> torch.device:
        return self.hf_model.device

    @property
    def composition(self) -> dict[str, Any]:
        """alpha_0, alpha_tilde and center, as keywords of `qadapter.functional`."""
        return {"alpha_0": self.alpha_0, "alpha_tilde": self.alpha_tilde, "center": self.center}

    def set_composition(self, alpha_0: float, alpha_tilde: float, center: float) -> None:
        """Set alpha_0, alpha_tilde and center together, checked."""
        composition = Composition.checked(alpha_0, alpha_tilde, center)
        self.alpha_0, self.alpha_tilde, self.center = composition

    # The two streams.

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
            **packing: of a packed batch, see `qadapter.model.packed_attention`.

        Returns:
            `TwoStreamLogits` of [N, V]; with ``actions``, `TwoStreamValues`.
        """
        with locking.alone(self.hf_model):
            given = {"attention_mask": attention_mask, "position_ids": position_ids, **packing}
            arguments = {name: value for name, value in given.items() if value is not None}
            if actions is None or use_logits or not self.selects_hidden_rows:
                with torch.no_grad(), self.adapter_off():
                    base_logits = self._stream_logits(input_ids, rows, arguments)
                logits = TwoStreamLogits(
                    base_logits, self._stream_logits(input_ids, rows, arguments)
                )
                if actions is None:
                    return logits
                return values.values_of_logits(logits, actions, kl_rows, self.composition)
            known = values.KnownBase(base_lse, base_logp, base_hidden)
            if unique_rows is None or unique_index is None or rows is None:
                return self._values(input_ids, rows, arguments, actions, known, kl_rows)
            made = self._values(
                input_ids,
                rows[unique_rows],
                arguments,
                actions[unique_rows],
                known.rows(unique_rows),
                None if kl_rows is None else unique_index[kl_rows],
            )
            return TwoStreamValues(
                ResidualValues(*(value[unique_index] for value in made.values)), made.kl
            )

    def _values(
        self,
        input_ids: Tensor,
        rows: Tensor | None,
        arguments: dict[str, Any],
        actions: Tensor,
        known: values.KnownBase,
        kl_rows: Tensor | None,
    ) -> TwoStreamValues:
        """Both trunks, the base's only where ``known`` does not do without; then the head's op."""
        base_hidden = known.hidden
        if not known.suffices(self.alpha_0, self.center):
            base_hidden = self._base_hidden(input_ids, rows, arguments)
        q_hidden = self._stream_hidden(input_ids, rows, arguments)
        head = self.hf_model.get_output_embeddings()
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
        names = ("attention_mask", "position_ids", *packed_attention.ARGUMENTS)
        arguments = {name: batch[name] for name in names if batch.get(name) is not None}
        hidden = self._base_hidden(batch["input_ids"], batch["rows"], arguments)
        head = self.hf_model.get_output_embeddings()
        return values.base_statistics(head, hidden, batch["actions"])

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

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        strength: PerRow | None = None,
        alpha_0: PerRow | None = None,
        alpha_tilde: PerRow | None = None,
        adapters: Mapping[str, PerRow] | None = None,
        base_settings: bool = True,
        **generation_kwargs: Any,
    ) -> Any:
        """Sample from softmax((sum_i w_i Q_i + alpha_0 log pi_base) / alpha_tilde).

        Calls from several threads take turns, as do training forwards. What a logits processor, a
        stopping criterion or a streamer calls in the same thread sees the ordinary model.

        Args:
            input_ids: int64 [B, T] prompts, padded on the left if lengths differ.
            attention_mask: [B, T]; needed when there is padding.
            strength: how much of the preference: 0 is the base, 1 the trained policy, more
                exaggerates. Stands for alpha_0 = alpha_tilde = 1/strength. A number, or one for
                each row.
            alpha_0, alpha_tilde: instead of strength, the two weights; None keeps the trained
                value. A number, or one for each row.
            adapters: weights w_i by adapter name (`load_adapter`), each a number or one for each
                row; None is the adapter of the model with weight 1.
            base_settings: whether what the base's generation_config asks for counts where no
                argument says otherwise, as in transformers; the ids of special tokens do anyway.
            **generation_kwargs: transformers' generation arguments (max_new_tokens, do_sample,
                temperature, top_k, top_p, min_p, eos_token_id, stop_strings, repetition_penalty,
                num_return_sequences, logits_processor, stopping_criteria, output_scores, ...),
                applied to the composed logits, and:

                seed: an int (row b draws stream b of it) or int64 [B], a stream for each row: a
                    row's draws then depend on its logits alone, not on its batch. None: torch's
                    global generator.
                streamer: a transformers streamer (batch of one); gets prompt and new tokens.
                tokenizer: needed with ``stop_strings``.
                output_logprobs: with ``return_dict_in_generate``, also `GenerateOutput.logprobs`.
                cache_implementation: "static" compiles the step on a GPU, and with
                    ``compile_config`` anywhere.

        Returns:
            int64 [B * num_return_sequences, T + new] with finished rows padded, or
            `GenerateOutput` with ``return_dict_in_generate=True``.

        Raises:
            ValueError: conflicting or malformed arguments, one that this loop does not support,
                padding that the base cannot leave out, or logits from which nothing can be drawn
                (NaN, everything masked).
        """
        check_prompts(input_ids, attention_mask)
        batch = input_ids.shape[0]
        names, weights = blend(self.compositions, batch, strength, alpha_0, alpha_tilde, adapters)
        own = nullcontext() if base_settings else without_settings(self.hf_model)
        with locking.alone(self.hf_model), own:
            streams = self.streams(names)  # first: it looks for adapters that PEFT has loaded since
            if attention_mask is not None and not attention_mask.all():
                self._check_padding(streams)
            head = self.hf_model.get_output_embeddings() if self.selects_hidden_rows else None
            return generate(streams, weights, head, input_ids, attention_mask, **generation_kwargs)
