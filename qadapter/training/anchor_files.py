"""Files of anchor texts: JSON lines to which every batch is appended when it is made."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SETTINGS = ("source", "seed", "max_new_tokens", "max_prompt_tokens", "dtype")


def read_anchors(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a file that `make_anchors` wrote, none if there is no file. A last line that was cut
    short is cut off, in the file too. ValueError for a line that is no such row."""
    path = Path(path)
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from None
        needed = ("draw", "base", *SETTINGS)
        missing = [name for name in needed if not isinstance(row, dict) or name not in row]
        if missing or not ("messages" in row or "text" in row):
            raise ValueError(
                f"{path}, line {number}: no anchor made by qadapter: without "
                f"{', '.join(missing) or 'messages or text'}"
            )
        rows.append(row)
    draws = [row["draw"] for row in rows]
    if draws != sorted(set(draws)):
        raise ValueError(f"{path}: rows twice or out of order, by their numbers of draws")
    # Only now: a file that is something else is left alone.
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return rows


def check_same(row: dict[str, Any], settings: dict[str, Any], place: str) -> None:
    """ValueError that names what is other in a row than in ``settings``."""
    then, now = row["base"], settings["base"]
    if then != now:
        for name in ("model_type", "hidden_size", "vocab_size", "quantisation"):
            if then.get(name) != now[name]:
                raise ValueError(
                    f"{place}: made by another base: {name} {then.get(name)!r} there, "
                    f"{now[name]!r} here"
                )
        if row["dtype"] == settings["dtype"]:
            raise ValueError(f"{place}: made by another base: same shape, other weights")
    changed = [
        f"{name} ({row[name]!r} there, {settings[name]!r} now)"
        for name in SETTINGS
        if row[name] != settings[name]
    ]
    if changed:
        raise ValueError(
            f"{place}: made with other settings: {', '.join(changed)}; take those, "
            "delete the file, or take another"
        )


def append(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with Path(path).open("a", encoding="utf-8", newline="\n") as file:
        file.write(lines)
