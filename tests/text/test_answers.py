"""Prompts are read from files as they stand, and answers printed as the text they are."""

import io
import json

import pytest

from qadapter.text import answers
from qadapter.text.answers import side_by_side
from qadapter.text.prompts import prompt_text, read_prompts


def test_other_kinds_of_files(tmp_path):
    from datasets import Dataset

    (tmp_path / "a.json").write_text(json.dumps(["a cat", {"prompt": "a dog", "id": 1}]))
    (tmp_path / "a.txt").write_text("a cat\n\n a dog \n")
    Dataset.from_list(
        [
            {"messages": [{"role": "user", "content": "hello"}], "strength": 0.5, "n": 1},
            {"messages": [{"role": "user", "content": "yes"}], "strength": None, "n": 2},
        ]
    ).to_parquet(tmp_path / "a.parquet")
    assert [r.prompt for r in read_prompts(tmp_path / "a.json")] == ["a cat", "a dog"]
    assert [r.prompt for r in read_prompts(tmp_path / "a.txt")] == ["a cat", "a dog"]
    rows = read_prompts(tmp_path / "a.parquet")
    assert rows[0].prompt == [{"role": "user", "content": "hello"}]
    assert [(r.strength, r.fields) for r in rows] == [(0.5, {"n": 1}), (None, {"n": 2})]
    (tmp_path / "a.xlsx").touch()
    with pytest.raises(ValueError, match="unknown kind of file"):
        read_prompts(tmp_path / "a.xlsx")
    with pytest.raises(FileNotFoundError, match=r"b\.txt"):
        read_prompts(tmp_path / "b.txt")


def test_message_lists(tiny_tokenizer):
    turns = [
        {"role": "user", "content": "a cat"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "a dog"},
    ]
    text = prompt_text(tiny_tokenizer, turns, "short")
    assert text == "<b> short </s> <u> a cat </s> <b> yes </s> <u> a dog </s> <b> "
    own = [{"role": "system", "content": "long"}, *turns[:1]]
    assert "short" not in prompt_text(tiny_tokenizer, own, "short")
    # An answer that has begun is gone on with.
    assert prompt_text(tiny_tokenizer, turns[:2]).rstrip().endswith("<b> yes")
    assert prompt_text(tiny_tokenizer, turns, "short", chat=False) == "short\na cat\nyes\na dog"


def test_printer_holds_back_what_may_be_a_stop_string(tiny_tokenizer):
    for stop, shown in (("dog bird", "the cat \n"), ("cat sat", "the cat dog bird ran \n")):
        out = io.StringIO()
        printer = answers.Printer(tiny_tokenizer, [stop], out)
        for text in ("the ", "cat ", "dog ", "bird ", "ran "):
            printer.on_finalized_text(text)
            assert stop not in out.getvalue()
        printer.on_finalized_text("", stream_end=True)
        assert out.getvalue() == shown


def test_side_by_side():
    text = side_by_side(["a", "b"], ["one two three four five six seven", "猫" * 20], width=60)
    lines = text.splitlines()
    assert lines[2].startswith("one two three four five six") and lines[2].endswith("猫" * 14)
    assert lines[3].startswith("seven") and lines[3].endswith("猫" * 6)
    narrow = side_by_side(["a", "b"], ["one", "two"], width=40)
    assert narrow == "[a]\none\n\n[b]\ntwo"
    assert side_by_side(["a"], ["x" * 70], width=30).splitlines()[2:] == [
        "x" * 30, "x" * 30, "x" * 10,
    ]  # fmt: skip
