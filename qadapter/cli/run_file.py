"""``qadapter train --config run.yaml``: options from a file, under their names on the command line.

    model: meta-llama/Llama-3.1-8B
    data: [pairs.jsonl]
    output: adapter
    learning_rate: 1e-4
    env: {WANDB_PROJECT: adapters}

The command line wins. ``env`` is set in the environment before anything is loaded.
"""

import difflib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml


def take(arguments: Sequence[str], *names: str) -> tuple[str | None, list[str]]:
    """The value of an option, the last one given, and the arguments without it.

    Args:
        names: of the option, each with its dashes.
    """
    value, left, rest = None, [], list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, given = argument.partition("=")
        if name not in names:
            left.append(argument)
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ValueError(f"{name}: expected a value")
            given = rest.pop(0)
        value = given
    return value, left


def read(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """What the file of ``--config`` has, but for ``env``, which is set; and the other arguments.

    Raises:
        ValueError: a file that is no mapping.
        OSError: a file that cannot be read.
    """
    path, left = take(arguments, "--config")
    if path is None:
        return {}, left
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"--config: {path} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ValueError(f"--config: {path}: expected options by name, got {kind}")
    environment = content.pop("env", None) or {}
    if not isinstance(environment, dict):
        raise ValueError(f"--config: env: expected names and values, got {environment!r}")
    os.environ.update({str(name): str(value) for name, value in environment.items()})
    return content, left


def as_arguments(content: Mapping[str, Any], known: Iterable[str]) -> list[str]:
    """As on a command line. ValueError for a name that is not ``known``, with what may be meant."""
    names, made = set(known) - {"config"}, []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            meant = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"--config: there is no option {key}{meant}")
        made += _as_arguments(name, value)
    return made


def _as_arguments(name: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    if isinstance(value, dict):
        value = json.dumps(value)
    return [f"--{name}={str(value).lower() if isinstance(value, bool) else value}"]
