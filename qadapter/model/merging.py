"""A LoRA added to the weights of its base: a whole model, each changed weight rounded once."""

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from qadapter.model import adapter_files, saving
from qadapter.model.checkpoint import quantisation, read_config, resolve_model

logger = logging.getLogger(__name__)
NAME = "exported"  # of the LoRA beside the adapter that was trained
NOTICEABLE = 0.1  # rounding, as a share of the change


def merged(
    adapter: str, lora: str | Path, base_model: str | Path | None, dtype: torch.dtype | str
) -> tuple[PreTrainedModel, Any]:
    """The base of a saved adapter with a LoRA of its kind added to its weights, and its tokenizer;
    says so where rounding takes away much of what the LoRA changes.

    Args:
        adapter: folder of a saved adapter, which knows the base.
        lora: folder of the LoRA to add.
        base_model: where the base is, if not where it was at training.
        dtype: of the base; "auto" is the checkpoint's.

    Returns:
        The model, and None where the base has no tokenizer.

    Raises:
        ValueError: a quantised base; a weight that others share; a bias that the base lacks.
    """
    source = resolve_model(base_model or read_config(adapter)["base_model"])
    if dtype == "auto":
        # Not "auto" below, which is what is fast here. float32 holds whatever an old checkpoint
        # has that does not say.
        dtype = AutoConfig.from_pretrained(source).dtype or torch.float32
    peft_model, _ = saving.load(adapter, base_model, dtype, {})
    base: Any = peft_model.get_base_model()
    refuse_quantised(quantisation(base))
    adapter_files.load(peft_model, lora, NAME, trainable=False)
    uses = Counter(id(weight) for _, weight in base.named_parameters(remove_duplicate=False))
    lost = changed = 0.0
    for path, layer in base.named_modules():
        if isinstance(layer, LoraLayer) and (
            NAME in layer.lora_B or NAME in layer.lora_embedding_B
        ):
            off, size = _add(path, layer, uses)
            lost, changed = lost + off, changed + size
    if lost > (NOTICEABLE**2) * changed:
        logger.warning(
            "merge: weights rounded to %s are off by %.0f %% of what the adapter changes them "
            "(root mean square), and the model may move less than the adapter does. The LoRA alone "
            "or a merged model in float32 keeps it",
            str(base.dtype).removeprefix("torch."),
            100 * (lost / changed) ** 0.5,
        )
    model: Any = peft_model.unload()
    return model, _tokenizer(adapter, source)


def refuse_quantised(how: Any) -> None:
    """ValueError if the base is quantised; ``how`` as `checkpoint.quantisation` says it."""
    if how is not None:
        method = how.get("quant_method") or ", ".join(how.get("weights", ["quantised"]))
        raise ValueError(
            f"merge: the base is quantised ({method}): its weights with the LoRA added would have "
            "to be quantised anew, which rounds away much of what was trained. Export the LoRA "
            "(without merge) and have the server put it on the quantised base"
        )


@torch.no_grad()
def _add(path: str, layer: LoraLayer, uses: Counter[int]) -> tuple[float, float]:
    """Returns the squares, summed over the weight, of what rounding is off, and of the change."""
    base: Any = layer.get_base_layer()
    if uses[id(base.weight)] > 1:
        raise ValueError(
            f"merge: {path} shares its weight with another layer (a head tied to the embedding), "
            "which would change too. Export the LoRA (without merge)"
        )
    delta: Any = layer.get_delta_weight  # type: ignore[attr-defined]
    change = delta(NAME)
    exact = _sum(base.weight, change)
    base.weight.copy_(exact)
    off = float((exact - base.weight).double().square().sum())
    bias = getattr(layer.lora_B[NAME], "bias", None) if NAME in layer.lora_B else None
    if bias is not None:
        if base.bias is None:
            raise ValueError(
                f"merge: lora_bias=True, and {path} of the base has no bias to add it to. Export "
                "the LoRA (without merge)"
            )
        base.bias.copy_(_sum(base.bias, bias * layer.scaling[NAME]))
    return off, float(change.double().square().sum())


def _sum(weight: Tensor, delta: Tensor) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(wide) + delta.to(wide)


def _tokenizer(adapter: str, base: str) -> Any:
    """The adapter's own, else the base's."""
    own = (Path(adapter) / "tokenizer_config.json").exists()
    try:
        return AutoTokenizer.from_pretrained(adapter if own else base)
    except (OSError, ValueError) as error:
        logger.warning("no tokenizer is written with the merged model: %s", error)
        return None
