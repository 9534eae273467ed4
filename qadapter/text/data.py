"""Preference data: from files or the Hub to rows, and from rows to token ids.

The chain is ``load_preference_data`` -> ``prepare_dataset`` -> ``PreferenceCollator`` (or
``PackedPreferenceCollator``, which needs no padding).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from qadapter.text.bad_rows import BadRows, RowError
from qadapter.text.forms import FLAG_COLUMNS, TOKEN_COLUMNS, check_columns, described
from qadapter.text.loading import load_preference_data, load_responses
from qadapter.text.tokenization import PromptTooLongError, tokenize_preference

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

Rows = TypeVar("Rows", "Dataset", "IterableDataset")

__all__ = [
    "PromptTooLongError",
    "load_preference_data",
    "load_responses",
    "prepare_dataset",
    "tokenize_preference",
]

logger = logging.getLogger(__name__)

LONG = "prompt as long as max_length"


def prepare_dataset(
    dataset: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 1024,
    eos_token_ids: int | Iterable[int] | None = None,
    drop_long_prompts: bool = False,
    skip_bad_rows: bool = False,
    num_proc: int | None = None,
    desc: str = "Tokenizing pairs",
) -> Rows:
    """Tokenise a data set of preference pairs; the columns of the result are those of
    :func:`tokenize_preference`.

    A data set that already has all five columns is returned as it is; one with the three columns of
    ids gets the end of its responses checked, cut at ``max_length`` and flagged like any other.
    A stream (``IterableDataset``) is tokenised as it is read; what it drops is logged row by row.

    Args:
        drop_long_prompts: drop rows whose prompt fills ``max_length`` instead of raising; how many
            is logged.
        skip_bad_rows: drop every row that :func:`tokenize_preference` refuses instead of raising;
            how many, why, and the first few are logged.
        num_proc: number of processes; a stream has none.
        desc: what the progress bar says. The other arguments are those of
            :func:`tokenize_preference`.

    Raises:
        TypeError: not a ``datasets.Dataset`` (a ``DatasetDict``: choose a split first).
        ValueError: what :func:`tokenize_preference` raises, with the number of the row; nothing
            left.
    """
    from datasets import Dataset, Features, IterableDataset, Sequence, Value

    if not isinstance(dataset, Dataset | IterableDataset):
        hint = (
            f"; choose a split, such as data['{next(iter(dataset))}']"
            if isinstance(dataset, dict) and dataset
            else ""
        )
        if isinstance(dataset, str | os.PathLike):
            hint = " (load_preference_data reads files)"
        raise TypeError(
            f"dataset: expected a datasets.Dataset, found {type(dataset).__name__}{hint}"
        )
    streams = isinstance(dataset, IterableDataset)
    if isinstance(dataset, Dataset) and not len(dataset):
        raise ValueError("dataset: expected one pair or more, found no rows")
    # A stream may know its columns only from its rows.
    columns = dataset.column_names or list(next(iter(dataset), ()))
    if {*TOKEN_COLUMNS, *FLAG_COLUMNS} <= set(columns):
        return dataset
    check_columns(columns, "the data set")
    form = described(columns)
    if form:
        logger.warning("The columns are taken as %s.", form)
    if eos_token_ids is not None and not isinstance(eos_token_ids, int):
        eos_token_ids = list(eos_token_ids)  # an iterator would be empty after the first row

    features = Features(
        {column: Sequence(Value("int64")) for column in TOKEN_COLUMNS}
        | {column: Value("bool") for column in FLAG_COLUMNS}
        | {column: Value("string") for column in ("reason", "message")}
    )
    # A row that is dropped comes back empty with the reason, also from another process.
    nothing: dict[str, Any] = {column: [] for column in TOKEN_COLUMNS}
    nothing |= dict.fromkeys(FLAG_COLUMNS, False)

    def tokenize(batch: Mapping[str, list], indices: list[int]) -> dict[str, list]:
        rows = []
        for i, index in enumerate(indices):
            row = {column: values[i] for column, values in batch.items()}
            try:
                tokens = tokenize_preference(
                    row, tokenizer, max_length=max_length, eos_token_ids=eos_token_ids, index=index
                )
                tokens |= {"reason": "", "message": ""}
            except RowError as error:
                long = isinstance(error, PromptTooLongError)
                if not (skip_bad_rows or (long and drop_long_prompts)):
                    raise
                if streams:
                    logger.warning("Dropped %s", error)
                reason = LONG if long else error.reason
                tokens = {**nothing, "reason": reason, "message": str(error)}
            rows.append(tokens)
        return {column: [row[column] for row in rows] for column in features}

    # Set here because a forked worker of `num_proc` would otherwise print one warning a process.
    os.environ.setdefault(
        "TOKENIZERS_PARALLELISM", "false" if num_proc and num_proc > 1 else "true"
    )
    options: dict[str, Any] = {"with_indices": True, "batched": True, "features": features}
    options["remove_columns"] = columns
    if isinstance(dataset, IterableDataset):
        stream = dataset.map(tokenize, **options).filter(lambda row: not row["reason"])
        return stream.remove_columns(["reason", "message"])
    prepared = dataset.map(tokenize, **options, num_proc=num_proc, desc=desc)
    return _without_dropped(prepared, max_length)


def _without_dropped(prepared: Dataset, max_length: int) -> Dataset:
    """The rows that are left, without the reasons; what was dropped is logged."""
    reasons = prepared["reason"][:]
    total, kept = len(reasons), [i for i, reason in enumerate(reasons) if not reason]
    if len(kept) < total:
        bad = BadRows(skip=True)
        for i, reason in enumerate(reasons):
            if reason and (reason != LONG or not kept):
                bad.count(reason, prepared[i]["message"])
        long = reasons.count(LONG)
        if not kept:
            why = f"all {total} prompts have {max_length} tokens (max_length) or more"
            raise ValueError(f"no pairs left: {why if long == total else bad}")
        if long:
            logger.warning(
                "Dropped %d of %d pairs: prompt of %d tokens or more.", long, total, max_length
            )
        bad.log(total, "the data set")
        prepared = prepared.select(kept)
    return prepared.remove_columns(["reason", "message"])
