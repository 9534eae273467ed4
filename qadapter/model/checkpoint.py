"""What lies beside a saved LoRA: how it is composed, and which base it belongs to."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import Tensor
from transformers import AutoConfig

from qadapter import files

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
CONFIG_NAME = "qadapter_config.json"
PROBE_SIZE = 32


def resolve_model(name: str | Path) -> str:
    """A path or Hub id as a string; "smollm2" becomes the packaged model's folder, the name of an
    adapter on the Hub that of its files."""
    if not isinstance(name, str | os.PathLike):
        raise ValueError(f"expected the name or the folder of a model, got {name!r}")
    if str(name) == "smollm2" and not Path("smollm2").exists():
        from qadapter.model.packaged import packaged_model

        return str(packaged_model("smollm2"))
    path = Path(name := from_hub(name))
    if path.is_dir():
        known = ("config.json", "adapter_config.json", CONFIG_NAME)
        if not any((path / file).exists() for file in known):
            raise FileNotFoundError(f"{path} holds no model: none of {', '.join(known)} is there")
    elif path.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1:
        raise FileNotFoundError(f"{name}: no such folder")
    return str(name)


def adapter_folder(given: str | Path, what: str) -> str:
    """The folder of a saved adapter, or of the files of one that is on the Hub, which are fetched.
    ValueError, which names ``what`` was given, where it is none."""
    folder = from_hub(given)
    if not is_adapter_folder(folder):
        raise ValueError(f"{what}: {given} is not the folder of a saved adapter")
    return folder


def from_hub(name: str | Path) -> str:
    """Where the files of an adapter lie that is on the Hub by this name, fetched if need be; the
    name itself where no such adapter is to be had. Weights in safetensors alone."""
    if not _HUB_NAME.fullmatch(str(name)) or Path(name).exists():
        return str(name)
    try:
        hf_hub_download(str(name), CONFIG_NAME)
    except (OSError, EntryNotFoundError, HFValidationError):
        return str(name)
    # Checkpoints lie in folders of their own.
    left_out = ["*/*", "*.bin", "*.pt", "*.pth", "*.pkl"]
    return str(snapshot_download(str(name), ignore_patterns=left_out))


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

    Besides its shape, a few entries of the embedding and of the last two-dimensional weight, one
    of each of some weights between, and how it is quantised.
    """
    embedding = _base_layer(model.get_input_embeddings()).weight.detach()
    matrices = plain_matrices(model)
    last = list(matrices.values())[-1] if matrices else embedding
    return {
        "model_type": model.config.get_text_config().model_type,
        "hidden_size": int(embedding.shape[1]),
        "vocab_size": int(embedding.shape[0]),
        "embedding_probe": probe(embedding),
        "layer_probe": probe(last),
        "body_probe": _body_probe(matrices),
        "quantisation": quantisation(model),
    }


def plain_matrices(model: Any) -> dict[str, Tensor]:
    """The base's two-dimensional weights that are not quantised, by their names in its files."""
    return {
        name_without_peft(name): parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and is_ordinary(parameter) and not is_adapter_name(name)
    }


def fingerprint_digest(found: dict[str, Any]) -> str:
    """A fingerprint in one word."""
    octets = json.dumps(found, sort_keys=True).encode()
    return f"{found['model_type']} {hashlib.blake2b(octets, digest_size=4).hexdigest()}"


def _base_layer(module: Any) -> Any:
    """What PEFT has wrapped."""
    while True:
        inner = getattr(module, "original_module", None)
        inner = getattr(module, "base_layer", None) if inner is None else inner
        if inner is None:
            return module
        module = inner


def _is_plain(parameter: Tensor) -> bool:
    return parameter.is_floating_point() and parameter.element_size() >= 2


def probe(weight: Tensor) -> list[float]:
    """A few entries of a weight."""
    index = torch.linspace(0, weight.numel() - 1, PROBE_SIZE, dtype=torch.float64).long()
    row, column = index // weight.shape[1], index % weight.shape[1]
    values = weight[row.to(weight.device), column.to(weight.device)].float().cpu()
    return [round(value, 7) for value in values.tolist()]


def body_entries(matrices: dict[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Row and column of an entry of each of up to PROBE_SIZE of the matrices.

    A base into which a LoRA was merged, or that was quantised and is not any more, has the
    embedding and the head of the original. By name: another release may cut weights otherwise.
    """
    names = list(matrices)
    entries: dict[str, tuple[int, int]] = {}
    for i in range(PROBE_SIZE if names else 0):
        name = names[i * len(names) // PROBE_SIZE]
        weight = matrices[name]
        entry = divmod(weight.numel() * (2 * i + 1) // (2 * PROBE_SIZE), weight.shape[1])
        entries.setdefault(name, entry)
    return entries


def body_value(weight: Tensor, entry: tuple[int, int]) -> float:
    return float(f"{weight[entry].item():.6g}")


def _body_probe(matrices: dict[str, Tensor]) -> dict[str, float]:
    """Of those that are not offloaded."""
    return {
        name: body_value(matrices[name], entry)
        for name, entry in body_entries(matrices).items()
        if not matrices[name].is_meta
    }


def name_without_peft(name: str) -> str:
    for wrapper in ("base_layer", "original_module", "token_adapter"):
        name = name.replace(f".{wrapper}.", ".")
    return name


def quantisation(model: Any) -> dict[str, Any] | None:
    """How a base is quantised: the settings that its weights depend on; None if it is not."""
    config = getattr(model.config, "quantization_config", None)
    if config is not None:
        settings = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        return {
            name: json.loads(json.dumps(value, default=_type_name))
            for name, value in sorted(settings.items())
            if not name.startswith("_") and name not in _WITHOUT_EFFECT
        }
    kinds = {
        type(parameter).__name__ if parameter.is_floating_point() else str(parameter.dtype)
        for name, parameter in model.named_parameters()
        if not is_adapter_name(name) and not is_ordinary(parameter)
    }
    # torch's own quantised layers keep their weights in no parameter.
    kinds |= {type(m).__name__ for m in model.modules() if hasattr(m, "_packed_params")}
    return {"weights": sorted(kinds)} if kinds else None


def _type_name(value: Any) -> str:
    return type(value).__name__  # a repr may have an address in it


# What a quantised base computes in, and how it was calibrated, not what its weights are.
_WITHOUT_EFFECT = {
    *("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "llm_int8_enable_fp32_cpu_offload"),
    *("dataset", "tokenizer", "batch_size", "model_seqlen", "backend", "exllama_config", "meta"),
    *("use_exllama", "max_input_length", "cache_block_outputs", "pad_token_id", "version"),
}


def is_ordinary(parameter: Tensor) -> bool:
    """Whether its entries are the weight's: floats of 16 bits or more, in no class of its own."""
    # A tensor split over devices is the weight that it was.
    known = type(parameter).__name__ in ("Parameter", "Tensor", "DTensor")
    return known and _is_plain(parameter)


_ADAPTER_MARKS = (".modules_to_save.", *(f".{p}" for p in PEFT_TYPE_TO_PREFIX_MAPPING.values()))


def is_adapter_name(name: str) -> bool:
    """Whether PEFT added the parameter, whatever the kind of the adapter."""
    return any(mark in name for mark in _ADAPTER_MARKS)


def check_same_base(saved: dict[str, Any], now: dict[str, Any], adapter: str, base: str) -> None:
    """ValueError for what differs between two fingerprints; keys that a folder of an earlier
    version does not have are not compared."""
    for key in ("model_type", "hidden_size", "vocab_size"):
        if saved[key] != now[key]:
            raise ValueError(
                f"the adapter {adapter} is for another base than {base}: {key} {saved[key]} at "
                f"training, {now[key]} here"
            )
    _check_same_quantisation(saved, now, adapter, base)
    # 1 % and a little: rounding to bfloat16 or float16 passes, another model does not. An entry
    # alone moves less by rounding, and a quantised weight little more.
    body, body_here = saved.get("body_probe", {}), now["body_probe"]
    both = [name for name in body if name in body_here]
    for part, then, here, relative, absolute in (
        ("embedding", saved["embedding_probe"], now["embedding_probe"], 0.01, 0.002),
        ("layer", saved["layer_probe"], now["layer_probe"], 0.01, 0.002),
        ("body", [body[n] for n in both], [body_here[n] for n in both], 0.005, 0.0),
    ):
        if len(then) != len(here) or not _near(then, here, relative, absolute):
            raise ValueError(
                f"the adapter {adapter} is for another base than {base}: same shape, other weights "
                f"({part})"
            )


def _near(then: list[float], here: list[float], relative: float, absolute: float) -> bool:
    if not then:
        return True
    one, other = torch.tensor(then), torch.tensor(here)
    bound = relative * one.abs() + absolute * one.abs().max() + 1e-6
    return bool(((one - other).abs() <= bound).all())


def _check_same_quantisation(
    saved: dict[str, Any], now: dict[str, Any], adapter: str, base: str
) -> None:
    if "quantisation" not in saved:
        return
    then, here = saved["quantisation"], now["quantisation"]
    if then is not None and here is not None:
        # Settings that only one release of transformers knows say nothing.
        both = then.keys() & here.keys()
        different = [name for name in sorted(both) if then[name] != here[name]]
        if both and not different:
            return
        then = {name: then[name] for name in different or then}
        here = {name: here[name] for name in different or here}
    if then != here:
        raise ValueError(
            f"the adapter {adapter} is for another base than {base}: quantisation "
            f"{_in_words(then)} at training, {_in_words(here)} here; load the base as it was at "
            "training (quantization_config=... where it was quantised on loading)"
        )


def _in_words(settings: dict[str, Any] | None) -> str:
    if settings is None:
        return "none"
    return ", ".join(f"{name}={value}" for name, value in settings.items() if value is not None)


def refuse_resized(base: Any) -> None:
    """ValueError if ``base`` has another vocabulary than what its name leads to.

    An adapter saved for it could not be loaded again; known before training.
    """
    name = str(base.config._name_or_path or "")
    try:
        stored = AutoConfig.from_pretrained(name, local_files_only=True).get_text_config()
    except (OSError, ValueError):
        return  # nothing to compare with
    then, now = stored.vocab_size, base.config.get_text_config().vocab_size
    if then != now:
        raise ValueError(
            f"the base has {now} tokens, {name} has {then}: an adapter saved for it would not find "
            "its base again; save the resized base (save_pretrained) and load it from there"
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
