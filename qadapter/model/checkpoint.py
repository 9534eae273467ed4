"""What lies beside a saved LoRA: how it is composed, and which base it belongs to."""

from pathlib import Path
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import Tensor

from qadapter import files

CONFIG_NAME = "qadapter_config.json"
PROBE_SIZE = 32


def resolve_model(name: str | Path) -> str:
    """A path or Hub id as a string; "smollm2" becomes the packaged model's folder."""
    if str(name) == "smollm2" and not Path("smollm2").exists():
        from qadapter.model.packaged import packaged_model

        return str(packaged_model("smollm2"))
    path = Path(name)
    if path.is_dir():
        known = ("config.json", "adapter_config.json", CONFIG_NAME)
        if not any((path / file).exists() for file in known):
            raise FileNotFoundError(f"{path} holds no model: none of {', '.join(known)} is there")
    elif path.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1:
        raise FileNotFoundError(f"{name}: no such folder")
    return str(name)


def is_adapter_folder(source: str | Path) -> bool:
    path = Path(source)
    return (path / "adapter_config.json").exists() or (path / CONFIG_NAME).exists()


def read_config(directory: str | Path) -> dict[str, Any]:
    """The contents of ``qadapter_config.json``, checked; ValueError explains what is missing."""
    path = Path(directory)
    if not (path / CONFIG_NAME).exists():
        raise ValueError(
            f"{path} holds a PEFT adapter but no {CONFIG_NAME}: it was not saved by qadapter, and "
            "how to compose it with its base (alpha_0, alpha_tilde, center) is not known. To use a "
            "plain LoRA, load it with peft and pass it on: QAdapterModel(peft_model, center=1.0)"
        )
    if not (path / "adapter_config.json").exists():
        raise ValueError(f"{path} holds {CONFIG_NAME} but no adapter_config.json: incomplete copy?")
    config = files.read_json(path / CONFIG_NAME)
    required = ("alpha_0", "alpha_tilde", "center", "gamma", "base_model", "base_fingerprint")
    missing = [name for name in required if not isinstance(config, dict) or name not in config]
    if missing:
        raise ValueError(f"{path / CONFIG_NAME}: missing {', '.join(missing)}")
    return config


def fingerprint(model: Any) -> dict[str, Any]:
    """Enough of a base model to tell it from another, whatever dtype it is loaded in.

    Besides its shape, a few entries of the embedding and of the last two-dimensional weight.
    """
    embedding = _of_the_base(model.get_input_embeddings()).weight.detach()
    last = embedding
    for name, parameter in model.named_parameters():
        plain = parameter.ndim == 2 and parameter.is_floating_point()
        if plain and not is_adapter_name(name):
            last = parameter.detach()
    return {
        "model_type": model.config.get_text_config().model_type,
        "hidden_size": int(embedding.shape[1]),
        "vocab_size": int(embedding.shape[0]),
        "embedding_probe": _probe(embedding),
        "layer_probe": _probe(last),
    }


def _of_the_base(module: Any) -> Any:
    """The layer under PEFT's wrappers, whose ``weight`` may be one that is trained."""
    while (
        inner := getattr(module, "original_module", getattr(module, "base_layer", None))
    ) is not None:
        module = inner
    return module


def _probe(weight: Tensor) -> list[float]:
    index = torch.linspace(0, weight.numel() - 1, PROBE_SIZE, dtype=torch.float64).long()
    row, column = index // weight.shape[1], index % weight.shape[1]
    values = weight[row.to(weight.device), column.to(weight.device)].float().cpu()
    return [round(value, 7) for value in values.tolist()]


_ADAPTER_MARKS = (".modules_to_save.", *(f".{p}" for p in PEFT_TYPE_TO_PREFIX_MAPPING.values()))


def is_adapter_name(name: str) -> bool:
    """Whether PEFT added the parameter, whatever the kind of the adapter."""
    return any(mark in name for mark in _ADAPTER_MARKS)


def check_same_base(saved: dict[str, Any], now: dict[str, Any], adapter: str, base: str) -> None:
    for key in ("model_type", "hidden_size", "vocab_size"):
        if saved[key] != now[key]:
            raise ValueError(
                f"the adapter {adapter} is for another base than {base}: {key} {saved[key]} at "
                f"training, {now[key]} here"
            )
    for key in ("embedding_probe", "layer_probe"):
        then, here = torch.tensor(saved[key]), torch.tensor(now[key])
        # 1 % and a little: rounding to bfloat16 or float16 passes, another model does not.
        if ((then - here).abs() > 0.01 * then.abs() + 0.002 * then.abs().max()).any():
            raise ValueError(
                f"the adapter {adapter} is for another base than {base}: same shape, other weights "
                f"({key.removesuffix('_probe')})"
            )


def base_alias(base_name: str) -> str:
    """The name of the packaged model for its folder, which differs from machine to machine."""
    from qadapter.model.packaged import default_cache_dir

    path = Path(base_name)
    if path.parent == default_cache_dir() / "models":
        return path.name.partition("-")[0]
    return base_name


def model_card(config: dict[str, Any]) -> str:
    return f"""---
library_name: peft
base_model: {config["base_model"]}
tags: [qadapter, lora, preference]
---
# Q-Adapter

A residual Q-function for `{config["base_model"]}`, trained on preference pairs with qadapter
{config["qadapter_version"]} (method: Q-Adapter, arXiv 2407.03856). The policy is

    pi(a|s) = softmax((Q(s,a) + alpha_0 log pi_base(a|s)) / alpha_tilde),   Q = z_q - center * z_b

with alpha_0 = {config["alpha_0"]:g}, alpha_tilde = {config["alpha_tilde"]:g} and
center = {config["center"]:g} (z_b: logits of the base, z_q: logits with the LoRA).
Loaded as a plain LoRA, only z_q is used.

```python
from qadapter import QAdapterModel

model = QAdapterModel.from_pretrained("this folder")
model.generate(**tokenizer("Hello", return_tensors="pt"), strength=1.0)
```
"""
