"""Anchors come in the forms that data and prompts do, and their states are those of the answer."""

import json

import pytest

from qadapter.text.anchors import Anchor, has_answer, load_anchors, tokenize_anchor
from tests.text.chat_tokenizer import closing_tokenizer

ASKED = [{"role": "user", "content": "what is the cat"}]
SAID = [{"role": "assistant", "content": "it is red"}]


def words(tokenizer, anchor):
    ids = list(anchor.ids)
    return tokenizer.decode(ids[: anchor.first + 1]), tokenizer.decode(ids[anchor.first + 1 :])


@pytest.mark.parametrize(
    "row",
    [
        {"messages": ASKED + SAID},
        {"conversations": [{"from": "human", "value": "what is the cat"},
                           {"from": "gpt", "value": "it is red"}]},
        {"prompt": ASKED, "completion": SAID},
        {"prompt": ASKED, "response": SAID},
        {"prompt": ASKED, "chosen": SAID, "rejected": [{"role": "assistant", "content": "no"}]},
        {"chosen": ASKED + SAID, "rejected": [*ASKED, {"role": "assistant", "content": "no"}]},
        {"prompt": ASKED + SAID},
    ],
    ids=lambda row: "-".join(row),
)  # fmt: skip
def test_forms(tiny_tokenizer, row):
    assert has_answer(row)
    anchor = tokenize_anchor(row, tiny_tokenizer)
    # The end is an action of the last state, and no state itself.
    assert words(tiny_tokenizer, anchor) == ("<u> what is the cat </s> <b>", "it is red")
    assert anchor.states == 4


def test_the_end_is_no_state_whether_it_is_there_or_not(tiny_tokenizer):
    whole = tokenize_anchor({"messages": ASKED + SAID}, tiny_tokenizer)
    cut = tokenize_anchor({"messages": ASKED + SAID, "truncated": True}, tiny_tokenizer)
    assert cut == whole
    shorter = tokenize_anchor({"messages": ASKED + SAID}, tiny_tokenizer, max_length=9)
    assert words(tiny_tokenizer, shorter)[1] == "it is"


def test_text(tiny_tokenizer):
    anchor = tokenize_anchor({"text": "the cat sat"}, tiny_tokenizer)
    assert anchor == Anchor(tuple(tiny_tokenizer("the cat sat").input_ids), 0)
    assert anchor.states == 3


def test_text_of_a_tokenizer_that_closes_every_text():
    tokenizer = closing_tokenizer()
    assert (
        tokenizer.decode(list(tokenize_anchor({"text": "the sky"}, tokenizer).ids)) == "<s>the sky"
    )


def test_files(tmp_path):
    rows = [{"messages": ASKED + SAID}, {"prompt": "why"}, {"text": "the cat"}]
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "prompts.txt").write_text("why\n\nhow\n")
    loaded = load_anchors(lines)
    assert loaded == rows
    assert [has_answer(row) for row in loaded] == [True, False, True]
    both = load_anchors([lines, tmp_path / "prompts.txt"])
    assert both == [*rows, {"prompt": "why"}, {"prompt": "how"}]


def test_bad_rows(tmp_path, tiny_tokenizer):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "the cat"}\n{"answer": "red"}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: expected one of the fields text"):
        load_anchors(file)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_anchors(tmp_path / "none.jsonl")
    for row, message in (
        ({"messages": ASKED}, "ends in an answer"),
        ({"completion": "red"}, "expected a prompt with the answer"),
        ({"text": ""}, "expected a text"),
        ({"messages": SAID}, "a question before the answer"),
    ):
        with pytest.raises(ValueError, match=f"anchor 7: .*{message}"):
            tokenize_anchor(row, tiny_tokenizer, index=7)
