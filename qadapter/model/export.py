"""An adapter at one strength as a plain PEFT LoRA or as full weights: for servers without a blend.

    blend       logits z_b + s (z_q - z_b)         both streams at every token
    exported    logits of the model with W + s dW  one stream

At strength 1 both are the adapter's stream. Elsewhere they agree to first order in dW, not more.
"""

import math
import re
import tempfile
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from peft import LoraConfig
from peft.utils import load_peft_weights
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import Tensor

from qadapter import files
from qadapter.composition import RECOMMENDED
from qadapter.model import adapter_files, merging
from qadapter.model.checkpoint import (
    check_same_base,
    is_adapter_folder,
    read_config,
    resolve_model,
)
from qadapter.model.export_card import model_card
from qadapter.model.saving import recommendation
from qadapter.ops import checks

# Options of a LoraConfig with which the product B A is not all that is added to a layer, beside
# those that PEFT marks as variants, and why no alpha makes a strength of them.
_MORE_THAN_A_PRODUCT = {
    "use_dora": "DoRA scales whole rows of the weights, also those of the base, which a strength "
    "would have to scale back",
    "modules_to_save": "weights that are trained whole have no alpha",
    "trainable_token_indices": "rows of the embedding that are trained whole have no alpha",
    "target_parameters": "a LoRA on bare parameters (of experts) is not scaled here",
}
LARGEST = 1e12  # scale of a LoRA; far above anything that is meant, far below what overflows
_ONLY_IN_TRAINING = ("velora_config",)
_KEY = re.compile(
    r"base_model\.model\.(.+)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|"
    r"lora_embedding_A|lora_embedding_B)"
)


class _Layer(NamedTuple):
    """Of one layer: A [r, in, ...], B [out, r, ...], the bias of B [out], and their scale."""

    a: Tensor
    b: Tensor
    bias: Tensor | None
    embedding: bool
    scale: Fraction


class _Source(NamedTuple):
    """A saved adapter: its config, what was saved beside it, its layers by their path."""

    folder: str
    saved: dict[str, Any]
    config: LoraConfig
    layers: dict[str, _Layer]


class _Lora(NamedTuple):
    """What an exported LoRA's two files hold."""

    config: LoraConfig
    tensors: dict[str, Tensor]


def export_adapter(
    adapter: str | Path | Mapping[str, float] | Mapping[Path, float],
    output: str | Path,
    *,
    strength: float | str = 1.0,
    merge: bool = False,
    base_model: str | Path | None = None,
    dtype: torch.dtype | str = "auto",
) -> Path:
    """Write a saved adapter at one strength, for servers that know nothing of two streams.

    The layers get W + strength * (W_adapter - W): that is not the policy of `QAdapterModel` at this
    strength, which blends logits, but at strength 1 (docs/serving.md). Rank and alpha are the same
    for all layers, so that servers that know no patterns and no rsLoRA are right too.

    Args:
        adapter: folder of a saved adapter; or weights by folder, for adapters of one base whose
            changes are added up.
        output: a folder; it must be new or empty.
        strength: 0 (the base) or more, or "recommended", what training with a KL budget found.
        merge: write a whole model in the base's dtype, each weight rounded once, instead of a LoRA.
        base_model: where the base is, if not where it was at training.
        dtype: of a merged model; "auto" is the checkpoint's.

    Returns:
        ``output``.

    Raises:
        ValueError: an argument that does not fit; alphas or a center that are no strength; a LoRA
            that scaling does not scale (DoRA, modules_to_save, ...), by its option; merging into a
            quantised base, or into a head that is tied to the embedding.
        OSError: something cannot be written; ``output`` is then as it was.
    """
    weights = _checked_weights(adapter)
    target = Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"output: {target} is there and no empty folder; give a new one")
    at = _checked_strength(strength, weights)
    sources = [_read(folder) for folder in weights]
    for other in sources[1:]:
        first = sources[0]
        then, here = first.saved["base_fingerprint"], other.saved["base_fingerprint"]
        check_same_base(here, then, other.folder, f"that of {first.folder}")
    lora = _combined(sources, [Fraction(at) * Fraction(w) for w in weights.values()])
    if base_model is not None:
        lora.config.base_model_name_or_path = resolve_model(base_model)
    card = model_card(weights, at, sources[0].saved["base_model"], lora.config, merge)
    if merge:
        merging.refuse_quantised(sources[0].saved["base_fingerprint"].get("quantisation"))
        with tempfile.TemporaryDirectory() as folder:
            _write(lora, Path(folder))
            model, tokenizer = merging.merged(sources[0].folder, folder, base_model, dtype)
    with files.replacing_directory(target) as temporary:
        if merge:
            model.save_pretrained(str(temporary))
            if tokenizer is not None:
                tokenizer.save_pretrained(str(temporary))
        else:
            _write(lora, temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")
    return target


# What is asked for.


def _checked_weights(adapter: Any) -> dict[str, float]:
    if isinstance(adapter, str | Path):
        adapter = {adapter: 1.0}
    if not isinstance(adapter, Mapping) or not adapter:
        raise ValueError(f"adapter: expected a folder, or weights by folder, got {adapter!r}")
    for folder in adapter:
        if not is_adapter_folder(folder):
            raise ValueError(f"adapter: {folder} is not the folder of a saved adapter")
    return {str(f): checks.number(f"adapter[{str(f)!r}]", weight) for f, weight in adapter.items()}


def _checked_strength(strength: float | str, weights: Mapping[str, float]) -> float:
    if strength == RECOMMENDED:
        (folder, weight), *others = weights.items()
        if others or weight != 1.0:
            raise ValueError(
                f"strength: {RECOMMENDED!r} is of one adapter alone, with weight 1; got {weights!r}"
            )
        found, _ = recommendation(folder)
        if found is None:
            raise ValueError(
                f"strength: {RECOMMENDED!r}, but {folder} has no recommended strength; training "
                "with a kl_budget finds one"
            )
        strength = found
    elif isinstance(strength, str):
        raise ValueError(f"strength: expected a number or {RECOMMENDED!r}, got {strength!r}")
    number = checks.number("strength", strength)
    if number < 0:
        raise ValueError(f"strength: expected 0 (the base) or more, got {strength!r}")
    return number


def trained_strength(folder: str | Path) -> float:
    """The strength that an adapter's alphas stand for. ValueError where they stand for none."""
    saved = read_config(folder)
    alpha_0, alpha_tilde, center = (saved[n] for n in ("alpha_0", "alpha_tilde", "center"))
    if center != 1.0:
        raise ValueError(
            f"{folder}: center is {center:g}: at a strength s its policy is softmax(s z_q + "
            f"(1 - {center:g} s) z_b), which starts at no base, and no scaled LoRA is near it. "
            "Export is for center 1; this folder is itself a plain LoRA, softmax(z_q)"
        )
    if alpha_0 != alpha_tilde:
        raise ValueError(
            f"{folder}: alpha_0 is {alpha_0:g} and alpha_tilde {alpha_tilde:g}, which are no "
            "strength (alpha_0 = alpha_tilde = 1 / strength): with no adapter left the policy is "
            "not the base, which a scaled LoRA is. Sample from it with QAdapterModel.generate or "
            "qadapter generate"
        )
    return 1.0 / float(alpha_tilde)


# What was saved.


def _read(folder: str) -> _Source:
    saved = read_config(folder)
    trained_strength(folder)
    config = adapter_files.read_adapter_config(folder)
    _refuse_more(folder, config)
    lora = cast(LoraConfig, config)
    return _Source(folder, saved, lora, _layers(folder, lora))


def _refuse_more(folder: str, config: Any) -> None:
    """ValueError where scaling alpha does not scale what the adapter does, with the option."""
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{folder}: a {config.peft_type} adapter; only a LoRA can be exported")
    variants = [
        name
        for name, field in config.__dataclass_fields__.items()
        if field.metadata.get("is_lora_variant") and name not in _ONLY_IN_TRAINING
    ]
    for name in (*_MORE_THAN_A_PRODUCT, *variants):
        value = getattr(config, name, None)
        if value:
            why = _MORE_THAN_A_PRODUCT.get(name, "more than a product B A is added to a layer")
            raise ValueError(f"{folder}: {name}={value!r} cannot be exported: {why}")


def _layers(folder: str, config: LoraConfig) -> dict[str, _Layer]:
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
        layers[path] = _Layer(a, b, part.get("lora_B.bias"), embedding, scale)
    if not layers:
        raise ValueError(f"{folder}: its file has no weights")
    return layers


def _scale(config: LoraConfig, path: str, rank: int) -> Fraction:
    """What PEFT multiplies the product with; exact, but for the root."""
    pattern = config.alpha_pattern or {}
    alpha = Fraction(pattern.get(get_pattern_key(list(pattern), path), config.lora_alpha))
    return alpha / (Fraction(math.sqrt(rank)) if config.use_rslora else rank)


# What is written.


def _combined(sources: list[_Source], factors: list[Fraction]) -> _Lora:
    """The sum of the sources' changes, each times its factor: their A and B side by side."""
    paths = list(dict.fromkeys(path for source in sources for path in source.layers))
    of_path = {
        path: [
            (source.layers[path], factor * source.layers[path].scale)
            for source, factor in zip(sources, factors, strict=True)
            if path in source.layers
        ]
        for path in paths
    }
    rank = max(sum(layer.a.shape[0] for layer, _ in of_path[path]) for path in paths)
    scales = {scale for parts in of_path.values() for _, scale in parts}
    if max(map(abs, scales)) > LARGEST:
        raise ValueError(f"strength: with the weights a LoRA's scale comes to {LARGEST:g} or more")
    # One scale for all is alpha's, and no weight is touched. Else it is 1, and that is B's. So it
    # is for 0: llama.cpp takes an alpha of 0 for none, which is a scale of 1.
    common = scales.pop() if len(scales) == 1 else Fraction(1)
    if common == 0:
        common = Fraction(1)
    with_bias = any(layer.bias is not None for parts in of_path.values() for layer, _ in parts)
    tensors = {}
    for path, parts in of_path.items():
        layers, scaled = [layer for layer, _ in parts], [scale / common for _, scale in parts]
        a, b = _side_by_side(layers, scaled, rank)
        embedding = layers[0].embedding
        names = ("embedding_A", "embedding_B") if embedding else ("A.weight", "B.weight")
        for name, tensor in zip(names, (a, b), strict=True):
            tensors[f"base_model.model.{path}.lora_{name}"] = tensor.contiguous()
        if with_bias and not embedding:
            biases = [
                _times(layer.bias, factor)
                for layer, factor in zip(layers, scaled, strict=True)
                if layer.bias is not None
            ]
            total = sum(biases, b.new_zeros(b.shape[0]))
            tensors[f"base_model.model.{path}.lora_B.bias"] = total
    return _Lora(_config(sources, rank, _plain(common * rank), with_bias, paths), tensors)


def _side_by_side(
    layers: list[_Layer], factors: list[Fraction], rank: int
) -> tuple[Tensor, Tensor]:
    """A and B of the sum of factor * B A, with zeros up to ``rank``."""
    a = torch.cat([layer.a for layer in layers])
    b = torch.cat([_times(layer.b, f) for layer, f in zip(layers, factors, strict=True)], 1)
    wider = rank - a.shape[0]
    if wider:
        a = torch.cat((a, a.new_zeros(wider, *a.shape[1:])))
        b = torch.cat((b, b.new_zeros(b.shape[0], wider, *b.shape[2:])), 1)
    return a, b


def _times(weight: Tensor, factor: Fraction) -> Tensor:
    """In float32 where it must be rounded; the tensor itself where the factor is 1."""
    if factor == 1:
        return weight
    return (weight.double() * float(factor)).to(torch.promote_types(weight.dtype, torch.float32))


def _plain(number: Fraction) -> int | float:
    return int(number) if number.denominator == 1 else float(number)


def _config(
    sources: list[_Source], rank: int, alpha: int | float, lora_bias: bool, paths: Iterable[str]
) -> LoraConfig:
    names = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    where = [{name: getattr(source.config, name) for name in names} for source in sources]
    if any(other != where[0] for other in where[1:]):
        where[0] = {"target_modules": list(paths)}
    first = sources[0].config
    return LoraConfig(
        r=rank,
        lora_alpha=cast(int, alpha),  # a float by its meaning
        lora_bias=lora_bias,
        fan_in_fan_out=first.fan_in_fan_out,
        task_type=first.task_type,
        base_model_name_or_path=first.base_model_name_or_path,
        revision=first.revision,
        inference_mode=True,
        **where[0],
    )


def _write(lora: _Lora, folder: Path) -> None:
    lora.config.save_pretrained(str(folder))
    save_file(lora.tensors, folder / "adapter_model.safetensors", {"format": "pt"})
