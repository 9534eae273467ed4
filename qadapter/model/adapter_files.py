"""The files of a saved adapter against the model that they are loaded into.

PEFT loads what fits, warns of what is missing, and takes weights of the base along. Here a file is
for this base and this adapter, all of it, or it is refused before it has changed anything.
"""

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import load_peft_weights
from torch import Tensor, nn

from qadapter.model.adapters import refuse_adapter
from qadapter.model.checkpoint import name_without_peft


def read_adapter_config(directory: str | Path) -> PeftConfig:
    """``adapter_config.json``; ValueError for an adapter that moves the base or cannot be off."""
    config = PeftConfig.from_pretrained(str(directory))
    refuse_adapter(str(directory), config)
    return config


def check_base_weights(base: nn.Module, directory: str | Path, config: PeftConfig) -> None:
    """ValueError if the file brings along weights of the base that are not those of ``base``.

    PEFT saves the embedding where it is adapted or was resized, and would load it into the base.
    """
    here = {name_without_peft(name): parameter for name, parameter in base.named_parameters()}
    saved_whole = tuple(getattr(config, "modules_to_save", None) or ())
    for key, there in load_peft_weights(str(directory), device="cpu").items():
        name = name_without_peft(key.removeprefix("base_model.model."))
        if name not in here or name.rpartition(".")[0].endswith(saved_whole):
            continue
        if not _same(here[name].detach().cpu(), there):
            raise ValueError(
                f"{directory}: {name} in its file is not that of this base; was the base resized or"
                " trained with the adapter? Save that base by itself and load the adapter on it"
            )


def check_same_adapter(peft_model: PeftModel, name: str, directory: str | Path) -> None:
    """ValueError if the adapter in ``directory`` is not one like ``name``, other weights aside."""
    here = peft_model.peft_config[name]
    there = read_adapter_config(directory)
    if type(here) is not type(there):
        raise ValueError(f"{directory}: a {there.peft_type} adapter, expected {here.peft_type}")
    ours, theirs = _lasting(here), _lasting(there)
    for option in sorted(ours.keys() & theirs.keys()):
        if ours[option] != theirs[option]:
            raise ValueError(
                f"{directory}: {option} is {theirs[option]!r} in this adapter, "
                f"{ours[option]!r} in the model's"
            )
    shapes = {_adapter_key(k, name): tuple(p.shape) for k, p in peft_model.state_dict().items()}
    for key, weight in load_peft_weights(str(directory), device="cpu").items():
        shape = shapes.get(key, tuple(weight.shape))
        if shape != tuple(weight.shape):
            raise ValueError(
                f"{directory}: {key} has shape {tuple(weight.shape)}, expected {shape}: another "
                "rank or other layers"
            )


def load(peft_model: PeftModel, directory: str | Path, name: str, trainable: bool) -> None:
    """PEFT's `load_adapter`; ValueError if the file has other weights than the adapter."""
    result: Any = peft_model.load_adapter(str(directory), name, is_trainable=trainable)
    # Shared by all layers and saved once.
    missing = [key for key in result.missing_keys if "vblora_vector_bank" not in key]
    for what, keys in (("lacks", missing), ("has too much:", result.unexpected_keys)):
        if keys:
            raise ValueError(
                f"{directory}: its file {what} {len(keys)} weights of this adapter ({keys[0]}, "
                "...): another choice of layers, or an incomplete copy"
            )


def _adapter_key(key: str, name: str) -> str:
    """As PEFT writes a key: without the adapter's name."""
    return key.replace(f".{name}.", ".").removesuffix(f".{name}")


def _same(one: Tensor, other: Tensor) -> bool:
    """The same weight, one of them perhaps rounded to the other's dtype."""
    if one.shape != other.shape:
        return False
    return torch.equal(one.to(other.dtype), other) or torch.equal(other.to(one.dtype), one)


# Which layers an adapter is on is seen in its weights; how these began does not matter any more.
_ELSEWHERE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_WITHOUT_EFFECT = (
    "init",
    "base_model",
    "peft_version",
    "revision",
    "inference",
    "task_type",
    "auto",
)


def _lasting(config: PeftConfig) -> dict[str, Any]:
    """What an adapter does with its weights, for comparison."""
    return {
        name: sorted(value) if isinstance(value, set | tuple | list) else value
        for name, value in config.to_dict().items()
        if not name.startswith(_WITHOUT_EFFECT)
        and "dropout" not in name
        and name not in (*_ELSEWHERE, "eva_config")
    }
