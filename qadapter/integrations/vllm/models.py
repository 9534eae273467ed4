"""The models that vLLM serves with streams: each a class of vLLM's, widened.

One mechanism serves all whose decoder layers are called with positions, hidden states and residual,
and whose logits are linear in the last hidden state. That is mixed, row by row, and handed on:
head, sampling, log-probabilities and all that follows are vLLM's.
"""

from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor
from vllm.model_executor.models.gemma2 import Gemma2ForCausalLM
from vllm.model_executor.models.gemma3 import Gemma3ForCausalLM
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from qadapter.integrations.vllm import strength, two_streams
from qadapter.model import lora_files
from qadapter.model.checkpoint import check_same_base
from qadapter.model.lora_files import SavedLora
from qadapter.model.serving import Settings
from qadapter.model.streamed_fingerprint import StreamedFingerprint


def refusal(vllm_config: Any) -> str | None:
    """Why an engine with these settings cannot serve streams, None if it can."""
    config = vllm_config.model_config.hf_config
    parallel, speculation = vllm_config.parallel_config, vllm_config.speculative_config
    v2 = vllm_config.use_v2_model_runner
    reasons = {
        "final_logit_softcapping: the logits of the streams are capped each by itself, so that "
        "mixing hidden states is not exact": getattr(config, "final_logit_softcapping", None),
        "dual_chunk_attention_config: one attention a stream is not known for it": getattr(
            config, "dual_chunk_attention_config", None
        ),
        "pipeline parallelism: stages hand on the rows of one stream": (
            parallel.pipeline_parallel_size > 1
        ),
        "dual batch overlap: it would not cut up the strengths of a batch": parallel.use_ubatching,
        "vLLM's own LoRA: it maps the rows of one stream to adapters": vllm_config.lora_config,
        "speculation with vLLM's V1 model runner: it hands on no strengths then": (
            speculation and not v2
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _shapes(lora: SavedLora) -> dict[str, list[Any]]:
    return {path: [layer.a.shape[0], layer.bias is not None] for path, layer in lora.layers.items()}


class _Streams:
    """Comes before a class of vLLM's. The engine's `Settings` are in ``hf_config.qadapter``."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        reason = refusal(vllm_config)
        settings = Settings.from_config(vllm_config.model_config.hf_config)
        if settings is None:
            reason = "no adapter: start it by `qadapter serve` or with `engine_arguments`"
        if settings is None or reason is not None:
            raise ValueError(f"{type(self).__name__}: {reason}")
        cast(Any, super()).__init__(vllm_config=vllm_config, prefix=prefix)
        loras = [lora_files.read(folder, "served") for folder in settings.folders.values()]
        two_streams.widen(self, loras, vllm_config)
        config = vllm_config.model_config.hf_config
        # vLLM keeps what it compiled under a hash of the config: what a folder holds belongs in it.
        config.qadapter = {**config.qadapter, "layers": [_shapes(lora) for lora in loras]}
        self._saved = {lora.folder: lora.saved["base_fingerprint"] for lora in loras}

    @staticmethod
    def get_model_state_cls() -> type:
        """Read by the V2 model runner."""
        return strength.model_state()

    def set_aux_hidden_state_layers(self, layers: tuple[int, ...]) -> None:
        raise ValueError(
            f"{type(self).__name__}: speculation from hidden states of several layers (EAGLE-3), "
            "which are of all streams here"
        )

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        stream_weights: Tensor | None = None,
    ) -> Tensor:
        """Mixed hidden states [T, D].

        ``stream_weights`` [T, streams] comes from the V2 model runner.
        """
        model: Any = self
        hidden = model.model(input_ids, positions, intermediate_tensors, inputs_embeds)
        streams = hidden.unflatten(0, (-1, positions.shape[0])).unbind()
        if stream_weights is None:
            stream_weights = strength.weights_of_batch(positions.shape[0])
        mixed = streams[0].float() * stream_weights[:, :1]
        for i, stream in enumerate(streams[1:], start=1):
            mixed.addcmul_(stream.float(), stream_weights[:, i : i + 1])
        return mixed.to(hidden.dtype)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """vLLM's own, which also looks whether this is the base that the adapters are for."""
        model: Any = self
        seen = StreamedFingerprint(model.config)
        loaded: set[str] = cast(Any, super()).load_weights(seen.watch(weights))
        for folder, saved in self._saved.items():
            check_same_base(saved, seen.compared_with(saved), folder, "the model that vLLM loads")
        return loaded


class QAdapterLlamaForCausalLM(_Streams, LlamaForCausalLM):
    """Llama, and what vLLM runs as a Llama."""


class QAdapterMistralForCausalLM(_Streams, MistralForCausalLM):
    """Mistral."""


class QAdapterQwen2ForCausalLM(_Streams, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5."""


class QAdapterQwen3ForCausalLM(_Streams, Qwen3ForCausalLM):
    """Qwen3, dense."""


class QAdapterGemma2ForCausalLM(_Streams, Gemma2ForCausalLM):
    """Gemma 2 without a cap on its last logits."""


class QAdapterGemma3ForCausalLM(_Streams, Gemma3ForCausalLM):
    """Gemma 3, text alone."""
