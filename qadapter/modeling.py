"""The two-stream model: a frozen causal LM and the same LM with a LoRA adapter.

Both streams share every frozen weight. The base stream runs under no_grad with the adapter off, the
adapter stream with it on; their logits z_b and z_q are what `qadapter.functional` composes.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qadapter import _checks, files, generation, packed_attention, two_streams
from qadapter.activations import recompute_cheap
from qadapter.checkpoint import (
    CONFIG_NAME,
    base_alias,
    check_same_base,
    fingerprint,
    is_adapter_folder,
    model_card,
    package_version,
    read_config,
    resolve_model,
)
from qadapter.outputs import ResidualValues, TwoStreamLogits, TwoStreamValues
from qadapter.streams import Names, Streams
from qadapter.wrapping import add_lora, load_base, refuse_unsupported

logger = logging.getLogger(__name__)


class QAdapterModel(nn.Module):
    """A frozen causal LM, its LoRA adapter, and the weights they are composed with.

    Args:
        peft_model: a `peft.PeftModel` around a decoder-only causal LM, with one active LoRA.
        alpha_0, alpha_tilde, center, gamma: see `qadapter.functional`; stored with the adapter.

    Raises:
        ValueError: the model cannot be composed exactly: no language-model head, an
            encoder-decoder, trained base weights, training of an embedding that is tied to the
            head, or an adapter that is merged into the weights.
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
        self._others: dict[str, tuple[float, float, float]] = {}
        self.set_composition(alpha_0, alpha_tilde, center)
        self.gamma = _checks.number("gamma", gamma)
        refuse_unsupported(peft_model)
        self._seen: set[str] = set()
        self._see_adapters()
        if not self.selects_hidden_rows:
            logger.warning(
                "%s does more to its logits than one language-model head on the last hidden state "
                "(soft cap, scale or adapted head): logits are computed at every position and then "
                "selected, which is exact and slower.",
                type(self.hf_model).__name__,
            )
        self.eval()
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
        saved = read_config(source)
        base_source = resolve_model(base_model if base_model is not None else saved["base_model"])
        base = load_base(base_source, dtype, from_pretrained_kwargs)
        check_same_base(saved["base_fingerprint"], fingerprint(base), source, base_source)
        peft_model = PeftModel.from_pretrained(base, source, is_trainable=True)
        return cls(peft_model, **{**{name: saved[name] for name in given}, **composition})

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
        base_name = str(self.hf_model.config._name_or_path or "")
        config = {
            "qadapter_version": package_version(),
            "alpha_0": self.alpha_0,
            "alpha_tilde": self.alpha_tilde,
            "center": self.center,
            "gamma": self.gamma,
            "base_model": base_alias(base_name),
            "base_fingerprint": fingerprint(self.hf_model),
        }
        with files.replacing_directory(directory) as temporary:
            self.peft_model.save_pretrained(
                str(temporary), safe_serialization=True, selected_adapters=self.adapter_names[:1]
            )
            files.write_json(temporary / CONFIG_NAME, config)
            (temporary / "README.md").write_text(model_card(config), encoding="utf-8")

    def load_adapter_weights(self, directory: str | Path) -> None:
        """Replace the adapter's weights by those saved in ``directory`` (same LoRA, same base)."""
        saved = read_config(directory)
        source = str(directory)
        check_same_base(saved["base_fingerprint"], fingerprint(self.hf_model), source, "this model")
        self.peft_model.load_adapter(source, self.peft_model.active_adapter, is_trainable=True)

    def load_adapter(self, directory: str | Path, name: str) -> None:
        """Attach another saved adapter of the same base, for `generate` with ``adapters``.

        It takes part in nothing else: training, `forward` and saving stay with the model's own.

        Raises:
            ValueError: ``directory`` is not a saved adapter, or one of another base; ``name`` is
                taken or empty or has a dot.
        """
        if not is_adapter_folder(str(directory)):
            raise ValueError(f"directory: {directory} is not the folder of a saved adapter")
        if not name or "." in name:
            raise ValueError(f"name: expected a name without dots, got {name!r}")
        if name in self.adapter_names:
            raise ValueError(f"name: there is an adapter {name!r} already")
        saved = read_config(directory)
        check_same_base(
            saved["base_fingerprint"], fingerprint(self.hf_model), str(directory), "this model"
        )
        composition = _checks.composition(saved["alpha_0"], saved["alpha_tilde"], saved["center"])
        try:
            self.peft_model.load_adapter(str(directory), name, is_trainable=False)
        except Exception:
            if name in self.peft_model.peft_config:
                self.peft_model.delete_adapter(name)
            raise
        self._others[name] = composition

    @property
    def adapter_names(self) -> list[str]:
        """The model's own adapter first, then those of `load_adapter` and of PEFT."""
        return list(self.compositions)

    @property
    def compositions(self) -> dict[str, tuple[float, float, float]]:
        """alpha_0, alpha_tilde and center of each adapter, as trained; the model's own where PEFT
        alone knows the adapter."""
        own = (self.alpha_0, self.alpha_tilde, self.center)
        active = str(self.peft_model.active_adapter)
        names = [active, *(name for name in self.peft_model.peft_config if name != active)]
        return {name: self._others.get(name, own) for name in names}

    def streams(self, names: Names) -> Streams:
        """How the streams ``names`` (None is the base) run at decoding; says so where that takes a
        pass for each."""
        self._see_adapters()
        found = self._streams.get(names)
        if found is None or found.is_stale():
            found = self._streams[names] = Streams(self, names)
            if found.reason is not None and len(names) > 1:
                logger.warning("each stream takes a forward pass of its own: %s", found.reason)
        return found

    def _see_adapters(self) -> None:
        """Look again where PEFT's layers are if there are other adapters than before."""
        if self._seen == set(self.peft_model.peft_config):
            return
        self._seen = set(self.peft_model.peft_config)
        self._switches = [
            module
            for module in self.peft_model.modules()
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        ]
        self._streams: dict[Names, Streams] = {}
        self.selects_hidden_rows = two_streams.head_is_plain(self.hf_model)

    # Properties.

    @property
    def hf_model(self) -> PreTrainedModel:
        """The transformers model, LoRA layers in place."""
        return cast(PreTrainedModel, self.peft_model.get_base_model())

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
        self.alpha_0, self.alpha_tilde, self.center = _checks.composition(
            alpha_0, alpha_tilde, center
        )
        if self.center == 1.0 and not 0.5 <= self.alpha_0 / self.alpha_tilde <= 2.0:
            warnings.warn(
                f"center=1 with alpha_0={self.alpha_0:g} and alpha_tilde={self.alpha_tilde:g}: the "
                "policy starts at the base raised to the power alpha_0/alpha_tilde, "
                f"{self.alpha_0 / self.alpha_tilde:g}, far from the base; keep the two close and "
                "set the size of Q by bt_scale, or use center=0",
                stacklevel=3,
            )

    # The two streams.

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """Inside, the model is the frozen base.

        PEFT's own context manager also walks every module and changes requires_grad, milliseconds
        per use; here only the flags that its layers read are set.
        """
        self._see_adapters()
        before = [module._disable_adapters for module in self._switches]
        for module in self._switches:
            module._disable_adapters = True
        try:
            yield
        finally:
            for module, flag in zip(self._switches, before, strict=True):
                module._disable_adapters = flag

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
            **packing: of a packed batch, see `qadapter.packed_attention`.

        Returns:
            `TwoStreamLogits` of [N, V]; with ``actions``, `TwoStreamValues`.
        """
        given = {"attention_mask": attention_mask, "position_ids": position_ids, **packing}
        arguments = {name: value for name, value in given.items() if value is not None}
        if actions is None or use_logits or not self.selects_hidden_rows:
            with torch.no_grad(), self.adapter_off():
                base_logits = self._stream_logits(input_ids, rows, arguments)
            logits = TwoStreamLogits(base_logits, self._stream_logits(input_ids, rows, arguments))
            if actions is None:
                return logits
            return two_streams.values_of_logits(logits, actions, kl_rows, self.composition)
        known = two_streams.KnownBase(base_lse, base_logp, base_hidden)
        if unique_rows is None or unique_index is None or rows is None:
            return two_streams.values_of_hidden(
                self, input_ids, rows, arguments, actions, known, kl_rows
            )
        made = two_streams.values_of_hidden(
            self,
            input_ids,
            rows[unique_rows],
            arguments,
            actions[unique_rows],
            known.rows(unique_rows),
            None if kl_rows is None else unique_index[kl_rows],
        )
        values = ResidualValues(*(value[unique_index] for value in made.values))
        return TwoStreamValues(values, made.kl)

    def base_statistics(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What a training step needs of the base: base_lse, base_logp float32 [N] (base_logp is 0
        in rows without action), base_hidden [N, D], for a collated batch on the model's device."""
        return two_streams.base_statistics(self, batch)

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
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Sample from the composed policy; see `qadapter.generation.generate` for arguments."""
        return generation.generate(self, input_ids, attention_mask, **kwargs)

    # What a trainer asks of a model.

    def train(self, mode: bool = True) -> "QAdapterModel":
        """Training mode for the adapter alone.

        The base is frozen, so its dropout would be noise between the two streams: it stays off.
        LoRA's own dropout and the layers that do gradient checkpointing follow ``mode``.
        """
        super().train(mode)
        if mode:
            for name, module in self.peft_model.named_modules():
                is_lora = isinstance(module, BaseTunerLayer) or ".lora_" in name
                module.training = is_lora or isinstance(module, GradientCheckpointingLayer)
        return self

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Recompute activations in backward; the base stream keeps none and is not affected."""
        model = self.hf_model
        model.enable_input_require_grads()
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable(
                activation_checkpointing_kwargs=activation_checkpointing_kwargs, **kwargs
            )
        else:
            model.gradient_checkpointing_enable(activation_checkpointing_kwargs)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        self.hf_model.gradient_checkpointing_disable()
        self.hf_model.disable_input_require_grads()
