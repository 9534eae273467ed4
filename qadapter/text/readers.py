"""Files of records: what preference pairs and prompts are read from."""

import json
from pathlib import Path
from typing import Any

FILE_SUFFIXES = (".jsonl", ".json", ".parquet")


def looks_like_path(name: str) -> bool:
    # A Hub id is "name" or "owner/name"; everything else is meant as a path.
    return (
        name.endswith(FILE_SUFFIXES)
        or name.startswith(("/", ".", "~"))
        or name.count("/") > 1
        or "\\" in name
    )


def read_json(path: Path) -> list[tuple[str, Any]]:
    """The records of a .json or .jsonl file, each with its place (for error messages)."""
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".json":
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from None
        if not isinstance(content, list):
            raise ValueError(f"{path}: expected a list of objects, found {type(content).__name__}")
        return [(f"{path}, item {i}", record) for i, record in enumerate(content)]
    records = []
    # Only "\n" ends a line: str.splitlines would also break at characters that are legal inside a
    # JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                records.append((f"{path}, line {number}", json.loads(line)))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: not valid JSON: {error.msg} at column {error.colno}"
                ) from None
    return records
