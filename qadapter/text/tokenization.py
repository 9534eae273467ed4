"""One preference pair, from text or messages to token ids.

Both responses of a pair follow exactly the same prompt ids, there is one BOS at most, and a
response ends with one end-of-sequence id or is marked as truncated.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
_warned: set[str] = set()


class PromptTooLongError(ValueError):
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
            both begin with). Optional: ``tools`` and ``chat_template_kwargs``, handed to the chat
            template.
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
            prompt.
    """
    where = "the example" if index is None else f"row {index}"
    eos = _eos_ids(tokenizer, eos_token_ids)
    if all(example.get(column) is not None for column in TOKEN_COLUMNS):
        prompt_ids = list(example["prompt_ids"])
        whole = {c: prompt_ids + list(example[f"{c}_ids"]) for c in ("chosen", "rejected")}
    else:
        prompt, chosen, rejected = _split_prompt(example, where)
        prompt_ids, whole = _encode(
            example, prompt, {"chosen": chosen, "rejected": rejected}, tokenizer, eos
        )
    if not prompt_ids:
        raise ValueError(
            f"{where}: the prompt has no token of its own (empty, or merged with the response), "
            "so there is no first state"
        )
    if len(prompt_ids) >= max_length:
        longest = max(len(ids) for ids in whole.values())
        raise PromptTooLongError(
            f"{where}: the prompt has {len(prompt_ids)} tokens (the whole sequence {longest}), "
            f"which leaves no room for a response within max_length={max_length}; "
            "prepare_dataset(..., drop_long_prompts=True) drops such rows"
        )
    result: dict[str, Any] = {"prompt_ids": prompt_ids}
    for column, ids in whole.items():
        response = _end_response(ids[len(prompt_ids) :], tokenizer, eos)
        if len(response) < 2:
            raise ValueError(
                f"{where}: '{column}' is empty (no token before the end of the sequence)"
            )
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


def _split_prompt(example: Mapping[str, Any], where: str) -> tuple[Any, Any, Any]:
    """(prompt, chosen, rejected), all of them strings or all of them message lists."""
    check_columns(list(example), where)
    parts: dict[str, Any] = {c: example.get(c) for c in ("prompt", "chosen", "rejected")}
    kinds = {
        column: _kind(value, column, where)
        for column, value in parts.items()
        if column != "prompt" or value is not None
    }
    if len(set(kinds.values())) > 1:
        found = ", ".join(f"'{column}' is a {kind}" for column, kind in kinds.items())
        raise ValueError(
            f"{where}: mixed formats: {found}. Give all as strings or all as message lists "
            "(if 'chosen' and 'rejected' hold the whole conversation, remove the 'prompt' column)"
        )
    for column in ("chosen", "rejected"):
        if _is_empty(parts[column]):
            raise ValueError(f"{where}: '{column}' is empty")
    if parts["prompt"] is None:
        parts = _extract_prompt(parts["chosen"], parts["rejected"], where)
        for column in ("chosen", "rejected"):
            if _is_empty(parts[column]):
                raise ValueError(f"{where}: '{column}' is empty after the prompt that both share")
    if kinds["chosen"] == "message list":
        if not parts["prompt"]:
            raise ValueError(
                f"{where}: 'chosen' and 'rejected' share no leading message, so there is no prompt"
            )
        for column in ("chosen", "rejected"):
            role = parts[column][0]["role"]
            if role not in ("assistant", "tool"):
                raise ValueError(
                    f"{where}: the response in '{column}' begins with a message of role '{role}'; "
                    "both responses must follow the same prompt, and an explicit prompt must not "
                    "be repeated in them"
                )
    return parts["prompt"], parts["chosen"], parts["rejected"]


def _kind(value: Any, column: str, where: str) -> str:
    if isinstance(value, str):
        return "string"
    if isinstance(value, list) and all(isinstance(m, Mapping) and "role" in m for m in value):
        return "message list"
    raise ValueError(
        f"{where}: '{column}' is neither a string nor a list of messages with a role, but "
        f"{value!r:.80}"
    )


def _is_empty(value: Any) -> bool:
    if isinstance(value, str):
        return not value
    return not any(m.get("content") or m.get("tool_calls") for m in value)


def _extract_prompt(chosen: Any, rejected: Any, where: str) -> dict[str, Any]:
    """Split off the leading messages or characters that both share (a space stays outside)."""
    # At least one character or message is left for each response.
    limit = min(len(chosen), len(rejected)) - 1
    n = 0
    while n < limit and chosen[n] == rejected[n]:
        n += 1
    if isinstance(chosen, str):
        if chosen == rejected:
            raise ValueError(
                f"{where}: 'chosen' and 'rejected' are the same text: no prompt to be told from it"
            )
        if n and chosen[n - 1] == " ":
            n -= 1
    return {"prompt": chosen[:n], "chosen": chosen[n:], "rejected": rejected[n:]}


def _encode(
    example: Mapping[str, Any],
    prompt: Any,
    responses: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    eos: list[int],
) -> tuple[list[int], dict[str, list[int]]]:
    if isinstance(prompt, str):
        own = _one_bos(tokenizer(prompt).input_ids, tokenizer)
        if own and own[-1] in eos and not prompt.endswith(_text(tokenizer, own[-1])):
            own = own[:-1]  # a tokenizer that closes every text by itself
        whole = {
            c: _one_bos(tokenizer(prompt + text).input_ids, tokenizer)
            for c, text in responses.items()
        }
    else:
        tools = example.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        options = {
            "tools": _without_none(tools) or None,
            **(_without_none(example.get("chat_template_kwargs")) or {}),
        }
        prompt = [_clean_message(m) for m in prompt]
        going_on = (
            prompt[-1]["role"] == "assistant"
        )  # the responses continue a message that the prompt began
        own = _template(
            tokenizer,
            prompt,
            options,
            add_generation_prompt=not going_on,
            continue_final_message=going_on,
        )
        whole = {
            c: _template(tokenizer, prompt + [_clean_message(m) for m in messages], options)
            for c, messages in responses.items()
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


def _template(
    tokenizer: PreTrainedTokenizerBase, messages: list, options: dict, **kwargs: Any
) -> list[int]:
    ids = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=False, **options, **kwargs
    )
    return _one_bos(ids, tokenizer)


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


def _text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return str(tokenizer.decode([token]))


def _clean_message(message: Mapping[str, Any]) -> dict[str, Any]:
    # Tables fill keys that a message lacks with None; templates ask whether a key is there.
    return {k: _without_none(v) for k, v in message.items() if v is not None or k == "content"}


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=3)


def check_columns(columns: Sequence[str], place: str) -> None:
    if set(TOKEN_COLUMNS) <= set(columns):
        return
    missing = [column for column in ("chosen", "rejected") if column not in columns]
    if missing:
        raise ValueError(
            f"{place}: missing column(s) {', '.join(missing)}; "
            f"found: {', '.join(columns) or 'none'}. "
            "Preference data needs 'chosen' and 'rejected'; 'prompt' is optional"
        )


def eos_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every id that ends a response: the tokenizer's and those of the generation config."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in (*ids, tokenizer.eos_token_id) if i is not None})


def pad_token_id(tokenizer: Any, model: Any = None) -> int:
    """An id to pad with; it is masked everywhere, so any will do that the model's embedding has.

    A tokenizer may have got a padding token of its own while the embedding was not enlarged.
    """
    known = None if model is None else model.hf_model.get_input_embeddings().weight.shape[0]
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None and (known is None or candidate < known):
            return candidate
    return 0
