"""What can be wrapped into a two-stream model: loading a base, adding a LoRA, refusing the rest."""

import logging
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from qadapter import files
from qadapter.model import adapters, large_pages, quantised
from qadapter.model.checkpoint import is_adapter_name
from qadapter.model.precision import base_dtype
from qadapter.model.probe import BaseProbe, check_streams
from qadapter.model.sharded import refuse_partitioned

logger = logging.getLogger(__name__)


def load_base(source: str, dtype: Any, kwargs: dict[str, Any]) -> PreTrainedModel:
    dtype = base_dtype(dtype, source, **kwargs)
    if "generation_config" not in kwargs and (ids := _ids_of_refused_settings(source, kwargs)):
        kwargs = {**kwargs, "generation_config": ids}
    try:
        base = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **kwargs).eval()
        quantised.one_product(base)
        large_pages.settle(base)
        return base
    except AttributeError as error:  # a config that the class of its type cannot be made of
        raise ValueError(
            f"{source}: transformers makes no causal LM of it ({type(error).__name__}: {error})"
        ) from error


def _ids_of_refused_settings(source: str, kwargs: dict[str, Any]) -> GenerationConfig | None:
    """The special tokens of a generation_config.json that transformers refuses, for which it would
    not load the base either; None where it takes it, or there is none."""
    where = {name: kwargs[name] for name in ("revision", "token", "subfolder") if name in kwargs}
    try:
        GenerationConfig.from_pretrained(source, **where)
    except OSError:
        return None
    except ValueError as error:
        path = cached_file(source, "generation_config.json", **where)
        settings = files.read_json(str(path))
        logger.warning(
            "%s: its generation_config.json is not valid, only its special tokens count: %s",
            source,
            str(error).splitlines()[0],
        )
        ids = {name: value for name, value in settings.items() if name.endswith("_token_id")}
        return GenerationConfig(**ids)
    return None


def add_lora(base: PreTrainedModel, lora_config: LoraConfig | None) -> PeftModel:
    if not isinstance(base, PreTrainedModel):
        what = type(base).__name__
        raise ValueError(f"base: expected a transformers model (PreTrainedModel), got {what}")
    config = lora_config
    if config is None:
        # On every linear layer but the head: docs/quality.md, "Settings".
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    elif not isinstance(config, LoraConfig):
        raise ValueError(f"lora_config: expected a peft.LoraConfig, got {type(config).__name__}")
    _refuse_base(base)
    if any(isinstance(module, BaseTunerLayer) for module in base.modules()):
        raise ValueError(
            f"{type(base).__name__}: there is an adapter in this base already; merge it "
            "(merge_and_unload), remove it (unload), or pass the PeftModel to QAdapterModel"
        )
    adapters.refuse_adapter("default", config, base)
    quantised.one_product(base)
    probe = BaseProbe(base)
    peft_model = _put_lora(base, config)
    probe.check(base, f"this LoRA (init_lora_weights={config.init_lora_weights!r})")
    return peft_model


def _put_lora(base: PreTrainedModel, config: LoraConfig) -> PeftModel:
    method = getattr(base, "quantization_method", None)
    _leave_out_special_layers(base, config)
    try:
        try:
            return get_peft_model(base, config)
        except ValueError as error:
            # PEFT knows no default modules for this architecture.
            if config.target_modules is not None or "target_modules" not in str(error):
                raise
            config.target_modules = "all-linear"
            _leave_out_special_layers(base, config)
            return get_peft_model(base, config)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        what = f"quantised with {method}" if method else type(base).__name__
        raise ValueError(f"PEFT cannot put this LoRA on the base ({what}): {error}") from error


def _leave_out_special_layers(base: PreTrainedModel, config: LoraConfig) -> None:
    """ "all-linear" without the layers that a LoRA cannot be put on, or would not count on."""
    special = special_layers(base)
    if special and config.target_modules == "all-linear" and not config.exclude_modules:
        config.exclude_modules = special


def special_layers(base: nn.Module) -> list[str]:
    """Ends of the names of linear layers that are not plain products of their input.

    Routers that also choose (Llama 4, Phi-MoE). And what a selective scan (Mamba) reads: fused
    kernels take these weights past their layers, so that a LoRA would count on some machines and
    not on others; PEFT refuses some of them.
    """
    special: set[str] = set()
    for path, module in base.named_modules():
        scan = isinstance(getattr(module, "A_log", None), Tensor) and hasattr(module, "D")
        for name, child in module.named_children():
            if not isinstance(child, nn.Linear):
                continue
            if (scan and name in ("x_proj", "dt_proj", "out_proj")) or not _is_product(child):
                special.add(f"{path.rpartition('.')[2]}.{name}")
    return sorted(special)


@torch.no_grad()
def _is_product(layer: nn.Linear) -> bool:
    plain = type(layer).forward is nn.Linear.forward
    if plain or not layer.weight.is_floating_point() or layer.weight.element_size() < 2:
        return True  # quantised layers have PEFT's own wrappers
    try:
        out = layer(layer.weight.new_zeros(1, layer.in_features))
    except Exception:  # it wants something else than rows
        return False
    return isinstance(out, Tensor) and out.shape == (1, layer.out_features)


def _refuse_base(model: Any) -> None:
    refuse_partitioned(model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None or model.config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__}: expected a decoder-only causal LM with a language-model head"
        )
    if isinstance(head, nn.ModuleList | nn.ModuleDict | list | tuple):
        raise ValueError(
            f"{type(model).__name__}: it has {len(head)} heads, for as many tokens a step (such as "
            "codebooks of audio); expected a causal LM with one language-model head"
        )


def refuse_unsupported(peft_model: PeftModel) -> None:
    model: Any = peft_model.get_base_model()
    _refuse_base(model)
    quantised.one_product(model)
    adapters.refuse(peft_model)
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
    check_streams(peft_model)


def _tied(model: PreTrainedModel) -> bool:
    return bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
