"""Prompts: from a file or a list of messages to token ids, padded on the left."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qadapter.text.readers import read_json
from qadapter.text.tokenization import pad_token_id

Prompt = str | list[dict[str, Any]]
SUFFIXES = (".jsonl", ".json", ".txt", ".parquet")


@dataclass(frozen=True)
class PromptRow:
    """One prompt; ``place`` says where it came from, ``fields`` holds what nothing here reads."""

    prompt: Prompt
    place: str
    strength: float | None = None
    seed: int | None = None
    fields: dict[str, Any] = field(default_factory=dict)


def read_prompts(path: str | Path) -> list[PromptRow]:
    """The prompts of a file, checked.

    .jsonl (an object or a string a line), .json (a list of them), .txt (a prompt a line, empty
    lines skipped), .parquet; "-" is stdin, JSON lines if the first begins with {, else text.
    An object has ``prompt`` (text, or a list of chat messages) or
    ``messages``, and may have ``strength`` and ``seed``; its other fields are kept.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a row that does not fit, with file and line; no rows.
    """
    if str(path) == "-":
        return _read_stdin()
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: unknown kind of file; known are {', '.join(SUFFIXES)}")
    if path.suffix == ".parquet":
        from datasets import Dataset

        rows: Any = Dataset.from_parquet(str(path))
        records = [(f"{path}, row {i}", row) for i, row in enumerate(rows, start=1)]
    elif path.suffix == ".txt":
        records = _lines(path.read_text(encoding="utf-8-sig"), str(path))
    else:
        records = read_json(path)
    if not records:
        raise ValueError(f"{path}: no rows")
    return [prompt_row(record, place) for place, record in records]


def _lines(text: str, name: str) -> list[tuple[str, Any]]:
    lines = enumerate(text.split("\n"), start=1)
    return [(f"{name}, line {i}", line.strip()) for i, line in lines if line.strip()]


def _read_stdin() -> list[PromptRow]:
    records = _lines(sys.stdin.read(), "stdin")
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
        return PromptRow(_checked_prompt(record, f"{place}: prompt"), place)
    if not isinstance(record, Mapping):
        raise ValueError(f"{place}: expected an object or a string, got {type(record).__name__}")
    fields = dict(record)
    # Tables fill with None what a row lacks.
    given = [name for name in ("prompt", "messages") if fields.get(name) is not None]
    if len(given) != 1:
        found = ", ".join(map(str, fields)) or "none"
        wrong = "both are there" if given else f"found: {found}"
        raise ValueError(f"{place}: expected one of the fields 'prompt' and 'messages'; {wrong}")
    prompt = fields[given[0]]
    for name in ("prompt", "messages"):
        fields.pop(name, None)
    strength, seed = fields.pop("strength", None), fields.pop("seed", None)
    return PromptRow(
        _checked_prompt(prompt, f"{place}: {given[0]}"),
        place,
        None if strength is None else checked_strength(strength, f"{place}: strength"),
        None if seed is None else checked_seed(seed, f"{place}: seed"),
        fields,
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


def _checked_prompt(prompt: Any, what: str) -> Prompt:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError(f"{what}: expected some text, got an empty prompt")
        return prompt
    if not isinstance(prompt, list) or not prompt:
        raise ValueError(f"{what}: expected text or a list of messages, got {prompt!r}")
    messages = []
    for i, message in enumerate(prompt):
        ok = isinstance(message, Mapping) and isinstance(message.get("role"), str)
        if not ok or message.get("content") is None:
            raise ValueError(
                f"{what}: message {i} is not an object with 'role' and 'content': {message!r}"
            )
        messages.append({k: v for k, v in message.items() if v is not None})
    if all(m["role"] == "system" for m in messages):
        raise ValueError(f"{what}: expected a user's message, got only the system's")
    return messages


def prompt_text(
    tokenizer: Any, prompt: Prompt, system: str | None = None, chat: bool = True
) -> str:
    """What the model reads: the chat template's text, or the contents joined by line breaks.

    A system message of the prompt's own goes before ``system``. If the last message is the
    assistant's, the answer goes on from it.

    Raises:
        ValueError: the chat template refuses the messages.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    if not chat or tokenizer.chat_template is None:
        return "\n".join(str(message["content"]) for message in messages)
    from jinja2 import TemplateError

    unfinished = messages[-1]["role"] == "assistant"
    try:
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=not unfinished,
            continue_final_message=unfinished,
        )
    except TemplateError as error:
        raise ValueError(f"the chat template refuses the messages: {error}") from None


def prompt_ids(
    tokenizer: Any, prompt: Prompt, system: str | None = None, chat: bool = True
) -> list[int]:
    """Token ids of one prompt, with one BOS at most. ValueError if there are none."""
    text = prompt_text(tokenizer, prompt, system, chat)
    # A template writes its own BOS.
    special = not (chat and tokenizer.chat_template is not None)
    ids = tokenizer(text, add_special_tokens=special)["input_ids"]
    if not ids:
        raise ValueError("the prompt has no tokens")
    return list(ids)


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
