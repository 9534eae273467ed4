"""Preference data: from files or the Hub to token ids, and from token ids to packed rows.

The chain is ``load_preference_data`` -> ``prepare_dataset`` -> ``PreferenceCollator``. What the
last one hands on is the bookkeeping of the loss: one *row* per state. A response of n tokens behind
a prompt of L tokens gives n rows, at the positions L-1 ... L+n-2; row t is the state s_t, and its
action is the token that follows. The end-of-sequence token is an action like any other, and after
it the episode is over (its value is 0), so it has no row of its own. A response that was cut off at
``max_length`` did not end there: it gets one more row, at its last token, without an action (-100),
which only gives the value of the state that it was cut at.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qadapter.tokenization import (
    TOKEN_COLUMNS,
    PromptTooLongError,
    check_columns,
    tokenize_preference,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "PreferenceCollator",
    "PromptTooLongError",
    "collate_sequences",
    "load_preference_data",
    "prepare_dataset",
    "tokenize_preference",
]

logger = logging.getLogger(__name__)

IGNORE_ACTION = -100
FLAG_COLUMNS = ("chosen_truncated", "rejected_truncated")
_FILE_SUFFIXES = (".jsonl", ".json", ".parquet")


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
        if path.suffix not in _FILE_SUFFIXES:
            raise ValueError(f"{name}: unknown kind of file; known are {', '.join(_FILE_SUFFIXES)}")
        if path.suffix == ".parquet":
            from datasets import Dataset

            dataset = Dataset.from_parquet(str(path))
        else:
            dataset = _from_records(_read_json(path), name)
    elif not path.is_dir() and (isinstance(path_or_id, Path) or _looks_like_path(name)):
        raise FileNotFoundError(f"no such file: {name}")
    else:
        from datasets import load_dataset

        dataset = load_dataset(name, split=split)
    check_columns(dataset.column_names, name)
    if len(dataset) == 0:
        raise ValueError(f"{name}: no rows")
    return dataset


def _looks_like_path(name: str) -> bool:
    # A Hub id is "name" or "owner/name"; everything else is meant as a path.
    return (
        name.endswith(_FILE_SUFFIXES)
        or name.startswith(("/", ".", "~"))
        or name.count("/") > 1
        or "\\" in name
    )


def _read_json(path: Path) -> list[tuple[str, Any]]:
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


# ----------------------------------------------------------------------------------------- collator


def eos_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every id that ends a response: the tokenizer's and those of the generation config."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in (*ids, tokenizer.eos_token_id) if i is not None})


def pad_token_id(tokenizer: Any) -> int:
    """An id to pad with; it is masked everywhere, so any will do."""
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    return pad if pad is not None else eos if eos is not None else 0


class PreferenceCollator:
    """Collate P tokenised pairs into one batch of 2P sequences and the N state rows of the loss.

    The call takes a list of what :func:`tokenize_preference` returns and gives a dict of tensors:

    - ``input_ids`` int64 [2P, T], right padded; sequence i is the chosen, P + i the rejected
      response of pair i
    - ``attention_mask`` int64 [2P, T]
    - ``rows`` int64 [N]: flat positions of the states in [2P * T], sequence after sequence
      (``hidden.view(-1, H)[rows]``)
    - ``actions`` int64 [N]: the token taken in each state; -100 in the one extra row of a truncated
      response
    - ``cu_seqlens`` int32 [2P + 1]: rows of sequence s are ``cu_seqlens[s]:cu_seqlens[s + 1]``

    Args:
        pad_token_id: the id in the padding; any id will do, nothing reads it.
        pad_to_multiple_of: round T up, for example to 8 for tensor cores.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int | None = None) -> None:
        if pad_token_id is None:
            raise ValueError(
                "pad_token_id is None; any id will do, such as the tokenizer's eos_token_id"
            )
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of must be at least 1, not {pad_to_multiple_of}")
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        sequences = []
        for column in ("chosen", "rejected"):
            for feature in features:
                prompt, response = list(feature["prompt_ids"]), list(feature[f"{column}_ids"])
                if not prompt or not response:
                    raise ValueError(f"a pair without a token in its prompt or in '{column}_ids'")
                sequences.append(
                    (prompt, response, bool(feature.get(f"{column}_truncated", False)))
                )
        return collate_sequences(sequences, self.pad_token_id, self.pad_to_multiple_of)


def collate_sequences(
    sequences: Sequence[tuple[list[int], list[int], bool]],
    pad_token_id: int,
    pad_to_multiple_of: int | None = None,
) -> dict[str, torch.Tensor]:
    """:class:`PreferenceCollator`'s tensors for (prompt ids, response ids, truncated) triples."""
    width = max((len(prompt) + len(response) for prompt, response, _ in sequences), default=0)
    if pad_to_multiple_of:
        width = -(-width // pad_to_multiple_of) * pad_to_multiple_of

    input_ids = torch.full((len(sequences), width), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    rows: list[int] = []
    actions: list[int] = []
    ends = [0]
    for s, (prompt, response, truncated) in enumerate(sequences):
        length = len(prompt) + len(response)
        input_ids[s, :length] = torch.tensor(prompt + response, dtype=torch.int64)
        attention_mask[s, :length] = 1
        first = s * width + len(prompt) - 1
        rows.extend(range(first, first + len(response) + truncated))
        actions.extend(response)
        if truncated:
            actions.append(IGNORE_ACTION)
        ends.append(len(rows))
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "rows": torch.tensor(rows, dtype=torch.int64),
        "actions": torch.tensor(actions, dtype=torch.int64),
        "cu_seqlens": torch.tensor(ends, dtype=torch.int32),
    }
