"""What a server serves: adapters, their weights, the strength of requests that name none.

These travel from the command line into vLLM's processes as a part of the model's config
(``hf_overrides``), where `qadapter.integrations.vllm` finds them. vLLM imports this file in every
environment that has qadapter, also for other models: what takes seconds to import waits.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qadapter.composition import RECOMMENDED, Names, blend
from qadapter.ops import checks

ARCHITECTURES = (
    *("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"),
    *("Gemma2ForCausalLM", "Gemma3ForCausalLM"),
)
"""Of the bases that vLLM serves with streams, as their configs call them."""

LARGEST = 1e3
"""A strength above it is refused: hidden states times it leave what float16 holds."""


class Settings(NamedTuple):
    """Adapters by name, the base's stream before them.

    Attributes:
        folders: of the adapters.
        weights: of their residual Q-functions in the blend.
        strength: of requests that name none; None is the policy as trained.
        trained: alpha_0, alpha_tilde and center of each.
    """

    folders: dict[str, str]
    weights: dict[str, float]
    strength: float | None
    trained: dict[str, tuple[float, float, float]]

    @property
    def names(self) -> Names:
        return (None, *self.folders)

    def stream_weights(self, strength: float | None) -> list[float]:
        """What the logits of each stream count in a policy."""
        at = self.strength if strength is None else strength
        kept, weights = blend(self.trained, 1, strength=at, adapters=self.weights)
        of_name = dict(zip(kept, weights[:, 0].tolist(), strict=True))
        return [of_name.get(name, 0.0) for name in self.names]

    def overrides(self) -> dict[str, Any]:
        """What the model's config gets, as JSON has it; `from_config` reads it."""
        return {"adapters": self.folders, "weights": self.weights, "strength": self.strength}

    @staticmethod
    def from_config(config: Any) -> "Settings | None":
        """Of a model's config; None where it is another model's."""
        given = getattr(config, "qadapter", None)
        if given is None:
            return None
        return settings(given["adapters"], given["weights"], given["strength"])


def settings(
    folders: Mapping[str, str | Path],
    weights: Mapping[str, float] | None = None,
    strength: float | str | None = None,
) -> Settings:
    """Checked settings.

    Args:
        folders: of saved adapters, by name.
        weights: by name, 1 where none is given.
        strength: of requests that name none: a number, or "recommended". None is the recommended
            one where there is one adapter with weight 1 that has one, else the policy as trained.

    Raises:
        ValueError: what does not fit, named.
    """
    from qadapter.model.checkpoint import adapter_folder, read_config
    from qadapter.model.saving import recommendation

    if not folders:
        raise ValueError("adapter: expected at least one")
    there = {name: adapter_folder(folder, "adapter") for name, folder in folders.items()}
    own = {name: str(Path(folder).resolve()) for name, folder in there.items()}
    given = {name: 1.0 if weights is None else weights.get(name, 1.0) for name in own}
    saved = {name: read_config(folder) for name, folder in own.items()}
    trained = {
        name: checks.composition(config["alpha_0"], config["alpha_tilde"], config["center"])
        for name, config in saved.items()
    }
    if strength in (None, RECOMMENDED):
        found = None
        if list(given.values()) == [1.0]:
            found, _ = recommendation(next(iter(own.values())))
        if found is None and strength is not None:
            raise ValueError(
                f"strength: {RECOMMENDED!r} is of one adapter alone, with weight 1, that was "
                f"trained with a KL budget; got {given!r}"
            )
        strength = found
    made = Settings(own, given, None if strength is None else checked_strength(strength), trained)
    made.stream_weights(None)  # refuses what needs a strength and has none
    return made


def checked_strength(value: Any) -> float:
    """ValueError for what is no strength. Text is none either, also that of a number."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not 0 <= value <= LARGEST:
        raise ValueError(
            f"strength: expected a number from 0 (the base) to {LARGEST:g}, got {value!r}"
        )
    return float(value)


def served_architecture(base: str) -> str:
    """The name that vLLM knows the model with streams by. ValueError where there is none."""
    if base not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(
            f"{base} is not served with a strength per request, these are: {known}. One strength "
            "can be exported for any server: qadapter export --strength S"
        )
    return f"QAdapter{base}"


def engine_arguments(
    adapter: str | Path | Mapping[str, str | Path],
    *,
    weights: Mapping[str, float] | None = None,
    strength: float | str | None = None,
    base_model: str | Path | None = None,
) -> dict[str, Any]:
    """Keywords with which ``vllm.LLM`` serves adapters and their base.

        llm = vllm.LLM(**engine_arguments("out"), max_model_len=2048)
        params = vllm.SamplingParams(temperature=0, extra_args={"strength": 0.5})

    Args:
        adapter: folder of a saved adapter, or folders by name.
        weights: of several adapters in the blend, by name; 1 where none is given.
        strength: of requests that name none, see `settings`.
        base_model: where the base is, if not where it was at training.

    Returns:
        ``model``, ``tokenizer`` and ``hf_overrides``.

    Raises:
        ValueError: what does not fit, or a base that is not served.
    """
    from transformers import AutoConfig

    from qadapter.model.checkpoint import read_config, resolve_model

    folders = adapter if isinstance(adapter, Mapping) else {"default": adapter}
    made = settings(folders, weights, strength)
    first = next(iter(made.folders.values()))
    source = resolve_model(base_model or read_config(first)["base_model"])
    (architecture, *_) = AutoConfig.from_pretrained(source).architectures or ["no architecture"]
    own = (Path(first) / "tokenizer_config.json").exists()
    return {
        "model": source,
        "tokenizer": first if own else source,
        "hf_overrides": {
            "architectures": [served_architecture(architecture)],
            "qadapter": made.overrides(),
        },
    }
