"""A base whose linear layers are quantised: by bitsandbytes (nf4, int8) or by torchao.

Embedding, norms and head stay floats, so that the head's operations are those of any other base.
"""

import logging
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from transformers import AutoConfig

from qadapter.model.precision import base_dtype

logger = logging.getLogger(__name__)

# PEFT's LoRA on layers of theirs, and their modules, which may not be installed.
_LORA = {
    ("peft.tuners.lora.bnb", "Linear4bit"),
    ("peft.tuners.lora.bnb", "Linear8bitLt"),
    ("peft.tuners.lora.torchao", "TorchaoLoraLinear"),
}
_ON_LOADING = ("bitsandbytes", "torchao")


def _mixes_rows(module: nn.Module) -> bool:
    # LLM.int8: a column with an outlier in any row is taken in float16 in every row.
    state = getattr(module, "state", None)
    return type(module).__name__ == "Linear8bitLt" and getattr(state, "threshold", 0.0) > 0


def mixes_rows(model: nn.Module) -> bool:
    """Whether what a layer makes of a token depends, in its last digits, on other tokens of the
    batch: bitsandbytes' int8, but with ``llm_int8_threshold=0``."""
    return any(_mixes_rows(module) for module in model.modules())


def is_lora_linear(module: Any) -> bool:
    """Whether this is PEFT's LoRA on a linear layer, plain or quantised, that takes each row for
    itself and adds the LoRA to its output."""
    kind = type(module)
    if kind is LoraLinear:
        return True
    base: Any = getattr(module, "base_layer", None)
    return (kind.__module__, kind.__name__) in _LORA and not _mixes_rows(base)


def one_product(model: nn.Module) -> None:
    """Have bitsandbytes' layers in 4 bits take the same product whether or not there is a gradient,
    as the two streams do. On some CPUs it would change the weights in place, to take another one
    (bfloat16, of rounded absolute maxima) where there is none.

    Raises:
        ValueError: it has done so.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit" and hasattr(module, "quant_state"):
            if hasattr(module, "support_avx512bf16_for_cpu"):
                vars(module)["support_avx512bf16_for_cpu"] = False
            state = getattr(module.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                raise ValueError(
                    "this base has been used before on a CPU where bitsandbytes then rounds what "
                    "it knows of the weights: load it again, and hand it over as it is"
                )


def compute_dtype(dtype: torch.dtype | str, source: str, **kwargs: Any) -> torch.dtype:
    """What a quantised base computes in: ``dtype`` as `QAdapterModel.from_pretrained` takes it,
    which gets ``kwargs`` too; "auto" is the checkpoint's where this machine is fast in it."""
    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype)
    dtype = base_dtype(dtype, source, **kwargs)
    if isinstance(dtype, torch.dtype):
        return dtype
    stored = AutoConfig.from_pretrained(source, **kwargs).dtype
    return stored if isinstance(stored, torch.dtype) else torch.float32


def bits_and_bytes(bits: int, dtype: torch.dtype) -> Any:
    """transformers' settings for a base in 4 bits (nf4, quantised twice) or 8 (LLM.int8).

    Four bits are stored in elements of ``dtype``, which FSDP2 shards like other weights.
    """
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )


def as_at_training(
    fingerprint: dict[str, Any], source: str, dtype: torch.dtype | str, **kwargs: Any
) -> dict[str, Any]:
    """Keywords of ``from_pretrained`` that quantise a base on loading as the saved fingerprint of
    an adapter says; none where it was not quantised so."""
    settings = fingerprint.get("quantisation")
    if not settings or settings.get("quant_method") not in _ON_LOADING:
        return {}
    config = AutoConfig.from_pretrained(source, **kwargs)
    if getattr(config, "quantization_config", None) is not None:
        return {}  # it comes quantised
    from transformers.quantizers.auto import AutoQuantizationConfig

    computed = compute_dtype(dtype, source, **kwargs)
    if settings["quant_method"] == "bitsandbytes" and settings.get("load_in_4bit"):
        name = str(computed).removeprefix("torch.")
        settings = settings | {"bnb_4bit_compute_dtype": name, "bnb_4bit_quant_storage": name}
    logger.warning("%s is quantised as it was at training (%s)", source, settings["quant_method"])
    made = AutoQuantizationConfig.from_dict(dict(settings))
    return {"quantization_config": made, "dtype": computed}


def refuse_shards(model: nn.Module, engine: str, computes_in: torch.dtype | None) -> None:
    """ValueError for a quantised base that ``engine`` ("FSDP2" or "ZeRO-3") would not shard, or
    not as what it is.

    Args:
        computes_in: the dtype to which FSDP2 casts what floats (mixed precision); None, to none.
    """
    for name, parameter in model.named_parameters():
        kind = type(parameter).__name__
        if kind in ("Parameter", "DTensor") and parameter.dtype != torch.int8:
            continue
        if engine == "FSDP2" and kind == "Params4bit" and parameter.is_floating_point():
            if computes_in in (None, parameter.dtype):
                continue
            raise ValueError(
                f"{engine}: {name} is in 4 bits, stored in {parameter.dtype}, and would be cast to "
                f"{computes_in}: take bnb_4bit_quant_storage={computes_in}"
            )
        advice = "bnb_4bit_quant_storage=torch.bfloat16 with nf4, or leave the base whole (DDP)"
        if engine != "FSDP2":
            advice = "FSDP2 with nf4, or ZeRO-2"
        raise ValueError(
            f"{engine}: {name} is quantised ({kind} of {parameter.dtype}) and would not be "
            f"sharded as what it is: take {advice}"
        )
