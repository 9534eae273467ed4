"""Settings of a method against each other: every combination, a run each, scored, not answered.

    python -m benchmarks.quality sweep --set quick --method qadapter \\
        --vary reg_coef=0,0.05,0.2 --vary bt_scale=0.05,0.1,0.3 --seeds 0 1
    python -m benchmarks.quality sweep --file list.json        # [{"reg_coef": 0.2}, ...]

What is compared is the frontier of a setting, not its one trained point: each is scored at several
strengths, and its gain and accuracy are read off at the same forgetting.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.bench import grid
from benchmarks.quality import matched
from benchmarks.quality.settings import Run
from qadapter import files


def combinations(vary: Sequence[str]) -> list[dict[str, Any]]:
    """NAME=VALUE,VALUE,... -> every choice of one value each."""
    axes = {}
    for text in vary:
        name, found, values = text.partition("=")
        if not found or not name or not all(values.split(",")):
            raise ValueError(f"--vary: expected NAME=VALUE,VALUE,..., got {text!r}")
        axes[name] = [value_of(value) for value in values.split(",")]
    return grid(**axes)


def value_of(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def from_file(path: str) -> list[dict[str, Any]]:
    found = files.read_json(path)
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise ValueError(f"{path}: expected a list of objects, one a setting")
    return found


def runs(method: str, settings: list[dict[str, Any]], seeds: Sequence[int]) -> list[Run]:
    """The usual settings first, then each of the list; all of a seed before the next."""
    variants = dict.fromkeys(tuple(sorted(item.items())) for item in ({}, *settings))
    return [Run(method, seed, 0.0, changes) for seed in seeds for changes in variants]


def at_kl(rows: list[dict[str, Any]], kl: float, figure: str) -> float | None:
    """A variant's figure at some KL, between its strengths; None where it does not reach it."""
    kls, values = (np.array([row["figures"][n][0] for row in rows]) for n in ("kl", figure))
    if kls.max() < kl:
        return None
    return float(matched.read_off(kl, kls, values, None if figure == "accuracy" else 0.0))


def middle(kls: Sequence[float]) -> float:
    return kls[len(kls) // 2]


def compared(rows: list[dict[str, Any]], kls: Sequence[float]) -> list[dict[str, Any]]:
    """A row a variant, the best gain at the middle KL first: figures as trained and at each KL."""
    variants: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if not row["label"].startswith("step"):
            variants.setdefault(row["variant"], []).append(row)
    made = []
    for own in variants.values():
        trained = next(row for row in own if row["label"] == "trained")
        changes = ", ".join(f"{name} {value}" for name, value in trained["changes"].items())
        at = {f"{name} at {kl:g}": at_kl(own, kl, name) for kl in kls for name in matched.FIGURES}
        made.append({"name": changes or "as usual", "seeds": len(trained["seeds"])})
        made[-1] |= {**trained["figures"], **at}

    def rank(row: dict[str, Any]) -> float:
        gain = row[f"gain at {middle(kls):g}"]
        return float("-inf") if gain is None else gain

    return sorted(made, key=rank, reverse=True)
