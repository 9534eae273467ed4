"""Prompts: from a file or a list of messages to token ids, padded on the left."""

import contextlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qadapter.composition import RECOMMENDED
from qadapter.text import readers
from qadapter.text.bad_rows import RowError
from qadapter.text.forms import messages_from_json
from qadapter.text.messages import (
    checked_text,
    is_unfinished,
    message_list,
    render,
    template_fields,
    template_options,
)
from qadapter.text.tokenization import open_text_ids, pad_token_id

Prompt = str | list[dict[str, Any]]
SUFFIXES = (*readers.FILE_SUFFIXES, ".txt")


PROMPT_FIELDS = ("prompt", "messages", "conversations")


@dataclass(frozen=True)
class PromptRow:
    """One prompt; ``place`` says where it came from, ``template`` what the chat template is given
    (`template_fields`); ``fields`` holds that and what nothing here reads."""

    prompt: Prompt
    place: str
    strength: float | str | None = None
    seed: int | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    template: dict[str, Any] = field(default_factory=dict)

    @property
    def asked(self) -> Any:
        """The prompt, as an object with ``template`` where there is any."""
        return {"prompt": self.prompt, **self.template} if self.template else self.prompt


def read_prompts(path: str | Path) -> list[PromptRow]:
    """The prompts of a file, checked.

    .jsonl (an object or a string a line), .json (a list of them, or JSON lines), .csv and .tsv,
    .txt (a prompt a line, empty lines skipped), all of them also compressed, .parquet, .arrow; a
    glob; "-" is stdin, JSON lines if the first begins with {, else text. An object has ``prompt``
    (text, or a list of chat messages), ``messages`` or ``conversations``, and may have ``strength``
    (a number or "recommended"), ``seed``, and ``tools`` and ``chat_template_kwargs`` for the chat
    template; its other fields are kept. Messages may be in any form that `message_list` knows.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a row that does not fit, with file and line; no rows.
    """
    if str(path) == "-":
        return _read_stdin()
    files = readers.find_files([path])
    if files is None:
        raise FileNotFoundError(f"no such file: {path}")
    records: list[tuple[str, Any]] = []
    for file in files:
        kind = readers.kind_of(file, SUFFIXES)
        if kind in readers.TABLE_SUFFIXES:
            from datasets import load_dataset

            rows: Any = load_dataset(kind[1:], data_files=[str(file)], split="train")
            records += [(f"{file}, row {i}", row) for i, row in enumerate(rows, start=1)]
        elif kind == ".txt":
            records += _lines(readers.read_text(file), str(file))
        elif kind in (".csv", ".tsv"):
            records += [(p, _parsed(row, p)) for p, row in readers.read_records(file, kind)]
        else:
            records += readers.read_records(file, kind)
    if not records:
        raise ValueError(f"{path}: no rows")
    return [prompt_row(record, place) for place, record in records]


def _parsed(row: dict[str, Any], place: str) -> dict[str, Any]:
    """A row of a table of text: numbers and messages as such, what is left empty not there."""
    for name in PROMPT_FIELDS:
        if name in row:
            row[name] = messages_from_json(row[name], place, name)
    for name in ("strength", "seed"):
        text = row.get(name)
        if text == "":
            del row[name]
        elif text is not None:
            with contextlib.suppress(ValueError):  # prompt_row says what is expected
                row[name] = int(text) if name == "seed" else float(text)
    return row


def _lines(text: str, name: str) -> list[tuple[str, Any]]:
    lines = enumerate(text.split("\n"), start=1)
    return [(f"{name}, line {i}", line.strip()) for i, line in lines if line.strip()]


def _read_stdin() -> list[PromptRow]:
    try:
        records = _lines(sys.stdin.read(), "stdin")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"stdin: not {error.encoding}: byte 0x{error.object[error.start]:02x}"
        ) from None
    if not records:
        raise ValueError("stdin: no rows")
    if records[0][1].startswith("{"):
        for i, (place, line) in enumerate(records):
            try:
                records[i] = (place, json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{place}: not valid JSON: {error.msg}") from None
    return [prompt_row(record, place) for place, record in records]


def prompt_row(record: Any, place: str) -> PromptRow:
    """A checked prompt from a string or an object; ``place`` is for error messages."""
    if isinstance(record, str):
        return PromptRow(_checked_prompt(record, place, "prompt"), place)
    if not isinstance(record, Mapping):
        raise ValueError(f"{place}: expected an object or a string, got {type(record).__name__}")
    fields = dict(record)
    # Tables fill with None what a row lacks.
    given = [name for name in PROMPT_FIELDS if fields.get(name) is not None]
    if len(given) != 1:
        names = "'prompt' and 'messages' (or ShareGPT's 'conversations')"
        found = ", ".join(map(str, fields)) or "none"
        wrong = f"both are there: {', '.join(given)}" if given else f"found: {found}"
        raise ValueError(f"{place}: expected one of the fields {names}; {wrong}")
    prompt = fields[given[0]]
    for name in PROMPT_FIELDS:
        fields.pop(name, None)
    strength, seed = fields.pop("strength", None), fields.pop("seed", None)
    return PromptRow(
        _checked_prompt(prompt, place, given[0]),
        place,
        strength
        if strength in (None, RECOMMENDED)
        else checked_strength(strength, f"{place}: strength"),
        None if seed is None else checked_seed(seed, f"{place}: seed"),
        fields,
        template_fields(fields, place),
    )


def checked_strength(value: Any, what: str) -> float:
    number = not isinstance(value, bool) and isinstance(value, int | float)
    if not number or not math.isfinite(value) or value < 0:
        raise ValueError(f"{what}: expected 0 (the base) or more, got {value!r}")
    return float(value)


def checked_seed(value: Any, what: str) -> int:
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole or not -(2**63) <= value < 2**63:
        raise ValueError(f"{what}: expected an integer of at most 64 bits, got {value!r}")
    return int(value)


def _checked_prompt(prompt: Any, place: str, what: str) -> Prompt:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise RowError(place, f"{what}: expected some text, got an empty prompt")
        return checked_text(prompt, place, what)
    messages = message_list(prompt, place, what)
    if all(m["role"] == "system" for m in messages):
        raise RowError(place, f"{what}: expected a user's message, got only the system's")
    return messages


def prompt_text(
    tokenizer: Any,
    prompt: Prompt,
    system: str | None = None,
    chat: bool = True,
    template: Mapping[str, Any] | None = None,
) -> str:
    """What the model reads: the chat template's text, or the contents joined by line breaks.

    A system message of the prompt's own goes before ``system``. If the last message is the
    assistant's, the answer goes on from it. ``template``: as `PromptRow.template`.

    Raises:
        ValueError: not messages, the chat template refuses them, or there is none for ``template``.
    """
    messages = message_list(
        {"role": "user", "content": prompt} if isinstance(prompt, str) else prompt,
        "the prompt",
        "messages",
    )
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    if not chat or tokenizer.chat_template is None:
        if template:
            raise ValueError(f"{', '.join(template)}: expected a chat template, and none is used")
        if any(message["content"] is None for message in messages):
            raise ValueError("a message that only calls tools needs a chat template")
        return "\n".join(message["content"] for message in messages)
    unfinished = is_unfinished(messages)
    text: str = render(
        tokenizer,
        messages,
        tokenize=False,
        add_generation_prompt=not unfinished,
        continue_final_message=unfinished,
        **template_options(template or {}),
    )
    return text


def prompt_ids(
    tokenizer: Any,
    prompt: Prompt,
    system: str | None = None,
    chat: bool = True,
    template: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of one prompt, with one BOS at most. ValueError if there are none."""
    text = prompt_text(tokenizer, prompt, system, chat, template)
    if chat and tokenizer.chat_template is not None:  # which writes its own BOS
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    else:
        ids = open_text_ids(tokenizer, text, [tokenizer.eos_token_id])
    if not ids:
        raise ValueError("the prompt has no tokens")
    return ids


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: Any) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask, int64 [B, T], of rows of token ids."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def encode_prompts(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    system: str | None = None,
    chat: bool = True,
    device: Any = "cpu",
) -> dict[str, torch.Tensor]:
    """Left-padded input_ids and attention_mask of prompts, texts or lists of chat messages.

    In the chat template if there is one and ``chat``; see `prompt_text`.
    """
    rows = [prompt_ids(tokenizer, prompt, system, chat) for prompt in prompts]
    return left_padded(rows, pad_token_id(tokenizer), device)
