"""Chat messages: from the ways in which they are written to role and text, and into a template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qadapter.text.bad_rows import RowError

SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "observation": "tool",
}
"""ShareGPT's ``from`` and the role that it is."""


def checked_text(text: str, place: str, what: str) -> str:
    """The text, if it can be written as UTF-8: half of a surrogate pair is no character."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RowError(
                place,
                f"{what} has half of a surrogate pair, {text[error.start]!a}, at character "
                f"{error.start}: text that was cut or decoded wrongly; mend or remove it",
                f"{what} has half of a surrogate pair",
            ) from None
    return text


def message_list(value: Any, place: str, what: str) -> list[dict[str, Any]]:
    """Messages with ``role`` and a text as ``content``.

    Takes a list, or one message by itself; ``role`` and ``content`` or ShareGPT's ``from`` and
    ``value``; content as text or as a list of text parts, which are joined. A message that calls
    tools may lack content.

    Raises:
        RowError: anything else, with the number of the message.
    """
    messages = [value] if isinstance(value, Mapping) else value
    if not isinstance(messages, list | tuple) or not messages:
        raise RowError(
            place,
            f"{what}: expected text or a list of messages, got {value!r:.80}",
            f"{what}: expected text or a list of messages",
        )
    return [_message(message, place, f"{what}: message {i}") for i, message in enumerate(messages)]


def _message(message: Any, place: str, what: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _not_a_message(message, place, what)
    # Tables fill with None the keys that a message lacks; templates ask whether a key is there.
    given = {key: without_none(value) for key, value in message.items() if value is not None}
    if "role" not in given and isinstance(given.get("from"), str):
        speaker = given.pop("from")
        if speaker.lower() not in SPEAKERS:
            raise RowError(
                place,
                f"{what} is from {speaker!r}; known are {', '.join(SPEAKERS)}",
            )
        given = {"role": SPEAKERS[speaker.lower()], "content": given.pop("value", None), **given}
        if given["content"] is None:
            del given["content"]
    if not isinstance(given.get("role"), str):
        raise _not_a_message(message, place, what)
    content = given.get("content")
    if content is None and (given.get("tool_calls") or given.get("function_call")):
        return {**given, "content": None}
    if isinstance(content, list):
        content = "".join(_part(part, place, what) for part in content)
    if not isinstance(content, str):
        raise _not_a_message(message, place, what)
    return {**given, "content": checked_text(content, place, what)}


def _not_a_message(message: Any, place: str, what: str) -> RowError:
    reason = f"{what} is not an object with 'role' and 'content'"
    return RowError(place, f"{reason}: {message!r:.80}", reason)


def _part(part: Any, place: str, what: str) -> str:
    """The text of a part; images, sound and whatever else there is are refused by name."""
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    text = part.get("text") if isinstance(part, Mapping) else None
    if kind not in (None, "text", "input_text", "output_text") or not isinstance(text, str):
        raise RowError(
            place, f"{what} has a part of type {kind!r} in its content; only text can be used"
        )
    return text


def without_none(value: Any) -> Any:
    """Without what is None in it, at every depth of its objects."""
    if isinstance(value, Mapping):
        return {k: without_none(v) for k, v in value.items() if v is not None}
    return [without_none(v) for v in value] if isinstance(value, list) else value


TEMPLATE_FIELDS = ("tools", "chat_template_kwargs")
"""What of a row is handed to the chat template."""

_OURS = {
    *("conversation", "messages", "tools", "chat_template", "tokenize", "return_dict"),
    *("add_generation_prompt", "continue_final_message", "padding", "truncation", "max_length"),
    *("return_tensors", "return_assistant_tokens_mask", "tokenizer_kwargs"),
}


def template_fields(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    """``tools``, a list, and ``chat_template_kwargs``, an object, of a row that has them; each may
    be JSON as text, as all cells of a CSV file are. RowError for anything else."""
    found: dict[str, Any] = {}
    for name, kind, what in zip(
        TEMPLATE_FIELDS, (list, dict), ("a list", "an object"), strict=True
    ):
        value = row.get(name)
        if isinstance(value, str) and value:
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise RowError(
                    place, f"'{name}' is not valid JSON: {error}", f"'{name}' is not valid JSON"
                ) from None
        value = without_none(value)
        if not value:
            continue
        if not isinstance(value, kind):
            reason = f"'{name}' is not {what}"
            raise RowError(place, f"{reason}, but {value!r:.80}", reason)
        found[name] = value
    if reserved := _OURS & found.get("chat_template_kwargs", {}).keys():
        reason = f"'chat_template_kwargs' sets {', '.join(sorted(reserved))}"
        raise RowError(place, f"{reason}, which follows from the row itself", reason)
    return found


def template_options(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`template_fields` as keywords of `render`."""
    tools = fields.get("tools")
    return {**({"tools": tools} if tools else {}), **fields.get("chat_template_kwargs", {})}


def is_unfinished(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last message is the beginning of an answer, which goes on from there."""
    last = messages[-1]
    return last["role"] == "assistant" and bool(last.get("content")) and not last.get("tool_calls")


def render(tokenizer: Any, messages: list[dict[str, Any]], **arguments: Any) -> Any:
    """``apply_chat_template`` of messages as `message_list` gives them.

    Raises:
        ValueError: the template refuses them, or there is none.
    """
    from jinja2 import TemplateError

    def apply(content: str | None) -> Any:
        filled = [m if m["content"] is not None else {**m, "content": content} for m in messages]
        return tokenizer.apply_chat_template(filled, **arguments)

    try:
        if all(m["content"] is not None for m in messages) or not _writes_none(apply):
            return apply(None)
        return apply("")
    # A template is a program: it fails with whatever its operations raise.
    except (TemplateError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"the chat template refuses the messages: {error}") from error


def _writes_none(apply: Any) -> bool:
    """Whether a template writes a missing content as the word None, or cannot do without text.

    Some templates ask whether content is None, so that it must not be "" for all of them.
    """
    from jinja2 import UndefinedError

    try:
        return bool(apply(None) == apply("None"))
    except (TypeError, UndefinedError):
        return True
