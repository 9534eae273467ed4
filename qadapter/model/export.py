"""An adapter at one strength as a plain PEFT LoRA or as full weights: for servers without a blend.

    blend       logits z_b + s (z_q - z_b)         both streams at every token
    exported    logits of the model with W + s dW  one stream

At strength 1 both are the adapter's stream. Elsewhere they agree to first order in dW, not more.
"""

import tempfile
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from qadapter import files
from qadapter.composition import RECOMMENDED
from qadapter.model import lora_files, merging
from qadapter.model.checkpoint import (
    adapter_folder,
    check_same_base,
    read_config,
    resolve_model,
)
from qadapter.model.export_card import model_card
from qadapter.model.lora_files import SavedLayer, SavedLora
from qadapter.model.saving import recommendation
from qadapter.ops import checks

LARGEST = 1e12  # scale of a LoRA; far above anything that is meant, far below what overflows


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
    sources = []
    for folder in weights:
        trained_strength(folder)  # refuses alphas that are none
        sources.append(lora_files.read(folder, "exported"))
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
    return {
        adapter_folder(folder, "adapter"): checks.number(f"adapter[{str(folder)!r}]", weight)
        for folder, weight in adapter.items()
    }


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


# What is written.


def _combined(sources: list[SavedLora], factors: list[Fraction]) -> _Lora:
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
    layers: list[SavedLayer], factors: list[Fraction], rank: int
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
    sources: list[SavedLora], rank: int, alpha: int | float, lora_bias: bool, paths: Iterable[str]
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
