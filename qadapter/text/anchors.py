"""Anchors: text on which the policy shall stay what the base is, as token ids and states.

Every state of an anchor counts, whoever wrote the text: KL(base || policy) there is exact.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from qadapter.text import readers
from qadapter.text.bad_rows import RowError
from qadapter.text.forms import pair
from qadapter.text.loading import Source, load_table
from qadapter.text.messages import TEMPLATE_FIELDS, message_list, template_fields
from qadapter.text.tokenization import (
    PromptTooLongError,
    open_text_ids,
    tokenize_preference,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class Anchor(NamedTuple):
    """Token ids, and the position of the first state: the last of the prompt's."""

    ids: tuple[int, ...]
    first: int

    @property
    def states(self) -> int:
        return len(self.ids) - self.first


ANSWERS = ("completion", "response", "chosen")
FIELDS = ("text", "messages", "conversations", "prompt", *ANSWERS)


def load_anchors(path_or_id: Source) -> list[dict[str, Any]]:
    """Rows for `tokenize_anchor`, and prompts without an answer, from files, a folder or the Hub.

    Args:
        path_or_id: what `load_preference_data` takes, and ``.txt`` (a prompt a line). Rows are
            conversations, texts, prompts with an answer, preference pairs, or prompts (a string is
            one).

    Raises:
        FileNotFoundError: the name looks like a path, and there is nothing there.
        ValueError: a row of none of these forms, with file and line; no rows.
    """
    sources = readers.as_list(path_or_id)
    name = " ".join(map(str, sources))
    files = readers.find_files(sources)
    records: list[tuple[str, Any]] = []
    for file in files or ():
        kind = readers.kind_of(file, (*readers.FILE_SUFFIXES, ".txt"))
        if kind == ".txt":
            lines = readers.read_text(file).splitlines()
            records += [(f"{file}, line {i}", x) for i, x in enumerate(lines, 1) if x.strip()]
        elif kind in readers.TABLE_SUFFIXES:
            records += [(f"{file}, row {i}", x) for i, x in enumerate(load_table(file, kind), 1)]
        else:
            records += readers.read_records(file, kind)
    if files is None:
        records = [(f"{name}, row {i}", x) for i, x in enumerate(load_table(name), 1)]
    if not records:
        raise ValueError(f"{name}: no rows")
    return [anchor_row(record, place) for place, record in records]


def anchor_row(record: Any, place: str) -> dict[str, Any]:
    """A row as `load_anchors` gives it. RowError for what is none."""
    if isinstance(record, str):
        record = {"prompt": record}
    if not isinstance(record, Mapping):
        raise RowError(place, f"expected an object or a string, got {type(record).__name__}")
    # Tables fill with None what a row lacks.
    row = {key: value for key, value in record.items() if value is not None}
    if not any(row.get(name) for name in FIELDS):
        found = ", ".join(map(str, row)) or "nothing"
        raise RowError(place, f"expected one of the fields {', '.join(FIELDS)}; found: {found}")
    return row


def different(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of `anchor_row` without those that are an anchor there was: the pairs of a prompt often
    share their chosen answer, and what is held out of training must not be in it under another
    number."""
    seen, left_out = set(), 0
    for index, row in enumerate(rows):
        if row.get("text") is not None:
            what: Any = row["text"]
        else:
            what = _parts(row, f"anchor {index}") if has_answer(row) else only_prompt(row)
        more = [bool(row.get("truncated")), *(row.get(name) for name in TEMPLATE_FIELDS)]
        key = json.dumps([what, *more], sort_keys=True, default=str)
        if key in seen:
            left_out += 1
        else:
            seen.add(key)
            yield row
    if left_out:
        logger.warning("Left out %d anchors that were there already.", left_out)


def has_answer(row: Mapping[str, Any]) -> bool:
    """Whether a row is a whole conversation or text; else it is a prompt."""
    if any(row.get(name) is not None for name in ("text", *ANSWERS)):
        return True
    messages = row.get("messages") or row.get("conversations") or row.get("prompt")
    if not isinstance(messages, list | tuple) or not messages:
        return False
    last = message_list(messages, "a conversation", "messages")[-1]
    return bool(last["role"] == "assistant" and last["content"])


def only_prompt(row: Mapping[str, Any]) -> dict[str, Any]:
    """Of a row without an answer, what `qadapter.text.prompts.prompt_row` reads."""
    read = ("prompt", "messages", "conversations", *TEMPLATE_FIELDS)
    return {name: row[name] for name in read if row.get(name)}


def tokenize_anchor(
    row: Mapping[str, Any],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int = 1024,
    eos_token_ids: int | Iterable[int] | None = None,
    index: int = 0,
) -> Anchor:
    """An anchor from a row of text or messages.

    Args:
        row: ``text`` (its states are all of its tokens); ``messages`` or ``conversations`` that end
            in a message of the assistant's, ``prompt`` and ``completion`` (or ``response``), or a
            preference pair (its chosen answer); their states are the answer's. ``truncated``: the
            answer was cut, so that its end is none.
        max_length: longer ones are cut.
        tokenizer, eos_token_ids, index: as in `tokenize_preference`.

    Raises:
        PromptTooLongError: a prompt of ``max_length`` tokens or more.
        ValueError: a row without an answer, or that cannot be tokenised.
    """
    where = f"anchor {index}"
    cut = bool(row.get("truncated", False))
    text = row.get("text")
    if text is not None:
        if not isinstance(text, str) or not text:
            raise RowError(where, f"text: expected a text, got {text!r}")
        ids = open_text_ids(tokenizer, text, [tokenizer.eos_token_id])[:max_length]
        if not ids:
            raise RowError(where, "text: no token in it")
        return Anchor(tuple(ids), 0)
    if not has_answer(row):
        raise RowError(
            where, f"expected a conversation that ends in an answer, got {', '.join(row)}"
        )
    prompt, answer = _parts(row, where)
    example = {"prompt": prompt, "chosen": answer, "rejected": answer}
    example |= template_fields(row, where)
    tokens = tokenize_preference(
        example, tokenizer, max_length=max_length, eos_token_ids=eos_token_ids, index=index
    )
    answered = list(tokens["chosen_ids"])
    if cut and not tokens["chosen_truncated"]:
        answered = answered[:-1]  # the end that the template writes
        cut = bool(answered)
    ended = not (cut or tokens["chosen_truncated"])
    # The last token of an answer that ended is an action but no state.
    ids = [*tokens["prompt_ids"], *(answered[:-1] if ended else answered)]
    return Anchor(tuple(ids), len(tokens["prompt_ids"]) - 1)


def _parts(row: Mapping[str, Any], where: str) -> tuple[Any, Any]:
    """Prompt and answer."""
    if row.get("rejected") is not None:
        found = pair(row, where)
        return found["prompt"], found["chosen"]
    answer = next((row[name] for name in ANSWERS if row.get(name) is not None), None)
    if answer is not None:
        if row.get("prompt") is None:
            raise RowError(where, "expected a prompt with the answer")
        return row["prompt"], answer
    whole = row.get("messages") or row.get("conversations") or row.get("prompt")
    messages = message_list(whole, where, "messages")
    if len(messages) < 2:
        raise RowError(where, "messages: expected a question before the answer")
    return messages[:-1], messages[-1:]


__all__ = [
    "Anchor",
    "PromptTooLongError",
    "anchor_row",
    "different",
    "has_answer",
    "load_anchors",
    "only_prompt",
    "tokenize_anchor",
]
