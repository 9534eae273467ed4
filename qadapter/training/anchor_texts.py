"""Anchor texts: what the frozen base says by itself, for keeping it as it is.

    chat model    question ~ base( . | the template's user header), answer ~ base( . | question)
    plain model   text ~ base( . | BOS)
    prompts given answer ~ base( . | prompt)

all at temperature 1 without top-k or top-p: only at samples of the base itself does its likelihood
have no gradient, and only they show the states in which the base will be used. Letting a chat
model ask the question is Magpie (arXiv 2406.08464).
"""

import hashlib
import json
import math
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qadapter.ops import checks
from qadapter.text.answers import Answer, answer, derived_seed
from qadapter.text.messages import is_unfinished, message_list, render
from qadapter.text.prompts import (
    PROMPT_FIELDS,
    checked_seed,
    prompt_ids,
    prompt_row,
    prompt_text,
)
from qadapter.text.tokenization import eos_token_ids
from qadapter.training.anchor_files import append, check_same, read_anchors

BATCH_SIZE = 128
TRIES = 4  # draws for each text that is wanted, at most
MARKER = "qadapter-content-goes-here"


class Turns(NamedTuple):
    """What a chat template writes around a message: before the user's content, and behind the
    user's and the assistant's (None where it is nothing but white space)."""

    user_header: str
    user_end: str | None
    answer_end: str | None


def chat_turns(tokenizer: Any) -> Turns | None:
    """The turns of the tokenizer's chat template; None where it has no user header to be found."""
    if tokenizer.chat_template is None:
        return None
    user = {"role": "user", "content": MARKER}
    try:
        header, found, end = render(tokenizer, [user], tokenize=False).partition(MARKER)
        # A template that writes nothing after a question ends it with the answer's header.
        asked = render(tokenizer, [user], tokenize=False, add_generation_prompt=True)
    except ValueError:
        return None
    # A lone space before the first word is a part of that word in most vocabularies.
    header = header.rstrip(" ")
    if not (found and header):
        return None
    end = end.strip() or asked.partition(MARKER)[2].strip()
    said = [{**user, "content": "Hello"}, {"role": "assistant", "content": MARKER}]
    try:
        answer_end = render(tokenizer, said, tokenize=False).partition(MARKER)[2].strip()
    except ValueError:
        answer_end = ""
    return Turns(header, end or None, answer_end or None)


def make_anchors(
    model: Any,
    tokenizer: Any,
    count: int = 256,
    *,
    max_new_tokens: int = 96,
    max_prompt_tokens: int = 64,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    path: str | Path | None = None,
    prompts: Sequence[Any] | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Texts sampled from the base of a `QAdapterModel`; its adapter takes no part.

    Args:
        model: a `QAdapterModel`.
        tokenizer: of its base. With a chat template, the base asks a question and answers it.
        count: how many different ones; with ``prompts``, at most how many of them.
        max_new_tokens: longest answer, or text of a plain model.
        max_prompt_tokens: longest question.
        seed: of all draws: the same arguments give the same texts, also with interruptions.
        batch_size: rows that are sampled at a time. More is faster, and takes memory for
            keys and values. Texts do not depend on it but for rounding.
        path: a file to which every batch is appended when it is made (JSON lines). What is there
            already is not made again.
        prompts: texts or lists of messages that the base answers, instead of asking by itself, or
            objects with ``prompt`` and ``tools`` or ``chat_template_kwargs`` for the chat template;
            repeated ones count once. Answers that are empty are left out.
        progress: whether to show a bar.

    Returns:
        ``count`` rows, JSON-able, in the order of their draws: ``messages`` (the question and the
        answer), or ``text`` of a plain model; what the prompt's template was given; ``truncated``
        (whether the end was cut, so that it is none); ``draw`` (the number of the draw: others were
        duplicates or empty);
        what they depend on: ``source``, ``seed``, ``max_new_tokens``, ``max_prompt_tokens``,
        ``dtype`` and ``base``, the `fingerprint` of the base.
        Fewer, with a warning, where the base repeats itself or says nothing in 4 * count draws.

    Raises:
        ValueError: an argument that does not fit; a file of another base or of other settings;
            a base that says nothing at all; a tokenizer with neither a chat template nor BOS or
            EOS.
    """
    for name, value in (
        ("count", count),
        ("max_new_tokens", max_new_tokens),
        ("max_prompt_tokens", max_prompt_tokens),
        ("batch_size", batch_size),
    ):
        checks.whole(name, value)
    seed = checked_seed(seed, "seed")
    source = _source(tokenizer, prompts)
    maker = _Maker(model, tokenizer, source, seed, max_new_tokens, max_prompt_tokens)
    if prompts is not None:
        maker.take_prompts(prompts, count)
        count = len(maker.prompts)
    rows = [] if path is None else read_anchors(path)
    for number, row in enumerate(rows, start=1):
        check_same(row, maker.settings, f"{path}, line {number}")

    from tqdm.auto import tqdm

    with tqdm(
        total=count, initial=min(len(rows), count), desc="Anchors", disable=not progress
    ) as bar:
        for start, size in _blocks(rows, count, batch_size, prompts is not None):
            made = maker.block(start, size, rows, count)
            if made and path is not None:
                append(path, made)
            rows += made
            bar.update(len(made))
    rows = rows[:count]
    _judge(rows, count, maker)
    return rows


def _source(tokenizer: Any, prompts: Sequence[Any] | None) -> str:
    if prompts is not None:
        content = json.dumps(list(prompts), sort_keys=True, default=str)
        return f"prompts {hashlib.blake2b(content.encode(), digest_size=8).hexdigest()}"
    return "start of text" if tokenizer.chat_template is None else "user header"


def _blocks(
    rows: list[dict[str, Any]], count: int, batch_size: int, given: bool
) -> Iterator[tuple[int, int]]:
    """First draw and size of one batch after another, until ``rows`` has ``count`` of them.

    They follow from ``rows`` alone, so that a run that goes on has the batches, and by that the
    rounding, of one that was not interrupted. The batch in which it stopped is made again, but for
    the rows that are there.
    """
    last = rows[-1]["draw"] if rows else -1
    start = 0
    limit = count if given else TRIES * count
    while start < limit:
        have = sum(row["draw"] < start for row in rows)
        if len(rows) >= count:
            return
        wanted = limit - start if given else count - have
        if have and not given:
            # As many of them will be left out as were so far; small batches are slow.
            wanted = math.ceil(wanted * start / have)
        # Even shares, not full batches and a small one.
        size = math.ceil(wanted / math.ceil(wanted / batch_size))
        size = min(size, limit - start)
        if start + size > last + 1:
            yield start, size
        start += size


class _Asked(NamedTuple):
    """A prompt, its ids, and what its chat template was given (`PromptRow.template`)."""

    prompt: Any
    ids: list[int]
    template: dict[str, Any]


class _Maker:
    """The base with the settings of a run; makes rows batch by batch."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        source: str,
        seed: int,
        max_new_tokens: int,
        max_prompt_tokens: int,
    ) -> None:
        self.model, self.tokenizer, self.seed = model, tokenizer, seed
        self.max_new_tokens, self.max_prompt_tokens = max_new_tokens, max_prompt_tokens
        self.prompts: list[_Asked] = []
        self.turns = chat_turns(tokenizer)
        self.duplicates = self.empty = 0
        if source == "user header" and self.turns is None:
            warnings.warn(
                "the chat template shows no user header (it refuses one message of the user's, or "
                "changes its text): the base is sampled from the start of a text instead",
                stacklevel=3,
            )
            source = "start of text"
        self.chats = source == "user header"
        self.first: list[int] = []
        if self.chats:
            assert self.turns is not None
            ids = tokenizer(self.turns.user_header, add_special_tokens=False)["input_ids"]
            self.first = list(ids)
        elif source == "start of text":
            self.first = [self._start_of_text()]
        longest = len(self.first) + max_new_tokens + (max_prompt_tokens if self.chats else 0)
        self._fits(longest, "the template's header, max_prompt_tokens and max_new_tokens together")
        self.settings = {
            "source": source,
            "seed": seed,
            "max_new_tokens": max_new_tokens,
            "max_prompt_tokens": max_prompt_tokens,
            "dtype": str(model.hf_model.dtype).removeprefix("torch."),
            "base": model.base_fingerprint,
        }

    def _start_of_text(self) -> int:
        for candidate in (
            self.tokenizer.bos_token_id,
            self.tokenizer.eos_token_id,
            *eos_token_ids(self.model, self.tokenizer),
        ):
            if candidate is not None:
                return int(candidate)
        raise ValueError(
            "tokenizer: expected a chat template, a bos_token or an eos_token to sample from; it "
            "has none (prompts= lets the base answer given ones)"
        )

    def _fits(self, tokens: int, what: str) -> None:
        config = self.model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None and tokens > limit:
            raise ValueError(
                f"{what} have {tokens} tokens, more than the model's {limit} positions"
            )

    def take_prompts(self, prompts: Sequence[Any], count: int) -> None:
        """The first ``count`` different ones, checked: what does not fit shows at once."""
        if isinstance(prompts, str) or not len(prompts):
            raise ValueError(f"prompts: expected a list of one or more, got {prompts!r:.80}")
        seen: dict[str, _Asked] = {}
        for number, prompt in enumerate(prompts):
            place = f"prompts[{number}]"
            is_row = isinstance(prompt, Mapping) and any(name in prompt for name in PROMPT_FIELDS)
            row = prompt_row(prompt if is_row else {"prompt": prompt}, place)
            try:
                key = _normal(prompt_text(self.tokenizer, row.prompt, template=row.template))
                ids = prompt_ids(self.tokenizer, row.prompt, template=row.template)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None
            if key in seen:
                self.duplicates += 1
            elif len(seen) < count:
                self._fits(len(ids) + self.max_new_tokens, f"{place} and max_new_tokens")
                seen[key] = _Asked(row.prompt, ids, row.template)
        self.prompts = list(seen.values())

    def block(
        self, start: int, size: int, rows: Sequence[dict[str, Any]], count: int
    ) -> list[dict[str, Any]]:
        """The rows of draws start to start + size, without those that ``rows`` has already."""
        draws = list(range(start, start + size))
        there = {row["draw"]: row for row in rows}
        if self.prompts:
            contents = self._answers(draws, [self.prompts[draw] for draw in draws])
        elif self.chats:
            room = count - sum(draw < start for draw in there)
            questions = dict(list(self._questions(draws, there).items())[:room])
            contents = self._answers(list(questions), list(questions.values()))
        else:
            contents = self._texts(draws, there)
        return [
            {**content, "draw": draw, **self.settings}
            for draw, content in contents.items()
            if draw not in there
        ]

    def _sampled(
        self, draws: Sequence[int], ids: Sequence[Sequence[int]], stop: str | None, part: int
    ) -> list[Answer]:
        """What the base says after ``ids``; ``part`` is 0 for questions, 1 for what follows."""
        end_ids = {self.tokenizer.decode([i]) for i in eos_token_ids(self.model, self.tokenizer)}
        return answer(
            self.model,
            self.tokenizer,
            ids,
            stop=[] if stop is None or stop in end_ids else [stop],
            seeds=[derived_seed(self.seed, 2 * draw + part) for draw in draws],
            strength=0,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self.max_prompt_tokens if part == 0 else self.max_new_tokens,
        )

    def _questions(self, draws: Sequence[int], there: dict[int, Any]) -> dict[int, _Asked]:
        """Draw to prompt, of questions that are new, or of rows that are ``there`` and were of this
        batch."""
        assert self.turns is not None
        earlier = {_normal(row["messages"][0]["content"]) for row in there.values()}
        made = self._sampled(draws, [self.first] * len(draws), self.turns.user_end, 0)
        questions: dict[int, _Asked] = {}
        for draw, one in zip(draws, made, strict=True):
            if draw in there:
                messages = there[draw]["messages"][:1]
            elif self._is_new(text := _whole_characters(one).strip(), earlier):
                messages = [{"role": "user", "content": text}]
            else:
                continue
            questions[draw] = _Asked(messages, prompt_ids(self.tokenizer, messages), {})
        return questions

    def _answers(
        self, draws: Sequence[int], prompts: Sequence[_Asked]
    ) -> dict[int, dict[str, Any]]:
        """Draw to the content of its row; empty answers are left out."""
        if not draws:
            return {}
        end = self.turns.answer_end if self.turns is not None else None
        made = self._sampled(draws, [asked.ids for asked in prompts], end, 1)
        contents: dict[int, dict[str, Any]] = {}
        for draw, one, asked in zip(draws, made, prompts, strict=True):
            text = _whole_characters(one)
            if not text.strip():
                self.empty += 1
                continue
            cut = {"truncated": one.finish_reason == "length"}
            contents[draw] = {**self._joined(asked.prompt, text), **asked.template, **cut}
        return contents

    def _joined(self, prompt: Any, text: str) -> dict[str, Any]:
        if self.tokenizer.chat_template is None:
            return {"text": prompt_text(self.tokenizer, prompt) + text}
        asked = {"role": "user", "content": prompt} if isinstance(prompt, str) else prompt
        messages = message_list(asked, "prompts", "messages")
        if is_unfinished(messages):
            last = messages[-1]
            return {"messages": [*messages[:-1], {**last, "content": last["content"] + text}]}
        return {"messages": [*messages, {"role": "assistant", "content": text}]}

    def _texts(self, draws: Sequence[int], there: dict[int, Any]) -> dict[int, dict[str, Any]]:
        earlier = {_normal(row["text"]) for row in there.values()}
        made = self._sampled(draws, [self.first] * len(draws), None, 1)
        contents: dict[int, dict[str, Any]] = {}
        for draw, one in zip(draws, made, strict=True):
            text = _whole_characters(one)
            if draw not in there and self._is_new(text, earlier):
                contents[draw] = {"text": text, "truncated": one.finish_reason == "length"}
        return contents

    def _is_new(self, text: str, earlier: set[str]) -> bool:
        """Whether ``earlier`` does not have it yet; counts why not."""
        key = _normal(text)
        if not key:
            self.empty += 1
        elif key in earlier:
            self.duplicates += 1
        else:
            earlier.add(key)
            return True
        return False


def _normal(text: str) -> str:
    """Texts that differ in letters' case or form or in white space alone are one."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _whole_characters(one: Answer) -> str:
    # A cut in the middle of a character leaves replacement characters.
    return one.text.rstrip("\ufffd") if one.finish_reason == "length" else one.text


def _judge(rows: Sequence[Any], count: int, maker: _Maker) -> None:
    if len(rows) >= count:
        return
    why = f"{maker.empty} were empty, {maker.duplicates} duplicates"
    if maker.prompts:
        what, draws = "answers", f"{count} prompts"
    else:
        what, draws = "texts", f"{TRIES * count} draws"
    if not rows:
        raise ValueError(f"anchors: the base gave no {what} in {draws} ({why} in this run)")
    warnings.warn(
        f"anchors: the base gave {len(rows)} of {count} {what} in {draws} ({why} in this run)",
        stacklevel=3,
    )
