"""The unfinished output of ``qadapter generate``: JSON lines, a header with the settings first."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO


def json_line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, default=str) + "\n"


def adapter_hash(folder: Path) -> str:
    """What an adapter is, wherever it lies."""
    digest = hashlib.sha256()
    for name in ("adapter_model.safetensors", "adapter_config.json", "qadapter_config.json"):
        if (folder / name).is_file():
            digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def check_same(then: dict[str, Any], now: dict[str, Any], partial: Path, source: str) -> None:
    """ValueError that names what changed since; ``source`` is where the prompts are from."""
    changed = []
    for name, value in now.items():
        if then.get(name) == value or (name == "seed" and value is None):
            continue
        if name == "input":
            changed.append(f"the prompts of {source}")
        elif name == "adapter":
            changed.append("the adapters or their weights")
        else:
            changed.append(f"--{name.replace('_', '-')} ({then.get(name)!r} then, {value!r} now)")
    if changed:
        raise ValueError(
            f"--resume: {partial} was made with other settings; changed: {', '.join(changed)}. "
            "Delete it to start over"
        )


@contextlib.contextmanager
def appending(partial: Path, header: dict[str, Any]) -> Iterator[TextIO]:
    """The partial file, open at its end; a new one begins with the header."""
    with partial.open("a", encoding="utf-8", newline="\n") as file:
        if os.fstat(file.fileno()).st_size == 0:
            file.write(json_line(header))
            file.flush()
        yield file


def read_partial(partial: Path) -> tuple[dict[str, Any] | None, dict[int, dict[str, Any]]]:
    """Header and answers. A last line that was cut short is cut off, in the file too."""
    content = partial.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with partial.open("r+b") as file:
            file.truncate(len(whole))
    lines = whole.decode("utf-8").split("\n")[:-1]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
            needed = ("settings", "seed") if number == 1 else ("number", "answer")
            if not all(name in records[-1] for name in needed):
                raise ValueError(f"expected {' and '.join(needed)}")
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{partial}, line {number}: damaged ({error}); delete the line, or the file to "
                "start over"
            ) from None
    made = {record["number"]: record["answer"] for record in records[1:]}
    return (records[0] if records else None), made
