"""Answers as text: a batch of prompts through ``model.generate``, and showing what came."""

import shutil
import sys
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TextIO

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from qadapter.ops.philox import philox_4x32
from qadapter.text.prompts import left_padded
from qadapter.text.tokenization import eos_token_ids, pad_token_id

NARROWEST = 24  # columns that would be narrower stand below each other


class Answer(NamedTuple):
    """``ids`` are what was drawn, the end token included; ``finish_reason`` is eos, stop, length or
    interrupted; ``mean_logprob`` is over the drawn tokens."""

    text: str
    ids: list[int]
    finish_reason: str
    mean_logprob: float

    @property
    def tokens(self) -> int:
        return len(self.ids)


def derived_seed(seed: int, index: int) -> int:
    """Seed number ``index`` of a seed: 53 bits, which JSON readers of every language hold."""
    w0, w1, _, _ = philox_4x32(torch.tensor([seed]), torch.tensor([index]))
    return (int(w0) << 21) | (int(w1) >> 11)


class _Stops(StoppingCriteria):
    """Ends a row where its answer, and not the prompt, contains a stop string; notes where."""

    def __init__(
        self, tokenizer: Any, prompt_width: int, rows: int, stop: Sequence[str], halt: Any
    ) -> None:
        self.tokenizer, self.prompt_width = tokenizer, prompt_width
        self.stop, self.halt = stop, halt
        self.ends: list[int | None] = [None] * rows
        self.halted = False
        # Every token but special ones has a byte at least; a few more for characters cut in two.
        self.window = max((len(s.encode()) for s in stop), default=0) + 8

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        new = input_ids.shape[1] - self.prompt_width
        self.halted = self.halted or (self.halt is not None and self.halt())
        if self.stop and not self.halted:
            tail = input_ids[:, self.prompt_width :][:, -self.window :].tolist()
            for row, ids in enumerate(tail):
                if self.ends[row] is None and _first(self.tokenizer.decode(ids), self.stop) >= 0:
                    self.ends[row] = new
        done = [self.halted or end is not None for end in self.ends]
        return torch.tensor(done, device=input_ids.device)


def _first(text: str, stop: Sequence[str]) -> int:
    """Where the first of the stop strings begins in the text; -1 without any."""
    return min((at for at in (text.find(s) for s in stop) if at >= 0), default=-1)


def answer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stop: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    halt: Callable[[], bool] | None = None,
    **generate_arguments: Any,
) -> list[Answer]:
    """One answer to each prompt (token ids).

    A stop string ends an answer and is not part of its text. ``halt`` is asked after every token
    whether to stop all. ``seeds`` are one a prompt. Everything else goes to ``model.generate``.
    """
    pad, eos = pad_token_id(tokenizer, model), eos_token_ids(model, tokenizer)
    inputs = left_padded(prompts, pad, model.device)
    width = inputs["input_ids"].shape[1]
    stops = _Stops(tokenizer, width, len(prompts), stop, halt)
    if stop or halt:
        generate_arguments["stopping_criteria"] = StoppingCriteriaList([stops])
    if seeds is not None:
        generate_arguments["seed"] = torch.tensor(list(seeds), device=model.device)
    if eos:
        generate_arguments["eos_token_id"] = eos
    output = model.generate(
        **inputs,
        pad_token_id=pad,
        return_dict_in_generate=True,
        output_logprobs=True,
        base_settings=False,  # answers are what the arguments say
        **generate_arguments,
    )
    rows = output.sequences[:, width:].tolist()
    answers = []
    for row, (ids, logprobs) in enumerate(zip(rows, output.logprobs.tolist(), strict=True)):
        ends, count, reason = stops.ends[row], len(ids), "length"
        if stops.halted:
            reason = "interrupted"
        at = next((i for i, token in enumerate(ids) if token in eos), None)
        if at is not None:
            count, reason = at + 1, "eos"
        if ends is not None and (at is None or ends <= at):
            count, reason = ends, "stop"
        text = tokenizer.decode(ids[:count], skip_special_tokens=True)
        cut = _first(text, stop)
        mean = sum(logprobs[:count]) / count
        answers.append(Answer(text[:cut] if cut >= 0 else text, ids[:count], reason, mean))
    return answers


class Printer(TextStreamer):
    """Prints one answer as it comes, and holds back what may be the beginning of a stop string."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), file: TextIO | None = None):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stop, self.file = stop, file or sys.stdout
        self.held, self.stopped = "", False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        shown = ""
        if not self.stopped:
            self.held += text
            at = _first(self.held, self.stop)
            self.stopped = at >= 0
            keep = 0 if self.stopped or stream_end else self._overlap()
            until = at if self.stopped else len(self.held) - keep
            shown, self.held = self.held[:until], self.held[until:]
        print(shown, end="\n" if stream_end else "", flush=True, file=self.file)

    def _overlap(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        longest = max((len(s) - 1 for s in self.stop), default=0)
        for length in range(min(longest, len(self.held)), 0, -1):
            if any(s.startswith(self.held[-length:]) for s in self.stop):
                return length
        return 0


def side_by_side(titles: Sequence[str], texts: Sequence[str], width: int | None = None) -> str:
    """Texts in columns that fit ``width`` (default, the terminal); below each other if too narrow.

    Measured in terminal cells: East Asian wide characters take two.
    """
    width = width or shutil.get_terminal_size((100, 24)).columns
    column = (width - 3 * (len(texts) - 1)) // len(texts)
    if column < NARROWEST:
        return "\n\n".join(
            "\n".join([f"[{title}]", *_wrap(text, width)])
            for title, text in zip(titles, texts, strict=True)
        )
    columns = [
        [*_wrap(title, column), "-" * column, *_wrap(text, column)]
        for title, text in zip(titles, texts, strict=True)
    ]
    height = max(map(len, columns))
    for lines in columns:
        lines += [""] * (height - len(lines))
    return "\n".join(
        " | ".join(line + " " * (column - _cells(line)) for line in lines).rstrip()
        for lines in zip(*columns, strict=True)
    )


def _wrap(text: str, width: int) -> list[str]:
    lines = []
    for paragraph in text.strip().expandtabs(4).splitlines() or [""]:
        line = paragraph[: len(paragraph) - len(paragraph.lstrip())][: width // 2]
        empty = True
        for word in paragraph.split():
            if not empty and _cells(line) + 1 + _cells(word) > width:
                lines.append(line)
                line, empty = "", True
            line += word if empty else " " + word
            empty = False
            while _cells(line) > width:
                cut = _fitting(line, width)
                lines.append(line[:cut])
                line = line[cut:]
        lines.append(line)
    return lines


def _fitting(text: str, width: int) -> int:
    """How many characters fit, one at least."""
    cells = 0
    for i, character in enumerate(text):
        cells += _cells(character)
        if cells > width:
            return max(1, i)
    return len(text)


def _cells(text: str) -> int:
    return sum(
        0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )
