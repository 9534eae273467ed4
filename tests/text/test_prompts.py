"""Prompts in the forms in which people have them become what the model reads, or a named error."""

import gzip
import json

import datasets
import pytest

from qadapter.text.prompts import encode_prompts, prompt_ids, prompt_row, prompt_text, read_prompts
from qadapter.text.tokenization import tokenize_preference
from tests.text.chat_tokenizer import (
    TEMPLATE,
    TOKENIZER,
    assistant,
    closing_tokenizer,
    make_tokenizer,
    user,
)
from tests.tiny_text import template_with_variables, word_tokenizer

QUESTION = [user("what color?")]
PARTS = [{"role": "user", "content": [{"type": "text", "text": t} for t in ("what ", "color?")]}]
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "search"}}]}
FORMS = {
    "messages": {"messages": QUESTION},
    "one message": {"prompt": user("what color?")},
    "parts": {"messages": PARTS},
    "ShareGPT": {"conversations": [{"from": "human", "value": "what color?"}]},
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(name):
    row = prompt_row(FORMS[name], "here")
    assert row.prompt == QUESTION
    assert row.fields == {}
    # The functions take them as they are, too, with and without a template.
    (given,) = FORMS[name].values()
    for chat in (True, False):
        expected = prompt_text(TOKENIZER, "what color?", "hello", chat)
        assert prompt_text(TOKENIZER, given, "hello", chat) == expected
        assert "what color?" in expected and "hello" in expected and "type" not in expected
    ids = encode_prompts(TOKENIZER, [given])["input_ids"][0].tolist()
    assert ids == prompt_ids(TOKENIZER, "what color?")


def test_files(tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in FORMS.values())
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "b.json").write_text(lines)
    datasets.Dataset.from_list([{"messages": PARTS}]).to_parquet(tmp_path / "c.parquet")
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"what color?\n"))
    for name, count in (("a.jsonl.gz", 4), ("b.json", 4), ("c.parquet", 1), ("[ab].json*", 8)):
        assert [row.prompt for row in read_prompts(tmp_path / name)] == [QUESTION] * count
    assert [row.prompt for row in read_prompts(tmp_path / "d.txt.gz")] == ["what color?"]


def test_tables_of_text(tmp_path):
    table = tmp_path / "a.csv"
    messages = json.dumps(QUESTION).replace('"', '""')
    table.write_text(f'prompt,strength,seed,id\nNone,0.5,,7\n"{messages}",,3,x\n')
    one, two = read_prompts(table)
    assert (one.prompt, one.strength, one.seed, one.fields) == ("None", 0.5, None, {"id": "7"})
    assert (two.prompt, two.strength, two.seed, two.fields) == (QUESTION, None, 3, {"id": "x"})
    assert one.place.endswith("a.csv, line 2")
    table.write_text("prompt\tstrength\na\tmuch\n")
    with pytest.raises(ValueError, match=r"b\.tsv, line 2: strength: expected 0"):
        read_prompts(table.rename(tmp_path / "b.tsv"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": "b'.encode("utf-16"), "line 1: not UTF-8, but UTF-16"),
        (b'{"prompt": "a"}\n{"prompt": "\xe9"}\n', "line 2: not UTF-8: byte 0xe9"),
        (b'{"prompt": "a"}\n{"prompt": "\\ud83d"}\n', "line 2: .* half of a surrogate pair"),
        (b'{"messages": [{"role": "user", "content": [{"type": "audio"}]}]}\n',
         "line 1: messages: message 0 has a part of type 'audio'"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.jsonl, {message}"):
        read_prompts(tmp_path / "a.jsonl")
    (tmp_path / "a.txt").write_bytes(b"a\n\xe9\n")
    with pytest.raises(ValueError, match=r"a\.txt, line 2: not UTF-8"):
        read_prompts(tmp_path / "a.txt")


def test_tool_calls():
    template = TEMPLATE.replace(
        "{{ m['content'] }}", "{{ m['content'] }}{{ m.tool_calls and '!' }}"
    )
    tokenizer = make_tokenizer(template=template)
    turns = prompt_row({"messages": [*QUESTION, CALL]}, "here").prompt
    text = prompt_text(tokenizer, turns)
    # It is a whole message: the answer is another one.
    assert text.endswith("<|im_start|>assistant\n!<|im_end|>\n<|im_start|>assistant\n")
    assert "None" not in text
    # Also where it says something before.
    text = prompt_text(tokenizer, [*QUESTION, {**CALL, "content": "hello"}])
    assert text.endswith("hello!<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(ValueError, match="needs a chat template"):
        prompt_text(make_tokenizer(template=None), turns)


def test_an_answer_that_has_begun_goes_on():
    text = prompt_text(TOKENIZER, [*PARTS, assistant([{"type": "text", "text": "the sky"}])])
    assert text.endswith("<|im_start|>assistant\nthe sky")


def test_a_prompt_goes_on_behind_a_tokenizer_that_closes_every_text():
    for tokenizer, chat in ((closing_tokenizer(template=None), True), (closing_tokenizer(), False)):
        ids = prompt_ids(tokenizer, "the sky", chat=chat)
        assert tokenizer.decode(ids) == "<s>the sky"
        assert tokenizer.decode(prompt_ids(tokenizer, "<s>the sky", chat=chat)) == "<s>the sky"
        # Where the text itself ends so, it is the user's.
        closed = prompt_ids(tokenizer, "the sky<|im_end|>", chat=chat)
        assert tokenizer.decode(closed).startswith("<s>the sky<|im_end|>")


def test_what_the_chat_template_is_given(tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template_with_variables()
    tools = [{"name": "dog"}]
    forms = [
        {"prompt": "why", "tools": tools, "chat_template_kwargs": {"loud": True}, "id": 3},
        {"prompt": "why", "tools": json.dumps(tools), "chat_template_kwargs": '{"loud": true}'},
        {"prompt": "why", "tools": None, "chat_template_kwargs": {"loud": None}},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in forms))
    rows = read_prompts(tmp_path / "a.jsonl")
    assert rows[0].template == rows[1].template
    assert rows[0].fields == {n: v for n, v in forms[0].items() if n != "prompt"}
    texts = [tokenizer.decode(prompt_ids(tokenizer, r.prompt, template=r.template)) for r in rows]
    assert texts == ["dog very <u> why </s> <b>"] * 2 + ["<u> why </s> <b>"]
    # As training reads them.
    pair = {**forms[0], "prompt": [user("why")]}
    pair |= {"chosen": [assistant("no")], "rejected": [assistant("yes")]}
    assert tokenizer.decode(tokenize_preference(pair, tokenizer)["prompt_ids"]) == texts[0]
    with pytest.raises(ValueError, match="tools, chat_template_kwargs: expected a chat template"):
        prompt_ids(tokenizer, "why", chat=False, template=rows[0].template)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"tools": {"name": "dog"}}, "'tools' is not a list, but {'name': 'dog'}"),
        ({"chat_template_kwargs": [1]}, r"'chat_template_kwargs' is not an object, but \[1\]"),
        ({"chat_template_kwargs": "{loud"}, "'chat_template_kwargs' is not valid JSON"),
        (
            {"chat_template_kwargs": {"tokenize": False}},
            "sets tokenize, which follows from the row",
        ),
    ],
)
def test_what_no_chat_template_can_be_given(field, message):
    with pytest.raises(ValueError, match=f"line 1: .*{message}"):
        prompt_row({"prompt": "why", **field}, "line 1")
    pair = {"prompt": [user("why")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}
    with pytest.raises(ValueError, match=f"row 1: .*{message}"):
        tokenize_preference({**pair, **field}, TOKENIZER, index=1)


def test_a_template_that_refuses():
    for template in ("{{ raise_exception('no') }}", "{{ messages[0].content + 1 }}"):
        with pytest.raises(ValueError, match="the chat template refuses the messages: "):
            prompt_text(make_tokenizer(template=template), QUESTION)
