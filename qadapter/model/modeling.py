"""The two-stream model: a frozen causal LM and the same LM with a LoRA adapter.

Both streams share every frozen weight: `qadapter.model.two_streams` runs them in training,
`qadapter.model.decoding` where text is made.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from qadapter.composition import Composition, Names, PerRow, blend, recommended
from qadapter.model import adapters, locking, saving, sharded, values
from qadapter.model.checkpoint import fingerprint, is_adapter_folder, resolve_model
from qadapter.model.decoding_probes import Needs, sees_later_tokens
from qadapter.model.generate import check_prompts, generate, without_settings
from qadapter.model.lora_linear import fuse_lora
from qadapter.model.recompute import recompute_cheap
from qadapter.model.rotary import fuse_rotary
from qadapter.model.streams import Streams, switches
from qadapter.model.trainer_hooks import without_dropout
from qadapter.model.two_streams import TwoStreamForward
from qadapter.model.wrapping import add_lora, load_base, refuse_unsupported
from qadapter.ops import checks
from qadapter.outputs import TwoStreamLogits as TwoStreamLogits

logger = logging.getLogger(__name__)


class QAdapterModel(TwoStreamForward):
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
        self._others: dict[str, tuple[PeftConfig, Composition]] = {}
        self._needs: Needs | None = None
        self._saved_tokenizer: str | None = None
        self.set_composition(alpha_0, alpha_tilde, center)
        self.gamma = checks.number("gamma", gamma)
        self.recommended_strength: float | None = None
        """At which training found ``kl_budget`` kept; None where there was none."""
        self.kl_budget: float | None = None
        refuse_unsupported(peft_model)
        self._fingerprint = fingerprint(self.hf_model)
        if (reason := sees_later_tokens(self.hf_model)) is not None:
            raise ValueError(
                f"{type(self.hf_model).__name__} is no causal model: {reason} (of an encoder's "
                "class, is_decoder=True in its config makes one)"
            )
        self._seen: dict[str, PeftConfig] = {}
        self._moved: adapters.BaseMoved | None = None
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
        recompute_cheap(self.hf_model)
        fuse_lora(self.hf_model)
        fuse_rotary(self.hf_model)

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
                model, or a folder that `save_pretrained` wrote, or the Hub id of one.
            lora_config: LoRA of a new adapter; default r=8, lora_alpha=16, no dropout, on all
                linear layers but the head. A config without ``target_modules`` takes PEFT's default
                of the architecture (query and value projections).
            alpha_0, alpha_tilde, center, gamma: default 1 for a new adapter, the saved values for a
                saved one.
            dtype: of the base, as transformers takes it; "decode" is "auto" for a model that will
                only decode, which any x86-64 is fast at in bfloat16.
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
        model = cls(peft_model, **{**saved, **composition})
        model.recommended_strength, model.kl_budget = saving.recommendation(source)
        if (Path(source) / "tokenizer_config.json").exists():
            model._saved_tokenizer = source
        return model

    @classmethod
    def from_base(
        cls, base: PreTrainedModel, *, lora_config: LoraConfig | None = None, **composition: float
    ) -> "QAdapterModel":
        """A new adapter on a model in memory (LoRA layers are put into it in place)."""
        return cls(add_lora(base, lora_config), **composition)

    def save_pretrained(
        self, directory: str | Path, *, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Write a plain PEFT LoRA (safetensors), ``qadapter_config.json`` and a model card.

        Any PEFT loader reads the LoRA; alone it is the adapter stream, softmax(z_q). Raises
        OSError, leaving ``directory`` as it was, if something cannot be written.

        Args:
            state_dict: the adapter's weights, where an engine holds the model in parts:
                `qadapter.model.sharded.adapter_state`, which all processes make together.
        """
        if state_dict is None and sharded.is_sharded(self):
            raise ValueError(
                "state_dict: the model is in parts; QAdapterTrainer.save_model saves it, called by "
                "all processes"
            )
        composition = {**self.composition, "gamma": self.gamma}
        if self.recommended_strength is not None:
            composition["recommended_strength"] = self.recommended_strength
            composition["kl_budget"] = self.kl_budget
        with locking.alone(self.hf_model):
            known = self.base_fingerprint
            saving.save(self.peft_model, composition, known, directory, state_dict)

    def load_adapter_weights(self, directory: str | Path) -> None:
        """Replace the adapter's weights by those saved in ``directory`` (same LoRA, same base), and
        its recommended strength by theirs."""
        with locking.alone(self.hf_model):
            saving.load_weights(self, directory)
            self.recommended_strength, self.kl_budget = saving.recommendation(directory)

    def load_adapter(self, directory: str | Path, name: str) -> None:
        """Attach another saved adapter of the same base, for `generate` with ``adapters``: from a
        folder or the Hub.

        It takes part in nothing else: training, `forward` and saving stay with the model's own.

        Raises:
            ValueError: ``directory`` is not a saved adapter, or one of another base; ``name`` is
                taken or empty, has a dot, or begins a part of a layer's path ("1", "layers").
        """
        with locking.alone(self.hf_model):
            composition = saving.attach(self.peft_model, self.base_fingerprint, directory, name)
            self._others[name] = self.peft_model.peft_config[name], composition

    @property
    def adapter_names(self) -> list[str]:
        """The model's own adapter first, then those of `load_adapter` and of PEFT."""
        return list(self.compositions)

    @property
    def compositions(self) -> dict[str, Composition]:
        """Of each adapter, as trained, the model's own first; its, too, where PEFT alone knows the
        adapter."""
        own = Composition(self.alpha_0, self.alpha_tilde, self.center)
        active = str(self.peft_model.active_adapter)
        configs = self.peft_model.peft_config
        names = [active, *(name for name in configs if name != active)]
        # Not of an adapter that PEFT has since replaced by another of the same name.
        others = {n: c for n, (config, c) in self._others.items() if configs.get(n) is config}
        return {name: others.get(name, own) for name in names}

    def streams(self, names: Names) -> Streams:
        """How the streams ``names`` (None is the base) run at decoding; says so where that takes a
        pass for each, or the whole text at every token."""
        with locking.alone(self.hf_model):
            self._see_adapters()
            found = self._streams.get(names)
            if found is None or found.is_stale():
                found = self._streams[names] = Streams(self.peft_model, names)
                if found.reason is not None and len(names) > 1:
                    logger.warning("each stream takes a forward pass of its own: %s", found.reason)
                if self._needs is None:
                    self._needs = Needs(found)
                found.takes_positions = self._needs.takes_positions
                found.uncached = self._needs.uncached
                if found.uncached is not None:
                    logger.warning("every token takes a pass of the whole text: %s", found.uncached)
            return found

    def _padded_with_cache(self, streams: Streams, cached: bool) -> bool:
        """Whether padded rows decode with a cache; ValueError where they do in no way."""
        assert self._needs is not None
        cached = cached and streams.uncached is None
        reason = self._needs.padding(streams, cached)
        if reason is None:
            return cached
        if cached and self._needs.padding(streams, False) is None:
            logger.warning("padding: every token takes a pass of the whole text: %s", reason)
            return False
        raise ValueError(
            f"attention_mask: {type(self.hf_model).__name__} takes no padding on the left "
            f"({reason}); give prompts of one length, or one prompt at a time"
        )

    def _see_adapters(self) -> None:
        """Look again where PEFT's layers are if there are other adapters than before."""
        if self._moved is not None:
            raise self._moved
        if not adapters.differ(self._seen, self.peft_model):
            return
        try:
            adapters.refuse(self.peft_model)
        except adapters.BaseMoved as error:
            self._moved = error
            raise
        self._seen = dict(self.peft_model.peft_config)
        self._switches: list[Any] = switches(self.peft_model)
        self._streams: dict[Names, Streams] = {}
        self.selects_hidden_rows = values.head_is_plain(self.hf_model)

    # Properties.

    @property
    def config(self) -> Any:
        return self.hf_model.config

    @property
    def tokenizer_source(self) -> str:
        """Where its tokenizer is: in the adapter's folder if one was saved there (its chat template
        may be another), else where the base is."""
        return self._saved_tokenizer or str(self.config._name_or_path)

    @property
    def generation_config(self) -> Any:
        return self.hf_model.generation_config

    @property
    def device(self) -> torch.device:
        return self.hf_model.device

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: ids that the model takes."""
        return sharded.vocab_rows(self.hf_model)

    @property
    def base_fingerprint(self) -> dict[str, Any]:
        """Of the base as it is; as it was where an engine has since taken it apart."""
        if not sharded.is_sharded(self):
            self._fingerprint = fingerprint(self.hf_model)
        return self._fingerprint

    def set_composition(self, alpha_0: float, alpha_tilde: float, center: float) -> None:
        """Set alpha_0, alpha_tilde and center together, checked."""
        composition = Composition.checked(alpha_0, alpha_tilde, center)
        self.alpha_0, self.alpha_tilde, self.center = composition

    def checked_strength(
        self, strength: PerRow | str | None, adapters: Mapping[str, PerRow] | None = None
    ) -> PerRow | None:
        """``strength``, "recommended" replaced by ``recommended_strength``. ValueError where there
        is none, or where ``adapters`` are more than the model's own with weight 1."""
        if not isinstance(strength, str):
            return strength
        return recommended(strength, self.recommended_strength, self.adapter_names[0], adapters)

    # The streams.

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """Inside, the model is the frozen base.

        PEFT's own context manager also walks every module and changes requires_grad, milliseconds
        per use; here only the flags that its layers read are set.
        """
        with locking.alone(self.hf_model):
            self._see_adapters()
            before = [module._disable_adapters for module in self._switches]
            for module in self._switches:
                module._disable_adapters = True
            try:
                yield
            finally:
                for module, flag in zip(self._switches, before, strict=True):
                    module._disable_adapters = flag

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        strength: PerRow | str | None = None,
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
                each row, or "recommended" for all: ``recommended_strength``.
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
        check_prompts(input_ids, attention_mask, self.vocab_size)
        strength = self.checked_strength(strength, adapters)
        batch = input_ids.shape[0]
        names, weights = blend(self.compositions, batch, strength, alpha_0, alpha_tilde, adapters)
        own = nullcontext() if base_settings else without_settings(self.hf_model)
        with locking.alone(self.hf_model), own:
            streams = self.streams(names)  # first: it looks for adapters that PEFT has loaded since
            synced = sharded.is_sharded(self)
            padded = attention_mask is not None and not bool(attention_mask.all())
            if synced:  # what padding takes is tried, by all processes or none
                padded = sharded.anywhere([padded], input_ids.device)[0]
            if padded:
                cached = generation_kwargs.get("use_cache") is not False
                if not self._padded_with_cache(streams, cached):
                    generation_kwargs["use_cache"] = False
            head = self.hf_model.get_output_embeddings() if self.selects_hidden_rows else None
            return generate(
                streams,
                weights,
                head,
                input_ids,
                attention_mask,
                synced=synced,
                **generation_kwargs,
            )
