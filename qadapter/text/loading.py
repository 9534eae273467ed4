"""From files, folders and the Hub to preference pairs."""

from __future__ import annotations

import bisect
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qadapter.text import readers
from qadapter.text.bad_rows import BadRows, RowError
from qadapter.text.forms import (
    COLUMNS,
    FLAG_COLUMNS,
    OPENAI,
    PROMPTS,
    TOKEN_COLUMNS,
    MissingColumnsError,
    check_columns,
    described,
    pair,
)

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

READ = (*COLUMNS, *TOKEN_COLUMNS, *FLAG_COLUMNS)

Source = str | Path | Sequence[str | Path]


def load_preference_data(
    path_or_id: Source,
    split: str = "train",
    *,
    config: str | None = None,
    columns: Mapping[str, str] | None = None,
    skip_bad_rows: bool = False,
) -> Dataset:
    """Load preference pairs from files, a folder or the Hugging Face Hub.

    Args:
        path_or_id: a file: JSON lines (``.jsonl``, ``.ndjson``, ``.json``), ``.json`` (a list of
            objects), ``.csv``, ``.tsv``, all of them also as ``.gz``, ``.bz2``, ``.xz`` or
            ``.zst``, ``.parquet``, ``.arrow``; a glob; a list of files and globs; the folder of a
            ``save_to_disk``; or what ``datasets.load_dataset`` takes (a Hub id, a folder). The rows
            need the columns ``chosen`` and ``rejected``, or those of another form that
            `qadapter.text.forms` knows; ``prompt``, ``tools`` and ``chat_template_kwargs`` are
            optional.
        split: which split, or which slice of it (``"train[:1%]"``). Files have no splits, so that
            its name is not used there; a slice is.
        config: which configuration of a Hub data set or folder.
        columns: the file's name of a column by the name that it has here, as
            ``{"prompt": "question"}``.
        skip_bad_rows: drop the rows of text files that cannot be used instead of raising; how
            many, why, and the first few are logged.

    Raises:
        FileNotFoundError: the name looks like a path, and there is nothing there.
        ValueError: a row that cannot be used (with file and line number), text that is not UTF-8,
            missing columns (with those found), no rows.
    """
    sources = readers.as_list(path_or_id)
    name = " ".join(map(str, sources))
    files = readers.find_files(sources)
    if files is None:
        dataset = _renamed(_load_named(name, split, config), columns, name)
    else:
        if config is not None:
            raise ValueError(f"config={config!r}: only a Hub data set or a folder has one: {name}")
        dataset = _sliced(_from_files(files, columns, BadRows(skip_bad_rows), name), split, name)
    check_columns(dataset.column_names, name)
    if len(dataset) == 0:
        raise ValueError(f"{name}: no rows")
    return dataset


def load_responses(path_or_id: Source, split: str = "train") -> Dataset:
    """Texts without a preference: rows with ``prompt`` and ``response``, or preference pairs.

    Both are loaded as pairs, the response as ``chosen`` and ``rejected``.
    """
    try:
        return load_preference_data(path_or_id, split)
    except MissingColumnsError as error:
        try:
            both = {"chosen": "response", "rejected": "response"}
            return load_preference_data(path_or_id, split, columns=both)
        except MissingColumnsError:
            raise error from None


# ------------------------------------------------------------------------------------------- tables


def load_table(source: str | Path, kind: str | None = None) -> Dataset:
    """The rows of a .parquet or .arrow file (``kind``), or of a folder or a Hub data set, as they
    are."""
    from datasets import load_dataset

    if kind is not None:
        return load_dataset(kind[1:], data_files=[str(source)], split="train")
    return _load_named(str(source), "train", None)


def _load_named(name: str, split: str, config: str | None) -> Dataset:
    """A folder, or something on the Hub."""
    from datasets import Dataset, load_dataset, load_from_disk
    from datasets.exceptions import DatasetGenerationError

    folder = Path(name).expanduser()
    if any((folder / file).is_file() for file in ("state.json", "dataset_dict.json")):
        if config is not None:
            raise ValueError(f"config={config!r}: {name} was written by save_to_disk; it has none")
        saved = load_from_disk(str(folder))
        if isinstance(saved, Dataset):
            return _sliced(saved, split, name)
        return _split(dict(saved), split, name)
    try:
        path = str(folder) if folder.is_dir() else name
        dataset = load_dataset(path, config, split=split)
        if dataset.info.builder_name == "csv":
            # pandas takes the texts None, null and NA for missing.
            dataset = load_dataset(path, config, split=split, keep_default_na=False)
        return dataset
    except DatasetGenerationError as error:
        raise ValueError(
            f"{name}: {error.__cause__ or error}. With the files themselves ('{name}/*.jsonl') "
            "the error names file and line"
        ) from error


def _sliced(dataset: Dataset, split: str, name: str) -> Dataset:
    """The slice of ``split``, whatever its name: a file has one split."""
    if "[" not in split and "+" not in split:
        return dataset
    if "+" in split:
        raise ValueError(f"split={split!r}: {name} has no splits to be added")
    return _split({split.partition("[")[0]: dataset}, split, name)


def _split(splits: Mapping[str, Dataset], split: str, name: str) -> Dataset:
    from datasets import ReadInstruction, concatenate_datasets

    try:
        instructions = ReadInstruction.from_spec(split)
        parts = instructions.to_absolute({s: len(d) for s, d in splits.items()})
    except (ValueError, AssertionError) as error:
        raise ValueError(f"{name}: split={split!r}: {error}") from None
    # `select` refuses the empty range behind the last row, so that it is made one at the first.
    chosen = [
        splits[part.splitname].select(range(part.from_, part.to) or range(0)) for part in parts
    ]
    return chosen[0] if len(chosen) == 1 else concatenate_datasets(chosen)


def _renamed(dataset: Dataset, columns: Mapping[str, str] | None, name: str) -> Dataset:
    if columns is None:
        return dataset
    _check_renaming(columns, dataset.column_names, name)
    given = {here: dataset.select_columns([theirs]) for here, theirs in columns.items()}
    dataset = dataset.remove_columns(
        [c for c in dataset.column_names if c in columns or c in columns.values()]
    )
    from datasets import concatenate_datasets

    named = [
        one if columns[here] == here else one.rename_column(columns[here], here)
        for here, one in given.items()
    ]
    return concatenate_datasets([dataset, *named], axis=1)


def _check_renaming(columns: Mapping[str, str], found: Sequence[str], name: str) -> None:
    known = dict.fromkeys((*COLUMNS, *PROMPTS, *OPENAI))
    for here, theirs in columns.items():
        if here not in known:
            raise ValueError(f"columns: {here!r} is read by nothing; known are {', '.join(known)}")
        if theirs not in found:
            raise MissingColumnsError(
                name,
                f"no column {theirs!r}, which was to be {here!r}; found: {', '.join(found)}",
                f"no column {theirs!r}",
            )


# -------------------------------------------------------------------------------------------- files


def _from_files(
    files: Sequence[Path], columns: Mapping[str, str] | None, bad: BadRows, name: str
) -> Dataset:
    from datasets import concatenate_datasets, load_dataset
    from datasets.exceptions import DatasetGenerationError

    by_kind: dict[str, list[Path]] = {}
    for file in files:
        kind = readers.kind_of(file)
        by_kind.setdefault(kind if kind in readers.TABLE_SUFFIXES else "", []).append(file)
    parts = []
    for kind, group in by_kind.items():
        if not kind:
            parts.append(_from_records(group, columns, bad, name))
            continue
        paths = [str(file) for file in group]
        try:
            table = load_dataset(kind[1:], data_files=paths, split="train")
        except (DatasetGenerationError, ValueError) as error:
            raise ValueError(f"{', '.join(paths)}: {error.__cause__ or error}") from error
        parts.append(_renamed(table, columns, name))
    if len(parts) == 1:
        return parts[0]
    read = [[c for c in part.column_names if c in (*READ, *PROMPTS, *OPENAI)] for part in parts]
    if any(set(columns) != set(read[0]) for columns in read):
        # What one lacks would be filled with None, which is a prompt that is to be found.
        raise ValueError(f"{name}: the files have different columns: {read}")
    try:
        return concatenate_datasets(parts)
    except ValueError as error:
        raise ValueError(f"{name}: the files do not fit into one table: {error}") from None


def _from_records(
    files: Sequence[Path], columns: Mapping[str, str] | None, bad: BadRows, name: str
) -> Dataset:
    """The rows of text files as pairs in TRL's form, so that they fit into one table."""
    rows: list[tuple[str, dict[str, Any]]] = []
    first: tuple[str, dict[str, Any], dict[str, Any]] | None = None  # place, as given, as a pair
    form = ""
    for file in files:
        for place, record in readers.read_records(file, readers.kind_of(file), bad):
            try:
                given = record = _checked_record(record, columns, place)
                if not set(TOKEN_COLUMNS) <= set(record):
                    record = _as_pair(record, place, first)
                    form = form or described(list(given)) or ""
                rows.append((place, record))
                first = first or (place, given, record)
            except RowError as error:
                bad.add(error)
    if not rows:
        raise ValueError(f"{name}: no rows" + (f" left: {bad}" if bad.reasons else ""))
    if form:
        logger.warning("%s: the columns are taken as %s.", name, form)
    table = _table(rows, bad, name)
    bad.log(len(rows) + bad.reasons.total(), name)
    return table


def _checked_record(record: Any, columns: Mapping[str, str] | None, place: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise RowError(place, f"expected an object, found {kind}")
    if columns is not None:
        _check_renaming(columns, list(record), place)
        renamed = {here: record[theirs] for here, theirs in columns.items()}
        record = {c: v for c, v in record.items() if c not in columns.values()} | renamed
    return record


def _as_pair(
    given: dict[str, Any], place: str, first: tuple[str, dict[str, Any], dict[str, Any]] | None
) -> dict[str, Any]:
    """The record in TRL's form; RowError also where it is text, and the first one messages."""
    check_columns(list(given), place)
    if first is not None:
        _check_kinds(("chosen", "rejected"), given, first[1], place, first[0])
    row = pair(given, place)
    if first is not None:
        _check_kinds(("prompt", "chosen", "rejected"), row, first[2], place, first[0])
    return {c: v for c, v in given.items() if c not in (*PROMPTS, *OPENAI)} | row


def _check_kinds(
    columns: Sequence[str],
    row: Mapping[str, Any],
    first: Mapping[str, Any],
    place: str,
    first_place: str,
) -> None:
    for column in columns:
        mine, theirs = (type(record.get(column)) for record in (row, first))
        if mine is not theirs and str in (mine, theirs) and type(None) not in (mine, theirs):
            raise RowError(
                place,
                f"'{column}' is {mine.__name__}, but {theirs.__name__} at {first_place}; "
                "a file holds either strings or message lists",
                "strings in a file of message lists, or the other way round",
            )


def _table(rows: list[tuple[str, dict[str, Any]]], bad: BadRows, name: str) -> Dataset:
    from datasets import Dataset

    def table(count: int) -> Any:
        try:
            return Dataset.from_dict({c: [row.get(c) for _, row in rows[:count]] for c in columns})
        except (ValueError, TypeError, OverflowError) as error:  # pyarrow's are of these kinds
            return error

    # Not those of the first row only: a prompt or tools may come later.
    found = dict.fromkeys(column for _, row in rows for column in row)
    columns = list(found)
    made = table(len(rows))
    if isinstance(made, Exception):
        columns = [column for column in found if column in READ]
        made = table(len(rows))
        if not isinstance(made, Exception):
            left = ", ".join(column for column in found if column not in READ)
            logger.warning("%s: left out what does not fit into a table: %s.", name, left)
    while isinstance(made, Exception):
        # Halving finds the first row with which it fails among a million in twenty tries.
        fails = range(len(rows))
        at = bisect.bisect_left(fails, True, key=lambda i: isinstance(table(i + 1), Exception))
        text = "the row does not fit into one table with those before"
        bad.add(RowError(rows[at][0], f"{text}: {made}", text))
        del rows[at]
        made = table(len(rows))
    return made
