"""The forms in which people write a preference pair, and what they all become.

A pair is a prompt and two responses, all strings or all message lists. `pair` makes it from a row:
TRL's formats; lists that repeat their prompt, as UltraFeedback's; ShareGPT; OpenAI's preference
format; the column names of Intel's and Argilla's data sets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qadapter.text.bad_rows import RowError
from qadapter.text.messages import checked_text, message_list

TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
FLAG_COLUMNS = ("chosen_truncated", "rejected_truncated")
COLUMNS = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs", "system")
"""What is read of a row, beside tokens; other columns are ignored."""

OPENAI = ("input", "preferred_output", "non_preferred_output")
PROMPTS = ("question", "instruction", "input", "conversations")
"""What others call the prompt."""


MESSAGE_KEYS = ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"})
MESSAGES_IN_TEXT = re.compile(r"""\s*\[?\s*\{\s*["'](role|content|from|value|tool_calls)["']\s*:""")


class MissingColumnsError(RowError):
    """Neither the columns of a preference pair nor those of another known form."""


def check_columns(columns: Sequence[str], place: str) -> None:
    if set(TOKEN_COLUMNS) <= set(columns) or set(OPENAI) <= set(columns):
        return
    missing = [column for column in ("chosen", "rejected") if column not in columns]
    if missing:
        reason = f"missing column(s) {', '.join(missing)}"
        raise MissingColumnsError(
            place,
            f"{reason}; found: {', '.join(columns) or 'none'}. "
            "Preference data needs 'chosen' and 'rejected'; 'prompt' is optional. Columns of other "
            "names: columns={'chosen': NAME}, --columns chosen=NAME",
            reason,
        )


def described(columns: Sequence[str]) -> str | None:
    """What is made of columns that are not TRL's, in words; None where they are."""
    if set(TOKEN_COLUMNS) <= set(columns) or "prompt" in columns:
        return None
    if set(OPENAI) <= set(columns):
        return "OpenAI's preference format: 'input', 'preferred_output', 'non_preferred_output'"
    prompts = [f"'{name}'" for name in PROMPTS if name in columns]
    if not prompts or not {"chosen", "rejected"} <= set(columns):
        return None
    system = ", 'system' as its system message" if "system" in columns else ""
    return f"{' or '.join(prompts)} as the prompt{system}, 'chosen', 'rejected'"


def pair(example: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``prompt``, ``chosen`` and ``rejected``, all strings or all message lists, and the row's
    ``tools`` and ``chat_template_kwargs`` where it has them.

    Raises:
        RowError: what is wrong, with ``where``.
    """
    check_columns(list(example), where)
    row = _named(example, where)
    for column in ("prompt", "chosen", "rejected"):
        row[column] = messages_from_json(row[column], where, column)
    kinds = {
        column: _kind(row[column], where, column)
        for column in ("prompt", "chosen", "rejected")
        if column != "prompt" or row["prompt"] is not None
    }
    for column in ("chosen", "rejected"):
        if _is_empty(row[column]):
            raise RowError(where, f"'{column}' is empty")
    for column, kind in kinds.items():
        if kind == "string":
            checked_text(row[column], where, f"'{column}'")
        else:
            row[column] = message_list(row[column], where, f"'{column}'")
    both = {kinds["chosen"], kinds["rejected"]}
    if both == {"message list"} and kinds.get("prompt") == "string":
        _find_prompt(row, where)
    elif both == {"message list"} and row["prompt"]:
        _strip_prompt(row, where)
    elif len(set(kinds.values())) > 1:
        raise _mixed(kinds, where)
    if row["prompt"] is None:
        row |= _extract_prompt(row["chosen"], row["rejected"], where)
    for column in ("chosen", "rejected"):
        if _is_empty(row[column]):
            raise RowError(where, f"'{column}' is empty after the prompt that both share")
    system = row.pop("system")
    if system is not None:
        _with_system(row, system, where)
    if isinstance(row["prompt"], list):
        _check_roles(row, where)
    return {name: value for name, value in row.items() if value is not None}


def _named(example: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The row under TRL's names."""
    row = {column: example.get(column) for column in COLUMNS}
    if "prompt" in example or described(list(example)) is None:
        # There, a column 'system' is one of those that nothing reads.
        return row | {"system": None}
    if set(OPENAI) <= set(example):
        given = example["input"]
        row["prompt"] = given
        if isinstance(given, Mapping) and "messages" in given:
            row["prompt"], row["tools"] = given["messages"], given.get("tools")
        row["chosen"], row["rejected"] = (example[name] for name in OPENAI[1:])
        return row | {"system": None}
    if "system" in example:
        row["system"] = example["system"] or ""
    found = {name: example[name] for name in PROMPTS if example.get(name)}
    if _holds_prompt(row["chosen"]) and _holds_prompt(row["rejected"]):
        return row  # the prompt is in the lists, which say more than a column does
    if len({repr(value) for value in found.values()}) > 1:
        names = " and ".join(f"'{name}'" for name in found)
        raise RowError(
            where,
            f"{names} may both be the prompt; say which (columns={{'prompt': NAME}}, "
            "--columns prompt=NAME), or join them into one",
        )
    if not found:
        raise RowError(
            where, f"the prompt is empty: {', '.join(n for n in PROMPTS if n in example)}"
        )
    for name, value in found.items():
        row["prompt"] = value
        answers = (row["chosen"], row["rejected"])
        if isinstance(value, str) and all(
            isinstance(a, str) and a.startswith(value) for a in answers
        ):
            raise RowError(
                where,
                f"'chosen' and 'rejected' both begin with '{name}', which may be the prompt or "
                "part of it; remove that column if they hold the prompt, or give it as 'prompt' "
                f"(--columns prompt={name}) if they go on behind it",
            )
    return row


def _holds_prompt(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else None
    speaker = isinstance(first, Mapping) and (first.get("role") or first.get("from"))
    return speaker in ("system", "user", "human")


def messages_from_json(value: Any, where: str, column: str) -> Any:
    """Messages that a table of text holds as JSON; Python's notation of them is refused."""
    if not isinstance(value, str) or not MESSAGES_IN_TEXT.match(value):
        return value
    try:
        content = json.loads(value)
    except json.JSONDecodeError:
        if not any(all(f"'{key}':" in value for key in keys) for keys in MESSAGE_KEYS):
            return value
        reason = f"'{column}' holds messages in Python's notation"
        raise RowError(
            where, f"{reason}: {value.strip():.50}; write them as JSON", reason
        ) from None
    messages = [content] if isinstance(content, dict) else content
    are = all(isinstance(m, dict) and any(k <= set(m) for k in MESSAGE_KEYS) for m in messages)
    return content if are else value


def _kind(value: Any, where: str, column: str) -> str:
    if isinstance(value, str):
        return "string"
    messages = [value] if isinstance(value, Mapping) else value
    if isinstance(messages, list) and all(
        isinstance(m, Mapping) and ("role" in m or "from" in m) for m in messages
    ):
        return "message list"
    reason = f"'{column}' is neither a string nor a list of messages with a role"
    raise RowError(where, f"{reason}, but {value!r:.80}", reason)


def _is_empty(value: Any) -> bool:
    if isinstance(value, str):
        return not value
    said = ("content", "value", "tool_calls")
    messages = [value] if isinstance(value, Mapping) else value
    return not any(m.get(key) for m in messages for key in said)


def _mixed(kinds: Mapping[str, str], where: str) -> RowError:
    found = ", ".join(f"'{column}' is a {kind}" for column, kind in kinds.items())
    return RowError(
        where,
        f"mixed formats: {found}. Give all as strings or all as message lists "
        "(a prompt as a string goes with lists whose user's message it is)",
        "mixed formats",
    )


def _with_system(row: dict[str, Any], system: Any, where: str) -> None:
    """A system message in a column of its own makes messages of the whole row."""
    if not isinstance(system, str):
        raise RowError(where, f"'system' is not a string, but {system!r:.80}")
    if isinstance(row["prompt"], str):
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        row |= {name: [{"role": role, "content": row[name]}] for name, role in roles.items()}
    if system:
        message = {"role": "system", "content": checked_text(system, where, "'system'")}
        own, rest = _systems(row["prompt"])
        row["prompt"] = _one_system([message], own, where) + rest


def _systems(messages: list[Any]) -> tuple[list[Any], list[Any]]:
    """The system messages that a list begins with, and the rest."""
    n = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
    return messages[:n], messages[n:]


def _one_system(one: list[Any], other: list[Any], where: str) -> list[Any]:
    if one and other and one != other:
        raise RowError(
            where,
            f"two system messages: {one[0]['content']!r:.40} and {other[0]['content']!r:.40}",
            "two system messages",
        )
    return one or other


def _find_prompt(row: dict[str, Any], where: str) -> None:
    """The prompt is a string, and the lists begin with it as a user's message (UltraFeedback)."""
    chosen, rejected = row["chosen"], row["rejected"]
    n = _shared(chosen, rejected)
    for i in reversed(range(n)):
        if chosen[i]["role"] == "user" and chosen[i]["content"].strip() == row["prompt"].strip():
            parts = {"chosen": chosen[i + 1 :], "rejected": rejected[i + 1 :]}
            row |= {"prompt": chosen[: i + 1], **parts}
            return
    kinds = {"prompt": "string", "chosen": "message list", "rejected": "message list"}
    raise _mixed(kinds, where)


def _strip_prompt(row: dict[str, Any], where: str) -> None:
    """Take the prompt out of lists that repeat it, with or without its system message."""
    systems, prompt = _systems(row["prompt"])
    repeated = []
    for column in ("chosen", "rejected"):
        own, rest = _systems(row[column])
        if prompt and rest[: len(prompt)] == prompt:
            row[column] = rest[len(prompt) :]
            repeated.append(own)
    for own in repeated:
        # What stands in one response only is no part of the prompt that both follow.
        if not systems and own != repeated[0]:
            raise RowError(where, "a system message in 'chosen' or 'rejected' only")
        _one_system(systems, own, where)
    systems = systems or (repeated[0] if repeated else [])
    row["prompt"] = systems + prompt


def _shared(chosen: Any, rejected: Any) -> int:
    """How many messages or characters both begin with; each keeps one of its own at least."""
    limit = min(len(chosen), len(rejected)) - 1
    n = 0
    while n < limit and chosen[n] == rejected[n]:
        n += 1
    return n


def _extract_prompt(chosen: Any, rejected: Any, where: str) -> dict[str, Any]:
    """Split off the leading messages or characters that both share (a space stays outside)."""
    n = _shared(chosen, rejected)
    if isinstance(chosen, str):
        if chosen == rejected:
            raise RowError(
                where,
                "'chosen' and 'rejected' are the same text: no prompt to be told from it",
            )
        if n and chosen[n - 1] == " ":
            n -= 1
    return {"prompt": chosen[:n], "chosen": chosen[n:], "rejected": rejected[n:]}


def _check_roles(row: dict[str, Any], where: str) -> None:
    if not row["prompt"]:
        raise RowError(
            where, "'chosen' and 'rejected' share no leading message, so there is no prompt"
        )
    for column in ("chosen", "rejected"):
        role = row[column][0]["role"]
        if role not in ("assistant", "tool"):
            raise RowError(
                where,
                f"the response in '{column}' begins with a message of role '{role}'; "
                "both responses must follow the same prompt, which they may repeat, all of it",
            )
