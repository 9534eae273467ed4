"""One preference pair, from text or messages to token ids.

Both responses of a pair follow exactly the same prompt ids, there is one BOS at most, and a
response ends with one end-of-sequence id or is marked as truncated.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from qadapter.text.bad_rows import RowError
from qadapter.text.forms import TOKEN_COLUMNS, pair
from qadapter.text.messages import is_unfinished, render, template_fields, template_options

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_warned: set[str] = set()


class PromptTooLongError(RowError):
    """The prompt leaves no room for a response within ``max_length``."""


def tokenize_preference(
    example: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 1024,
    eos_token_ids: int | Iterable[int] | None = None,
    index: int | None = None,
) -> dict[str, Any]:
    """Turn one preference pair into token ids.

    Args:
        example: ``chosen`` and ``rejected``, both strings or both lists of messages (``{"role",
            "content"}``), with an explicit ``prompt`` of the same kind or an implicit one (what
            both begin with), or another form that `qadapter.text.forms` knows. Optional: ``tools``
            and ``chat_template_kwargs``, handed to the chat template. Where the prompt ends in
            a message of the assistant's, the responses go on with it.
        tokenizer: its chat template is used for messages.
        max_length: longest sequence (prompt and response). Longer ones lose their end.
        eos_token_ids: the ids that end a response; default is the tokenizer's. Models with several
            (see ``generation_config.eos_token_id``) want all of them here.
        index: number of the row, for messages.

    Returns:
        ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` (lists of int) and ``chosen_truncated``,
        ``rejected_truncated`` (bool). The prompt is the common token prefix of the prompt itself,
        prompt + chosen and prompt + rejected: both responses follow exactly the same ids, also
        where the tokenizer merges characters across the border. A response ends with one
        end-of-sequence id; what a chat template writes after it is cut off. A truncated response
        has none.

    Raises:
        PromptTooLongError: the prompt has ``max_length`` tokens or more.
        ValueError: an empty response, strings and messages mixed, pairs that do not share their
            prompt, messages that the chat template refuses.
    """
    where = "the example" if index is None else f"row {index}"
    eos = _eos_ids(tokenizer, eos_token_ids)
    if all(example.get(column) is not None for column in TOKEN_COLUMNS):
        prompt_ids = list(example["prompt_ids"])
        whole = {c: prompt_ids + list(example[f"{c}_ids"]) for c in ("chosen", "rejected")}
    else:
        row = pair(example, where)
        responses = {column: row[column] for column in ("chosen", "rejected")}
        prompt_ids, whole = _encode(row, row["prompt"], responses, tokenizer, eos, where)
    if not prompt_ids:
        raise RowError(
            where,
            "the prompt has no token of its own (empty, or merged with the response), "
            "so there is no first state",
        )
    if len(prompt_ids) >= max_length:
        longest = max(len(ids) for ids in whole.values())
        raise PromptTooLongError(
            where,
            f"the prompt has {len(prompt_ids)} tokens (the whole sequence {longest}), "
            f"which leaves no room for a response within max_length={max_length}; "
            "prepare_dataset(..., drop_long_prompts=True) drops such rows",
            f"the prompt leaves no room for a response within max_length={max_length}",
        )
    result: dict[str, Any] = {"prompt_ids": prompt_ids}
    for column, ids in whole.items():
        response = _end_response(ids[len(prompt_ids) :], tokenizer, eos)
        if len(response) < 2:
            raise RowError(where, f"'{column}' is empty (no token before the end of the sequence)")
        room = max_length - len(prompt_ids)
        result[f"{column}_ids"] = response[:room]
        result[f"{column}_truncated"] = len(response) > room
    return result


def _eos_ids(tokenizer: PreTrainedTokenizerBase, given: int | Iterable[int] | None) -> list[int]:
    """Ids that end a response; the first one is appended where a response has none."""
    own = tokenizer.eos_token_id
    ids = [own] if given is None else [given] if isinstance(given, int) else list(given)
    if own in ids:
        ids = [own, *(i for i in ids if i != own)]
    if not ids or None in ids:
        raise ValueError("the tokenizer has no eos_token: set one, or give eos_token_ids")
    return ids


def _encode(
    example: Mapping[str, Any],
    prompt: Any,
    responses: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    eos: list[int],
    where: str,
) -> tuple[list[int], dict[str, list[int]]]:
    if isinstance(prompt, str):
        _say_plain(tokenizer, prompt)
        own = open_text_ids(tokenizer, prompt, eos)
        whole = {
            c: _one_bos(tokenizer(prompt + text).input_ids, tokenizer)
            for c, text in responses.items()
        }
    else:
        options = template_options(template_fields(example, where))
        firsts = [messages[0] for messages in responses.values()]
        going_on = is_unfinished(prompt) and all(
            first["role"] == "assistant" and first["content"] is not None for first in firsts
        )
        answers = any(first["role"] == "assistant" for first in firsts)  # else a tool's result
        own = _template(
            tokenizer,
            prompt,
            options,
            where,
            add_generation_prompt=answers and not going_on,
            continue_final_message=going_on,
        )
        conversations = (
            _continued(prompt, responses, where)
            if going_on
            else {c: prompt + messages for c, messages in responses.items()}
        )
        whole = {
            c: _template(tokenizer, messages, options, where)
            for c, messages in conversations.items()
        }
    n = 0
    for three in zip(own, *whole.values(), strict=False):
        if len(set(three)) > 1:
            break
        n += 1
    if n < len(own):
        _warn_once(
            "The tokens of the prompt alone are not how prompt + response begins (a chat template "
            "that renders them differently, or a tokenizer that merges across the border). "
            "The common part is used as the prompt."
        )
    return own[:n], whole


def open_text_ids(
    tokenizer: PreTrainedTokenizerBase, text: str, eos: Iterable[int | None]
) -> list[int]:
    """Ids of a text that something follows: with one BOS at most, and without the end that some
    tokenizers write behind every text."""
    ids = _one_bos(tokenizer(text).input_ids, tokenizer)
    if ids and ids[-1] in eos and not text.endswith(_text(tokenizer, ids[-1])):
        ids = ids[:-1]
    return ids


def _template(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    options: dict[str, Any],
    where: str,
    **kwargs: Any,
) -> list[int]:
    try:
        ids = render(tokenizer, messages, tokenize=True, return_dict=False, **options, **kwargs)
    except ValueError as error:
        raise RowError(where, str(error)) from error
    return _one_bos(ids, tokenizer)


def _continued(
    prompt: list[dict[str, Any]], responses: dict[str, list[dict[str, Any]]], where: str
) -> dict[str, list[dict[str, Any]]]:
    """Whole conversations whose responses go on with the last message of the prompt."""
    last = prompt[-1]
    firsts = [messages[0]["content"] for messages in responses.values()]
    begun = all(first.startswith(last["content"]) for first in firsts)
    if begun or last["content"] in firsts:
        raise RowError(
            where,
            "the prompt ends in the beginning of an answer, which the responses repeat: leave it "
            "out of them, since they go on from there, or out of the prompt",
        )
    return {
        column: [
            *prompt[:-1],
            {**last, **first, "content": last["content"] + first["content"]},
            *others,
        ]
        for column, (first, *others) in responses.items()
    }


def _one_bos(ids: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # Text that already begins with the BOS (a rendered template) gets a second one from the
    # tokenizer.
    bos = tokenizer.bos_token_id
    start = 0
    while bos is not None and ids[start : start + 2] == [bos, bos]:
        start += 1
    return list(ids[start:])


def _end_response(ids: list[int], tokenizer: PreTrainedTokenizerBase, eos: list[int]) -> list[int]:
    """End a response at its end-of-sequence id: cut the template's tail behind it, or append one.

    The tail is what follows the first such id among the last ones and white space; an id of that
    kind in the middle of the text is content.
    """
    start = len(ids)
    while start and (ids[start - 1] in eos or not _text(tokenizer, ids[start - 1]).strip()):
        start -= 1
    for position in range(start, len(ids)):
        if ids[position] in eos:
            return ids[: position + 1]
    return [*ids, eos[0]]


def _say_plain(tokenizer: PreTrainedTokenizerBase, prompt: str) -> None:
    """Plain text is read as it is, whatever a chat model would make of it; and so has to be what is
    answered later."""
    message = (
        "Pairs of plain text are read as they are, without the chat template that this tokenizer "
        "has: for an adapter that answers chats give messages; one of plain text answers with "
        "qadapter generate --no-chat."
    )
    if tokenizer.chat_template is None or message in _warned:
        return
    if not any(token in prompt for token in tokenizer.all_special_tokens):  # no rendered template
        _warn_once(message)


def _text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return str(tokenizer.decode([token]))


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=3)


def eos_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every id that ends a response: the tokenizer's and those of the generation config."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in (*ids, tokenizer.eos_token_id) if i is not None})


def pad_token_id(tokenizer: Any, model: Any = None) -> int:
    """An id to pad with; it is masked everywhere, so any will do that the model's embedding has.

    A tokenizer may have got a padding token of its own while the embedding was not enlarged.
    """
    known = None if model is None else model.vocab_size
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None and (known is None or candidate < known):
            return candidate
    return 0
