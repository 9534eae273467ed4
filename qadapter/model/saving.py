"""A saved adapter: written, read back with its base, attached to a model that is there."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import Tensor

from qadapter import files
from qadapter.composition import Composition
from qadapter.model import adapter_files, quantised, sharded
from qadapter.model.checkpoint import (
    CONFIG_NAME,
    adapter_folder,
    base_alias,
    check_same_base,
    fingerprint,
    model_card,
    read_config,
    refuse_resized,
    resolve_model,
)
from qadapter.model.probe import BaseProbe
from qadapter.model.wrapping import load_base
from qadapter.ops import checks
from qadapter.version import __version__


def save(
    peft_model: PeftModel,
    composition: dict[str, float],
    base_fingerprint: dict[str, Any],
    directory: str | Path,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """See `QAdapterModel.save_pretrained`; ``composition`` has the alphas, center and gamma."""
    base: Any = peft_model.get_base_model()
    config = {
        "qadapter_version": __version__,
        **composition,
        "base_model": base_alias(str(base.config._name_or_path or "")),
        "base_fingerprint": base_fingerprint,
    }
    name = str(peft_model.active_adapter)
    weights: dict[str, Any] = {} if state_dict is None else {"state_dict": state_dict}
    with files.replacing_directory(directory) as temporary:
        peft_model.save_pretrained(
            str(temporary),
            safe_serialization=True,
            selected_adapters=[name],
            save_embedding_layers=False,  # the base's, which no adapter changes
            **weights,
        )
        # PEFT puts an adapter with a name of its own into a folder of that name.
        if not (temporary / "adapter_config.json").exists():
            for file in (temporary / name).iterdir():
                file.rename(temporary / file.name)
            (temporary / name).rmdir()
        files.write_json(temporary / CONFIG_NAME, config)
        (temporary / "README.md").write_text(model_card(config), encoding="utf-8")


def load(
    source: str, base_model: str | Path | None, dtype: torch.dtype | str, kwargs: dict[str, Any]
) -> tuple[PeftModel, dict[str, float]]:
    """A saved adapter on its base, and the composition that it was saved with."""
    saved = read_config(source)
    adapter = adapter_files.read_adapter_config(source)
    base_source = resolve_model(base_model if base_model is not None else saved["base_model"])
    if "quantization_config" not in kwargs:
        then = saved["base_fingerprint"]
        made = quantised.as_at_training(then, base_source, dtype, **kwargs)
        dtype = made.pop("dtype", dtype)
        kwargs = {**kwargs, **made}
    base = load_base(base_source, dtype, kwargs)
    sharded.refuse_partitioned(base)
    check_same_base(saved["base_fingerprint"], fingerprint(base), source, base_source)
    adapter_files.check_base_weights(base, source, adapter)
    probe = BaseProbe(base)
    peft_model = PeftModel.from_pretrained(base, source, is_trainable=True)
    # Again: this one says what did not fit.
    adapter_files.load(peft_model, source, str(peft_model.active_adapter), trainable=True)
    probe.check(base, f"the adapter {source}")
    return peft_model, {name: saved[name] for name in ("alpha_0", "alpha_tilde", "center", "gamma")}


def recommendation(source: str | Path) -> tuple[float | None, float | None]:
    """The recommended strength that an adapter was saved with and the budget it keeps, or None."""
    saved = read_config(source)
    return saved.get("recommended_strength"), saved.get("kl_budget")


def load_weights(model: Any, directory: str | Path) -> None:
    """See `QAdapterModel.load_adapter_weights`; ``model`` is one."""
    _saved_for(model.base_fingerprint, directory)
    peft_model: PeftModel = model.peft_model
    name = str(peft_model.active_adapter)
    adapter_files.check_same_adapter(peft_model, name, directory)
    if sharded.is_sharded(model):
        saved = load_peft_weights(str(directory), device="cpu")
        sharded.load_adapter(model, saved, str(directory))
        return
    config = peft_model.peft_config[name]
    adapter_files.check_base_weights(peft_model.get_base_model(), directory, config)
    own = get_peft_model_state_dict(peft_model, adapter_name=name, save_embedding_layers=False)
    before = {key: value.clone() for key, value in own.items()}
    try:
        adapter_files.load(peft_model, directory, name, trainable=True)
    except Exception:
        set_peft_model_state_dict(peft_model, before, name)
        raise


def attach(
    peft_model: PeftModel, base_fingerprint: dict[str, Any], directory: str | Path, name: str
) -> Composition:
    """See `QAdapterModel.load_adapter`; returns how the adapter is composed."""
    directory = adapter_folder(directory, "directory")
    if not name or "." in name:
        raise ValueError(f"name: expected a name without dots, got {name!r}")
    if name in peft_model.peft_config:
        raise ValueError(f"name: there is an adapter {name!r} already")
    for path, _ in peft_model.get_base_model().named_parameters():
        if f".{name}" in f".{path}":  # PEFT cuts the name out of its keys wherever it stands
            raise ValueError(f"name: {name!r} is in the path of {path}: give it another")
    if sharded.is_sharded(peft_model):
        raise ValueError(f"{directory}: attach it before an engine shards the model")
    saved = _saved_for(base_fingerprint, directory)
    alphas = checks.composition(saved["alpha_0"], saved["alpha_tilde"], saved["center"])
    base = peft_model.get_base_model()
    adapter = adapter_files.read_adapter_config(directory)
    adapter_files.check_base_weights(base, directory, adapter)
    probe = BaseProbe(base)
    try:
        adapter_files.load(peft_model, directory, name, trainable=False)
        probe.check(base, f"the adapter {directory}")
    except Exception:
        if name in peft_model.peft_config:
            peft_model.delete_adapter(name)
        raise
    return Composition(*alphas)


def _saved_for(here: dict[str, Any], directory: str | Path) -> dict[str, Any]:
    """The config of an adapter that was saved for the base of this fingerprint."""
    saved = read_config(directory)
    check_same_base(saved["base_fingerprint"], here, str(directory), "this model")
    return saved


def check_comes_back(peft_model: PeftModel) -> None:
    """ValueError where what `save` would write could not be loaded again; nothing is written."""
    name = str(peft_model.active_adapter)
    if name in ("weight", "bias"):
        # PEFT takes the adapter's name off the end of a key, and there it is the parameter's own.
        raise ValueError(f"the adapter is named {name!r}, like a parameter: give it another name")
    try:
        with tempfile.TemporaryDirectory() as folder:
            peft_model.peft_config[name].save_pretrained(folder)
    except TypeError as error:
        raise ValueError(f"the adapter's config cannot be written as JSON: {error}") from error
    saved = get_peft_model_state_dict(peft_model, adapter_name=name, save_embedding_layers=False)
    pointers = {tensor.data_ptr() for tensor in saved.values()}
    lost = [
        name
        for name, parameter in peft_model.named_parameters()
        if parameter.requires_grad and parameter.data_ptr() not in pointers
    ]
    if lost:
        raise ValueError(
            f"{len(lost)} trained weights would not be saved with the adapter ({lost[0]}, ...)"
        )
    refuse_resized(peft_model.get_base_model())
