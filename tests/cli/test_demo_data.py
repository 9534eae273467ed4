"""The demo's chosen answers follow its rule, the rejected ones do not, and no test prompt leaks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import qadapter
from qadapter.cli.demo_rule import follows
from qadapter.text.data import load_preference_data

FOLDER = Path(qadapter.__file__).parent / "demo_data"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("In short, it is Paris.", True),
        (" In short, drink more water.\n\nIt helps.", True),
        ("It is Paris, in short, or so they say.", False),
        ("in short, it is Paris.", False),
        ("In short it is Paris.", False),
        ("The capital is Paris. In short, it is Paris.", False),
        ("In short,", False),
        ("In short, In short, In short, In short,", False),
        ("", False),
    ],
)
def test_rule(text, expected):
    assert follows(text) is expected


def rows(name):
    with open(FOLDER / f"{name}.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize(("name", "least"), [("train", 150), ("heldout", 30)])
def test_pairs_differ_in_what_is_preferred(name, least):
    pairs = load_preference_data(FOLDER / f"{name}.jsonl")
    assert len(pairs) >= least
    for pair in pairs:
        (chosen,), (rejected,) = pair["chosen"], pair["rejected"]
        assert follows(chosen["content"]), chosen
        assert not follows(rejected["content"]), rejected
        assert [m["role"] for m in (*pair["prompt"], chosen, rejected)] == [
            "user",
            "assistant",
            "assistant",
        ]


def test_no_prompt_twice():
    prompts = [
        r["prompt"][0]["content"] for n in ("train", "heldout", "unrelated") for r in rows(n)
    ]
    assert len(set(prompts)) == len(prompts)


def test_unrelated_rows():
    unrelated = rows("unrelated")
    assert len(unrelated) == 24
    for row in unrelated:
        assert row["prompt"][0]["role"] == "user"
        assert row["response"][0]["role"] == "assistant"
        assert row["response"][0]["content"]
