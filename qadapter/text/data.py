"""Preference data: from files or the Hub to rows, and from rows to token ids.

The chain is ``load_preference_data`` -> ``prepare_dataset`` -> ``PreferenceCollator`` (or
``PackedPreferenceCollator``, which needs no padding).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qadapter.text.readers import FILE_SUFFIXES, looks_like_path, read_json
from qadapter.text.tokenization import (
    TOKEN_COLUMNS,
    PromptTooLongError,
    check_columns,
    tokenize_preference,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "PromptTooLongError",
    "load_preference_data",
    "prepare_dataset",
    "tokenize_preference",
]

logger = logging.getLogger(__name__)

FLAG_COLUMNS = ("chosen_truncated", "rejected_truncated")


# ------------------------------------------------------------------------------------------ loading


def load_preference_data(path_or_id: str | Path, split: str = "train") -> Dataset:
    """Load preference pairs from a file, a folder or the Hugging Face Hub.

    Args:
        path_or_id: a ``.jsonl`` file (one JSON object a line), a ``.json`` file (a list of
            objects), a ``.parquet`` file, or what ``datasets.load_dataset`` takes (a Hub id, a
            folder). The rows need the columns ``chosen`` and ``rejected``; ``prompt``, ``tools``
            and ``chat_template_kwargs`` are optional.
        split: which split of a Hub data set or folder. A single file has no splits, so that it is
            not used there.

    Raises:
        FileNotFoundError: the name looks like a path, and there is nothing there.
        ValueError: a line that is not JSON (with file and line number), missing columns (with those
            found), no rows.
    """
    name = str(path_or_id)
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix not in FILE_SUFFIXES:
            raise ValueError(f"{name}: unknown kind of file; known are {', '.join(FILE_SUFFIXES)}")
        if path.suffix == ".parquet":
            from datasets import Dataset

            dataset = Dataset.from_parquet(str(path))
        else:
            dataset = _from_records(read_json(path), name)
    elif not path.is_dir() and (isinstance(path_or_id, Path) or looks_like_path(name)):
        raise FileNotFoundError(f"no such file: {name}")
    else:
        from datasets import load_dataset

        dataset = load_dataset(name, split=split)
    check_columns(dataset.column_names, name)
    if len(dataset) == 0:
        raise ValueError(f"{name}: no rows")
    return dataset


def _from_records(records: list[tuple[str, Any]], name: str) -> Dataset:
    import pyarrow
    from datasets import Dataset

    for place, record in records:
        if not isinstance(record, dict):
            raise ValueError(f"{place}: expected an object, found {type(record).__name__}")
        if not set(TOKEN_COLUMNS) <= set(record):
            check_columns(list(record), place)
        first = records[0][1]
        for column in ("prompt", "chosen", "rejected"):
            mine, theirs = (type(r.get(column)) for r in (record, first))
            if mine is not theirs and {mine, theirs} <= {str, list, dict, int, float, bool}:
                raise ValueError(
                    f"{place}: '{column}' is {mine.__name__}, but {theirs.__name__} at "
                    f"{records[0][0]}; a file holds either strings or message lists"
                )
    try:
        return Dataset.from_list([record for _, record in records])
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        raise ValueError(f"{name}: the rows do not fit into one table: {error}") from error


# ------------------------------------------------------------------------------------- tokenisation


def prepare_dataset(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 1024,
    eos_token_ids: int | Iterable[int] | None = None,
    drop_long_prompts: bool = False,
    num_proc: int | None = None,
    desc: str = "Tokenizing pairs",
) -> Dataset:
    """Tokenise a data set of preference pairs; the columns of the result are those of
    :func:`tokenize_preference`.

    A data set that already has all five columns is returned as it is; one with the three columns of
    ids gets the end of its responses checked, cut at ``max_length`` and flagged like any other.

    Args:
        drop_long_prompts: drop rows whose prompt fills ``max_length`` instead of raising; how many
            is logged.
        num_proc: number of processes.
        desc: what the progress bar says. The other arguments are those of
            :func:`tokenize_preference`.

    Raises:
        TypeError: not a ``datasets.Dataset`` (a ``DatasetDict``: choose a split first).
        ValueError: what :func:`tokenize_preference` raises, with the number of the row; nothing
            left.
    """
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        hint = (
            f"; choose a split, such as data['{next(iter(dataset))}']"
            if isinstance(dataset, dict) and dataset
            else ""
        )
        raise TypeError(f"expected a datasets.Dataset, found {type(dataset).__name__}{hint}")
    if {*TOKEN_COLUMNS, *FLAG_COLUMNS} <= set(dataset.column_names):
        return dataset
    check_columns(dataset.column_names, "the data set")
    if eos_token_ids is not None and not isinstance(eos_token_ids, int):
        eos_token_ids = list(eos_token_ids)  # an iterator would be empty after the first row

    def tokenize(batch: Mapping[str, list], indices: list[int]) -> dict[str, list]:
        result: dict[str, list] = {column: [] for column in (*TOKEN_COLUMNS, *FLAG_COLUMNS)}
        for i, index in enumerate(indices):
            row = {column: values[i] for column, values in batch.items()}
            try:
                tokens = tokenize_preference(
                    row, tokenizer, max_length=max_length, eos_token_ids=eos_token_ids, index=index
                )
            except PromptTooLongError:
                if not drop_long_prompts:
                    raise
                continue
            for column, value in tokens.items():
                result[column].append(value)
        return result

    # Set here because a forked worker of `num_proc` would otherwise print one warning a process.
    os.environ.setdefault(
        "TOKENIZERS_PARALLELISM", "false" if num_proc and num_proc > 1 else "true"
    )
    prepared = dataset.map(
        tokenize,
        with_indices=True,
        batched=True,
        remove_columns=dataset.column_names,
        num_proc=num_proc,
        desc=desc,
    )
    dropped = len(dataset) - len(prepared)
    if len(prepared) == 0:
        reason = (
            f": all {dropped} prompts have {max_length} tokens (max_length) or more"
            if dropped
            else ""
        )
        raise ValueError(f"no pairs left{reason}")
    if dropped:
        logger.warning(
            "Dropped %d of %d pairs: prompt of %d tokens or more.",
            dropped,
            len(dataset),
            max_length,
        )
    return prepared
