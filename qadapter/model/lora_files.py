"""A saved LoRA as tensors by layer, for those who add it to layers that are not PEFT's."""

import math
import re
from fractions import Fraction
from typing import Any, NamedTuple

from peft import LoraConfig
from peft.utils import load_peft_weights
from peft.utils.other import get_pattern_key
from torch import Tensor

from qadapter.model import adapter_files
from qadapter.model.checkpoint import read_config

# Options of a LoraConfig with which the product B A is not all that is added to a layer, beside
# those that PEFT marks as variants.
_MORE_THAN_A_PRODUCT = {
    "use_dora": "DoRA scales whole rows of the weights, those of the base too",
    "modules_to_save": "weights that are trained whole are no product",
    "trainable_token_indices": "rows of the embedding that are trained whole are no product",
    "target_parameters": "a LoRA on bare parameters (of experts) is on no layer",
}
_ONLY_IN_TRAINING = ("velora_config",)
_KEY = re.compile(
    r"base_model\.model\.(.+)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|"
    r"lora_embedding_A|lora_embedding_B)"
)


class SavedLayer(NamedTuple):
    """Of one layer: A [r, in, ...], B [out, r, ...], the bias of B [out], and their scale."""

    a: Tensor
    b: Tensor
    bias: Tensor | None
    embedding: bool
    scale: Fraction


class SavedLora(NamedTuple):
    """A saved adapter: its config, what was saved beside it, its layers by their path."""

    folder: str
    saved: dict[str, Any]
    config: LoraConfig
    layers: dict[str, SavedLayer]


def read(folder: str, purpose: str) -> SavedLora:
    """Read a saved adapter whose layers get W x + scale * B A x and nothing else.

    Args:
        folder: of the adapter.
        purpose: what it cannot be if it is another: "exported" ...

    Raises:
        ValueError: an adapter that is no such LoRA, by its option; an incomplete file.
    """
    saved = read_config(folder)
    config = adapter_files.read_adapter_config(folder)
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{folder}: a {config.peft_type} adapter; only a LoRA can be {purpose}")
    variants = [
        name
        for name, field in config.__dataclass_fields__.items()
        if field.metadata.get("is_lora_variant") and name not in _ONLY_IN_TRAINING
    ]
    for name in (*_MORE_THAN_A_PRODUCT, *variants):
        value = getattr(config, name, None)
        if value:
            why = _MORE_THAN_A_PRODUCT.get(name, "more than a product B A is added to a layer")
            raise ValueError(f"{folder}: {name}={value!r} cannot be {purpose}: {why}")
    return SavedLora(folder, saved, config, _layers(folder, config))


def _layers(folder: str, config: LoraConfig) -> dict[str, SavedLayer]:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_peft_weights(folder, device="cpu").items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{folder}: {key} in its file is no weight of a LoRA")
        parts.setdefault(match[1], {})[match[2]] = tensor
    layers = {}
    for path, part in parts.items():
        embedding = "lora_embedding_A" in part
        names = (
            ("lora_embedding_A", "lora_embedding_B")
            if embedding
            else ("lora_A.weight", "lora_B.weight")
        )
        if not part.keys() >= set(names):
            raise ValueError(f"{folder}: A or B of {path} is missing in its file: incomplete copy?")
        a, b = (part[name] for name in names)
        scale = _scale(config, path, a.shape[0])
        layers[path] = SavedLayer(a, b, part.get("lora_B.bias"), embedding, scale)
    if not layers:
        raise ValueError(f"{folder}: its file has no weights")
    return layers


def _scale(config: LoraConfig, path: str, rank: int) -> Fraction:
    """What PEFT multiplies the product with; exact, but for the root."""
    pattern = config.alpha_pattern or {}
    alpha = Fraction(pattern.get(get_pattern_key(list(pattern), path), config.lora_alpha))
    return alpha / (Fraction(math.sqrt(rank)) if config.use_rslora else rank)
