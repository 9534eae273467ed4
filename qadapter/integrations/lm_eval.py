"""EleutherAI's lm-evaluation-harness on the composed policy.

    python -m qadapter.integrations.lm_eval --model qadapter \\
        --model_args pretrained=out,strength=0.5 --tasks arc_easy

The harness finds no models of other packages by itself, so this is its own command line with one
model more; everything but ``--model qadapter`` is its. From Python:

    from qadapter.integrations.lm_eval import QAdapterLM
    lm_eval.simple_evaluate(model=QAdapterLM("out", strength=0.5), tasks=["arc_easy"])

Both log-likelihoods and generated text are of the policy that `QAdapterModel.generate` samples,
not of the LoRA alone.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from qadapter.composition import RECOMMENDED, stream_weights
from qadapter.model.modeling import QAdapterModel
from qadapter.text.tokenization import pad_token_id

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM, stop_sequences_criteria
except ImportError as error:
    raise ImportError(f'lm_eval is needed: pip install "qadapter[eval]" ({error})') from None

__all__ = ["QAdapterLM"]

OF_LOADING = (
    *("revision", "subfolder", "trust_remote_code", "parallelize", "max_memory_per_gpu"),
    *("max_cpu_memory", "peft", "delta", "autogptq", "gptqmodel", "gguf_file"),
    *("quantization_config", "load_in_4bit", "load_in_8bit"),
)
"""Arguments of the harness's model that matter only where it loads one itself."""


@register_model("qadapter")
class QAdapterLM(HFLM):
    """The harness's Hugging Face model with the composed policy's logits and text.

    Args:
        pretrained: a folder that `QAdapterModel.save_pretrained` or the trainer wrote, or a
            `QAdapterModel` (then with ``tokenizer``).
        strength: a number or "recommended", as `QAdapterModel.generate` takes it; None is the
            policy as trained.
        alpha_0, alpha_tilde: instead of strength.
        base_model: where the base is, if not where it was at training.
        device: default, the GPU if there is one.
        dtype: of the base; "auto" is the checkpoint's where this machine is fast in it.
        tokenizer: default, the one saved with the adapter, or the base's.
        **kwargs: the harness's (batch_size, max_length, ...).
    """

    def __init__(
        self,
        pretrained: str | QAdapterModel,
        strength: float | str | None = None,
        alpha_0: float | str | None = None,
        alpha_tilde: float | str | None = None,
        base_model: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> None:
        for name in OF_LOADING:
            if kwargs.get(name):
                raise ValueError(
                    f"{name}: got {kwargs[name]!r}, but the harness is handed a loaded model and "
                    "would not look at it; load the model with it and pass the QAdapterModel"
                )
        if isinstance(pretrained, QAdapterModel):
            if base_model is not None or dtype != "auto":
                raise ValueError("base_model, dtype: of a folder, but pretrained is a loaded model")
            own = pretrained
            if device is not None:
                own.to(device)
        else:
            # beside an accelerator that is not to be used, the CPU has to be fast in the dtype
            there: dict[str, Any] = {"device_map": "cpu"} if device == "cpu" else {}
            own = QAdapterModel.from_pretrained(
                pretrained, base_model=base_model, dtype=dtype, **there
            )
            own.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        own.eval()
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(own.tokenizer_source)
        asked: Any = own.checked_strength(strength) if strength == RECOMMENDED else strength
        # On a command line they come as text.
        knobs = {"strength": asked, "alpha_0": alpha_0, "alpha_tilde": alpha_tilde}
        self.knobs: dict[str, Any] = {k: None if v is None else float(v) for k, v in knobs.items()}
        trained = (own.alpha_0, own.alpha_tilde, own.center)
        self.weights = stream_weights(trained, **self.knobs)  # checks them
        super().__init__(pretrained=own.hf_model, tokenizer=tokenizer, backend="causal", **kwargs)
        self.two_streams = own

    def _model_call(
        self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """[B, T] ids, padded on the right -> [B, T, V], the policy's logits."""
        with torch.no_grad():
            base, q = self.two_streams(inps, attn_mask)
            logits = self.weights.q * q.float() + self.weights.base * base.float()
        return logits.view(*inps.shape, -1)

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> Tensor:
        """[B, T] ids, padded on the left -> with what the policy goes on with."""
        if generation_kwargs.get("temperature") == 0.0 or "do_sample" not in generation_kwargs:
            generation_kwargs["do_sample"] = generation_kwargs.get("temperature", 0.0) > 0.0
        if not generation_kwargs["do_sample"]:
            generation_kwargs.pop("temperature", None)
        # The harness pads with what the tokenizer has, which need not be in the model's embedding.
        pad = pad_token_id(self.tokenizer, self.two_streams)
        mask = generation_kwargs.get("attention_mask")
        if mask is not None:
            context = context.masked_fill(mask == 0, pad)
        criteria = stop_sequences_criteria(self.tokenizer, stop, context.shape[1], context.shape[0])
        made: Tensor = self.two_streams.generate(
            context,
            max_length=max_length,
            stopping_criteria=criteria,
            pad_token_id=pad,
            **self.knobs,
            **generation_kwargs,
        )
        return made


def main() -> None:
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    # Registered once under its own name, not again as part of __main__.
    from qadapter.integrations import lm_eval as module

    module.main()
