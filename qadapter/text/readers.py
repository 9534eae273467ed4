"""Files of records: what preference pairs and prompts are read from."""

import bz2
import csv
import glob
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from qadapter.text.bad_rows import BadRows, RowError
from qadapter.text.messages import checked_text

TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
TABLE_SUFFIXES = (".parquet", ".arrow")
FILE_SUFFIXES = (*TEXT_SUFFIXES, *TABLE_SUFFIXES)
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")

Records = Iterator[tuple[str, Any]]
"""Each record with its place, for error messages."""

# The only way of such a half into a file that is UTF-8.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def looks_like_path(name: str) -> bool:
    # A Hub id is "name" or "owner/name"; everything else is meant as a path.
    return (
        name.lower().endswith((*FILE_SUFFIXES, *COMPRESSED))
        or name.startswith(("/", ".", "~"))
        or name.count("/") > 1
        or "\\" in name
    )


def kind_of(path: Path, suffixes: Sequence[str] = FILE_SUFFIXES) -> str:
    """The suffix that says how to read a file. ValueError if none of ``suffixes``."""
    inner = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    kind = inner.suffix.lower()
    if kind not in suffixes or (inner is not path and kind in TABLE_SUFFIXES):
        raise ValueError(
            f"{path}: unknown kind of file; known are {', '.join(suffixes)}, "
            f"and those that are text compressed as {', '.join(COMPRESSED)}"
        )
    return kind


def as_list(given: Any) -> list[str | Path]:
    """One name, or several."""
    if isinstance(given, str | Path):
        return [given]
    several = list(given) if isinstance(given, Iterable) else [given]
    for one in several:
        if not isinstance(one, str | Path):
            what = "expected a file, a folder, a name on the Hub, or a list of files"
            raise TypeError(f"{what}, got {one!r:.80}")
    return several


def find_files(names: Sequence[str | Path]) -> list[Path] | None:
    """The files that names and globs stand for; None for one name that must be a folder or
    something on the Hub.

    Raises:
        FileNotFoundError: a name looks like a path, and there is nothing there.
        ValueError: no names, or one that is no file among several.
    """
    files: list[Path] = []
    for name in names:
        found = _matching(name)
        if found is None and len(names) == 1:
            return None
        if found is None:
            raise ValueError(f"{name}: among several, each must be a file or a glob")
        files += found
    if not files:
        raise ValueError("no files: the list is empty")
    return files


def _matching(name: str | Path) -> list[Path] | None:
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return None
    if glob.has_magic(str(name)):
        found = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        if files := [match for match in found if match.is_file()]:
            return files
        raise FileNotFoundError(f"no file matches {name}")
    if isinstance(name, Path) or looks_like_path(name):
        raise FileNotFoundError(f"no such file: {name}")
    return None


def read_records(path: Path, kind: str, bad: BadRows | None = None) -> Records:
    """The records of a file that is text, possibly compressed.

    Raises:
        ValueError: not UTF-8, not JSON, a line of a table with too few or too many cells; with file
            and line. What is wrong with one line only goes to ``bad``.
    """
    bad = bad or BadRows()
    data = _content(path)
    if kind in (".csv", ".tsv"):
        return _read_table(decoded(data, str(path)), path, "," if kind == ".csv" else "\t", bad)
    if kind == ".json" and not _is_lines(data):
        return _read_list(decoded(data, str(path)), path)
    return _read_lines(data, path, bad)


def read_text(path: Path) -> str:
    """The whole of a text file, possibly compressed; errors as `read_records`."""
    return decoded(_content(path), str(path))


def _content(path: Path) -> bytes:
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    suffix = path.suffix.lower()
    try:
        if suffix == ".zst":
            import pyarrow

            with pyarrow.input_stream(str(path), compression="zstd") as stream:
                return bytes(stream.read())
        if suffix in openers:
            with openers[suffix](path) as stream:
                return bytes(stream.read())
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{path}: cannot be decompressed: {error}") from error
    return path.read_bytes()


def decoded(data: bytes, name: str, line: int | None = None) -> str:
    """The text, UTF-8. ValueError that names file, line and what to do; RowError of a ``line``."""
    if line is None:
        _refuse_utf16(data, name)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = line or data.count(b"\n", 0, error.start) + 1
        byte = f"0x{data[error.start]:02x}"
    text = (
        f"not UTF-8: byte {byte}. If it is Latin-1 (or Windows-1252): "
        "iconv -f LATIN1 (or -f CP1252) -t UTF-8 OLD > NEW"
    )
    raise RowError(f"{name}, line {number}", text, "not UTF-8")


def _refuse_utf16(data: bytes, name: str) -> None:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:1000]:
        raise ValueError(
            f"{name}, line 1: not UTF-8, but UTF-16 by its first bytes: "
            "iconv -f UTF-16 -t UTF-8 OLD > NEW"
        )


def _is_lines(data: bytes) -> bool:
    """Whether a .json file is JSON lines, as many are: its first line is an object by itself."""
    first, _, rest = data.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")
    try:
        return bool(rest.strip()) and isinstance(json.loads(first), dict)
    except ValueError:
        return False


def _read_lines(data: bytes, path: Path, bad: BadRows) -> Records:
    _refuse_utf16(data, str(path))
    # Only "\n" ends a line: splitlines would also break at characters that are legal inside a JSON
    # string.
    for number, line in enumerate(data.split(b"\n"), start=1):
        place = f"{path}, line {number}"
        try:
            text = decoded(line, str(path), number)
            if text.strip():
                yield place, _loaded(text, place)
        except RowError as error:
            bad.add(error)


def _loaded(text: str, place: str) -> Any:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise RowError(
            place, f"not valid JSON: {error.msg} at column {error.colno}", "not valid JSON"
        ) from None
    if _SURROGATE.search(text):
        checked_text(json.dumps(record, ensure_ascii=False), place, "the row")
    return record


def _read_list(text: str, path: Path) -> Records:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(content, list):
        raise ValueError(f"{path}: expected a list of objects, found {type(content).__name__}")
    return iter([(f"{path}, item {i}", record) for i, record in enumerate(content)])


def _read_table(text: str, path: Path, delimiter: str, bad: BadRows) -> Records:
    """Cells are text. Python's reader knows the line of a row; pandas takes "None" for missing."""
    csv.field_size_limit(2**31 - 1)  # a cell may hold a conversation
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    line = 0
    while True:
        place = f"{path}, line {line + 1}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise ValueError(f"{place}: not a table: {error}") from None
        line = rows.line_num
        if row is None:
            return
        if names is None:
            names = row
            if len(set(names)) < len(names):
                raise ValueError(f"{place}: a column is there twice: {', '.join(names)}")
        elif len(row) == len(names):
            yield place, dict(zip(names, row, strict=True))
        elif row:
            text = f"expected {len(names)} cells, as in the first line, found {len(row)}"
            bad.add(RowError(place, text, "too few or too many cells"))
