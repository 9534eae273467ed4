"""The study's data: pairs to learn and to hold out, text that has nothing to do with them."""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from qadapter.cli import demo_rule
from qadapter.text.data import load_preference_data, prepare_dataset
from qadapter.training.evaluation import DEMO_DATA, UNRELATED, load_unrelated

Row = dict[str, Any]
RULES: dict[str, Callable[[str], bool]] = {"in-short": demo_rule.follows}
PROMPTS = Path(__file__).parent / "prompts.txt"
HELD_OUT_SHARE = 0.2
COLUMNS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class StudyData:
    """``rule`` checks an answer."""

    name: str
    train: list[Row]
    heldout: list[Row]
    unrelated: list[Row]
    rule: Callable[[str], bool] | None
    files: dict[str, str]  # which, by content


def load(
    data: str | None = None,
    heldout: str | None = None,
    unrelated: str | None = None,
    rule: str | None = None,
    name: str | None = None,
) -> StudyData:
    """Preference files by path; None takes what the project ships (and its rule)."""
    if rule is not None and rule not in RULES:
        raise ValueError(f"--rule: expected one of {', '.join(RULES)}, got {rule!r}")
    if data is None and heldout is not None:
        raise ValueError("--heldout: expected --data with it, got --heldout alone")
    if data is None:
        rule = rule or "in-short"
    shipped = [str(DEMO_DATA / "train.jsonl"), str(DEMO_DATA / "heldout.jsonl")]
    paths = [path for path in (data, heldout) if path is not None] or shipped
    splits = [_rows(path) for path in paths]
    train, held_out = splits if len(splits) == 2 else _split(splits[0])
    known = {str(row["prompt"]) for row in train}
    kept = [row for row in held_out if str(row["prompt"]) not in known]
    if not kept:
        raise ValueError(f"{paths[-1]}: no held-out pair has a prompt that training does not have")
    name = name or (Path(data).stem.split(".")[0] if data else "shipped")
    found = {Path(path).name: file_hash(path) for path in (*paths, unrelated or UNRELATED)}
    other = list(load_unrelated(unrelated))
    return StudyData(name, train, kept, other, RULES[rule] if rule else None, found)


def _rows(path: str) -> list[Row]:
    rows = list(load_preference_data(path))
    if "prompt" not in rows[0]:
        raise ValueError(f"{path}: expected a column prompt (answers are made to prompts alone)")
    return rows


def _split(rows: list[Row]) -> list[list[Row]]:
    """By prompt, so that no prompt is on both sides."""
    prompts = sorted({str(row["prompt"]) for row in rows})
    count = max(1, round(HELD_OUT_SHARE * len(prompts)))
    out = set(random.Random(0).sample(prompts, count))
    return [
        [row for row in rows if (str(row["prompt"]) in out) == wanted] for wanted in (False, True)
    ]


def file_hash(path: str | Path) -> str:
    if not Path(path).is_file():
        return "not a file"
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]


def unrelated_and_replay(data: StudyData, count: int) -> tuple[list[Row], list[Any]]:
    """Conversations to measure forgetting on, and other prompts, for the base to answer.

    The prompts are the rest of the same file where it has enough, else those shipped here.
    """
    measured = some(data.unrelated, count)
    used = {str(row["prompt"]) for row in (*measured, *data.train, *data.heldout)}
    rest = [row["prompt"] for row in data.unrelated if str(row["prompt"]) not in used]
    lines = [line for line in PROMPTS.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(rest) < len(lines):
        shipped = [[{"role": "user", "content": line}] for line in lines]
        rest = [prompt for prompt in shipped if str(prompt) not in used]
    return measured, rest


def some(rows: list[Any], count: int, seed: int = 0) -> list[Any]:
    """At most ``count``, drawn; all in their order if there are no more."""
    if count >= len(rows):
        return list(rows)
    return random.Random(seed).sample(rows, count)


def batches_by_length(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Batches of ``count`` indices of items of like length, so that little of them is padding."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start : start + count] for start in range(0, len(order), count)]


def flipped(rows: list[Row], share: float, seed: int) -> list[Row]:
    """Chosen and rejected exchanged in a share of the pairs; more noise flips some more."""
    order = list(range(len(rows)))
    random.Random(1000 + seed).shuffle(order)
    turned = set(order[: round(share * len(rows))])
    return [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if i in turned else row
        for i, row in enumerate(rows)
    ]


def text(response: Any) -> str:
    """The words of a response, whether a string or messages."""
    if isinstance(response, str):
        return response.strip()
    return "\n".join(str(message["content"]) for message in response).strip()


def dataset(rows: list[Row]) -> Dataset:
    """Of the pairs alone, without what else the file had."""
    return Dataset.from_list([{name: row[name] for name in COLUMNS} for row in rows])


def tokenised(rows: list[Row], tokenizer: Any, max_length: int, eos: list[int]) -> list[Row]:
    """Rows with prompt, chosen and rejected; pairs whose prompt is too long are left out."""
    options: dict[str, Any] = {"eos_token_ids": eos, "drop_long_prompts": True}
    return list(prepare_dataset(dataset(rows), tokenizer, max_length=max_length, **options))
