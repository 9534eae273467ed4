"""``qadapter train --data A B --data-weights 2 1``: several data sets, each with a share.

In a file of options they may be a list, as TRL has it:

    datasets:
      - {path: pairs.jsonl, weight: 2}
      - {path: org/name, weight: 1, split: train_prefs, name: default}
"""

from collections.abc import Mapping, Sequence
from typing import Any

from qadapter.cli.sampling import head, load_pairs

_KEYS = ("path", "weight", "split", "name")


def in_file(content: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a file, ``datasets`` among them as those of the command line.

    Raises:
        ValueError: no list of mappings, a key that is missing or unknown, ``data`` beside it.
    """
    if "datasets" not in content:
        return dict(content)
    left = {name: value for name, value in content.items() if name != "datasets"}
    entries = content["datasets"]
    there = {str(name).replace("-", "_") for name in left}
    for name in sorted(there & {"data", "data_weights", "split", "data_config"}):
        raise ValueError(f"--config: datasets: has its own, so that {name} cannot be given beside")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"--config: datasets: expected a list of path and weight, got {entries!r}")
    for entry in entries:
        for key in entry:
            if key not in _KEYS:
                raise ValueError(
                    f"--config: datasets: {key!r} is not known; known are {', '.join(_KEYS)}"
                )
        for key in ("path", "weight"):
            if entry.get(key) is None:
                raise ValueError(f"--config: datasets: {entry} has no {key}")
    if len(entries) == 1:
        raise ValueError("--config: datasets: one is no mixture; give it by data")
    return left | {
        "data": [entry["path"] for entry in entries],
        "data_weights": [entry["weight"] for entry in entries],
        "split": [entry.get("split", "train") for entry in entries],
        "data_config": [entry.get("name", "") for entry in entries],
    }


def load(options: Any, weights: Sequence[float] | None) -> Any:
    """The pairs of --data as one data set; with --data-weights those of each, a list.

    Raises:
        ValueError: other numbers of weights, splits or configurations than of data sets.
    """
    count = 1 if weights is None else len(options.data)
    if weights is not None and len(weights) != count:
        raise ValueError(
            f"--data_weights: expected one for each of --data, which has {count}, "
            f"got {len(weights)}"
        )
    each = {"split": options.split, "data_config": options.data_config or [""]}
    for name, given in each.items():
        if len(given) not in (1, count):
            raise ValueError(f"--{name}: expected 1{f' or {count}' * (count > 1)}, got {given}")
    splits, configs = (given * count if len(given) == 1 else given for given in each.values())
    loaded = []
    for index, (split, config) in enumerate(zip(splits, configs, strict=True)):
        data = options.data if weights is None else [options.data[index]]
        pairs = load_pairs(data, split, config or None, options)
        loaded.append(head(pairs, options.max_examples))
    return loaded[0] if weights is None else loaded


def parts(dataset: Any) -> list[Any]:
    """A mixture's data sets, or the one that there is."""
    return dataset if isinstance(dataset, list) else [dataset]
