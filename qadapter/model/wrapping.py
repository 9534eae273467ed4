"""What can be wrapped into a two-stream model: loading a base, adding a LoRA, refusing the rest."""

from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import AutoModelForCausalLM, PreTrainedModel

from qadapter.model.checkpoint import is_adapter_name
from qadapter.model.precision import base_dtype


def load_base(source: str, dtype: Any, kwargs: dict[str, Any]) -> PreTrainedModel:
    dtype = base_dtype(dtype, source, **kwargs)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **kwargs)
    return model.eval()


def add_lora(base: PreTrainedModel, lora_config: LoraConfig | None) -> PeftModel:
    config = lora_config
    if config is None:
        # On every linear layer but the head: docs/quality.md, "Settings".
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    elif not isinstance(config, LoraConfig):
        raise ValueError(f"lora_config: expected a peft.LoraConfig, got {type(config).__name__}")
    quantised = getattr(base, "quantization_method", None)
    try:
        try:
            return get_peft_model(base, config)
        except ValueError as error:
            # PEFT knows no default modules for this architecture.
            if config.target_modules is not None or "target_modules" not in str(error):
                raise
            config.target_modules = "all-linear"
            return get_peft_model(base, config)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        what = f"quantised with {quantised}" if quantised else type(base).__name__
        raise ValueError(f"PEFT cannot put this LoRA on the base ({what}): {error}") from error


def refuse_unsupported(peft_model: PeftModel) -> None:
    model: Any = peft_model.get_base_model()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None or model.config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__}: expected a decoder-only causal LM with a language-model head"
        )
    if len(peft_model.active_adapters) != 1:
        raise ValueError(
            f"expected one active adapter, got {len(peft_model.active_adapters)}: "
            f"{', '.join(peft_model.active_adapters)}"
        )
    if peft_model.peft_config[peft_model.active_adapter].is_prompt_learning:
        raise ValueError("prompt-learning adapters change the sequence: expected a LoRA")
    if any(m.merged for m in peft_model.modules() if isinstance(m, BaseTunerLayer)):
        raise ValueError(
            "the adapter is merged into the base weights, so there is no base stream left; "
            "unmerge it first (peft_model.unmerge_adapter())"
        )
    trained = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not is_adapter_name(name)
    ]
    if trained:
        raise ValueError(
            f"{len(trained)} base weights require gradients ({trained[0]}, ...): the base must "
            "stay frozen, freeze them or leave the training to the LoRA"
        )
    embedding = model.get_input_embeddings()
    if isinstance(embedding, AuxiliaryTrainingWrapper | BaseTunerLayer) and _tied(model):
        raise ValueError(
            "the adapter trains the input embedding, which is tied to the language-model head: the "
            "head would change with it only in part; untie them or take the embedding out of "
            "modules_to_save, target_modules and trainable_token_indices"
        )


def _tied(model: PreTrainedModel) -> bool:
    return bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
