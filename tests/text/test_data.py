"""Preference files become the token ids of the model's own chat template, or a named error."""

from __future__ import annotations

import json
import warnings

import datasets
import pytest

from qadapter.text import tokenization
from qadapter.text.data import load_preference_data, prepare_dataset
from qadapter.text.tokenization import PromptTooLongError, tokenize_preference
from tests.text.chat_tokenizer import (
    BOS_TOKENIZER,
    EOS,
    PAIR,
    TEMPLATE,
    TOKENIZER,
    assistant,
    closing_tokenizer,
    decode,
    make_tokenizer,
    user,
)

# ------------------------------------------------------------------------------------------ loading


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_load_all_kinds(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": " a\u2028b", "rejected": " b"} for i in range(3)]
    jsonl = write(
        tmp_path / "a.jsonl",
        "\ufeff" + "\n\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n",
    )
    as_list = write(tmp_path / "a.json", json.dumps(rows))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    for path in (jsonl, as_list, tmp_path / "a.parquet", str(jsonl)):
        loaded = load_preference_data(path)
        assert [dict(r) for r in loaded] == rows


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.jsonl",
            '{"chosen": "a", "rejected": "b"}\n{"chosen": \n',
            r"a\.jsonl, line 2: not valid JSON",
        ),
        (
            "a.jsonl",
            '{"chosen": "a", "rejected": "b"}\n[1]\n',
            r"line 2: expected an object, found list",
        ),
        (
            "a.jsonl",
            '{"prompt": "x", "answer": "b"}\n',
            r"missing column\(s\) chosen, rejected; found: prompt, answer",
        ),
        (
            "a.jsonl",
            '{"chosen": "a", "rejected": "b"}\n{"chosen": [], "rejected": "b"}\n',
            r"line 2: 'chosen' is list",
        ),
        ("a.jsonl", "", "no rows|missing"),
        ("a.json", '[\n{"chosen": 1,}]', r"a\.json, line 2: not valid JSON"),
        ("a.json", '{"chosen": 1}', "expected a list of objects, found dict"),
        ("a.xlsx", "chosen,rejected\n", "unknown kind of file"),
        ("a.csv", "chosen,rejected\n", "no rows"),
    ],
)
def test_load_errors_name_the_place(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        load_preference_data(write(tmp_path / name, text))


@pytest.mark.parametrize(
    "name", ["missing.jsonl", "./missing", "/no/such/file", "a/b/c", "~/nothing-there.parquet"]
)
def test_missing_file_is_not_looked_up_on_the_hub(name):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_preference_data(name)


# ------------------------------------------------------------------------------------- tokenisation


def test_messages():
    out = tokenize_preference(PAIR, TOKENIZER)
    assert (
        decode(out["prompt_ids"])
        == "<|im_start|>user\nwhat color is the sky?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (
        decode(out["chosen_ids"]) == "the sky is blue<|im_end|>"
    )  # the template's "\n" after it is cut off
    assert decode(out["rejected_ids"]) == "the sky is green<|im_end|>"
    assert out["chosen_ids"].count(EOS) == 1
    assert (out["chosen_truncated"], out["rejected_truncated"]) == (False, False)


def test_strings():
    out = tokenize_preference(
        {"prompt": "the sky is", "chosen": " blue", "rejected": " green"}, TOKENIZER
    )
    assert decode(out["prompt_ids"]) == "the sky is"
    assert decode(out["chosen_ids"]) == " blue<|im_end|>"
    assert decode(out["rejected_ids"]) == " green<|im_end|>"
    # An end that the text brings along is not doubled.
    again = {"prompt": "the sky is", "chosen": " blue<|im_end|>\n", "rejected": " green<|im_end|>"}
    assert tokenize_preference(again, TOKENIZER) == out
    # One in the middle is content.
    middle = tokenize_preference(
        {"prompt": "the", "chosen": " a<|im_end|> b", "rejected": " c"}, TOKENIZER
    )
    assert decode(middle["chosen_ids"]) == " a<|im_end|> b<|im_end|>"


@pytest.mark.parametrize(
    "example",
    [
        {
            "chosen": [*PAIR["prompt"], *PAIR["chosen"]],
            "rejected": [*PAIR["prompt"], *PAIR["rejected"]],
        },
        {**PAIR, "prompt": None} | {c: [*PAIR["prompt"], *PAIR[c]] for c in ("chosen", "rejected")},
    ],
)
def test_implicit_prompt_messages(example):
    assert tokenize_preference(example, TOKENIZER) == tokenize_preference(PAIR, TOKENIZER)


def test_implicit_prompt_strings(monkeypatch):
    explicit = {"prompt": "the sky is", "chosen": " blue", "rejected": " bright"}
    implicit = {"chosen": "the sky is blue", "rejected": "the sky is bright"}
    # What both begin with is "the sky is b", in the middle of a word: like TRL, only a space is
    # given back.
    monkeypatch.setattr(tokenization, "_warned", set())
    with pytest.warns(UserWarning, match="common part"):
        out = tokenize_preference(implicit, TOKENIZER)
    assert decode(out["prompt_ids"] + out["chosen_ids"]) == "the sky is blue<|im_end|>"
    implicit["rejected"] = "the sky is green"
    explicit["rejected"] = " green"
    assert tokenize_preference(implicit, TOKENIZER) == tokenize_preference(explicit, TOKENIZER)
    # One is the beginning of the other: both keep at least a character.
    out = tokenize_preference(
        {"chosen": "the sky, hello world", "rejected": "the sky, hello"}, TOKENIZER
    )
    assert decode(out["prompt_ids"] + out["rejected_ids"]) == "the sky, hello<|im_end|>"


def test_merge_across_the_border_gives_identical_prompts(monkeypatch):
    monkeypatch.setattr(tokenization, "_warned", set())
    example = {"prompt": "the s", "chosen": "ky", "rejected": "ea is green"}
    with pytest.warns(UserWarning, match="common part is used as the prompt"):
        out = tokenize_preference(example, TOKENIZER)
    assert decode(out["prompt_ids"] + out["chosen_ids"]) == "the sky<|im_end|>"
    assert decode(out["prompt_ids"] + out["rejected_ids"]) == "the sea is green<|im_end|>"
    assert TOKENIZER("the sky").input_ids == out["prompt_ids"] + out["chosen_ids"][:-1]
    assert len(out["prompt_ids"]) < len(TOKENIZER("the s").input_ids)
    with warnings.catch_warnings():  # once is enough
        warnings.simplefilter("error")
        tokenize_preference(example, TOKENIZER)


@pytest.mark.parametrize("rendered", ["", "<s>"])
def test_one_bos(rendered):
    out = tokenize_preference(
        {"prompt": rendered + "the sky", "chosen": " is blue", "rejected": " is green"},
        BOS_TOKENIZER,
    )
    assert out["prompt_ids"][0] == 0
    assert (out["prompt_ids"] + out["chosen_ids"] + out["rejected_ids"]).count(0) == 1
    with_template = make_tokenizer(bos=True, template="<s>" + TEMPLATE)
    out = tokenize_preference(PAIR, with_template)
    assert (out["prompt_ids"] + out["chosen_ids"]).count(0) == 1
    assert tokenize_preference(PAIR, TOKENIZER)["prompt_ids"].count(0) == 0


def test_bos_alone_is_a_prompt():
    out = tokenize_preference({"prompt": "", "chosen": "blue", "rejected": "green"}, BOS_TOKENIZER)
    assert out["prompt_ids"] == [0]
    with pytest.raises(ValueError, match="row 3: the prompt has no token"):
        tokenize_preference(
            {"prompt": "", "chosen": "blue", "rejected": "green"}, TOKENIZER, index=3
        )


def test_tokenizer_that_closes_every_text():
    out = tokenize_preference(
        {"prompt": "the sky is", "chosen": " blue", "rejected": " green"}, closing_tokenizer()
    )
    assert decode(out["prompt_ids"] + out["chosen_ids"]) == "<s>the sky is blue<|im_end|>"


def test_plain_text_of_a_chat_model_is_said(monkeypatch):
    pair = {"prompt": "the sky is", "chosen": " blue", "rejected": " green"}
    rendered = {**pair, "prompt": TOKENIZER.apply_chat_template([user("why?")], tokenize=False)}
    for row, tokenizer, told in (
        (pair, TOKENIZER, True),
        (pair, make_tokenizer(template=None), False),
        (PAIR, TOKENIZER, False),
        (rendered, TOKENIZER, False),
    ):
        monkeypatch.setattr(tokenization, "_warned", set())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tokenize_preference(row, tokenizer)
        assert any("--no-chat" in str(w.message) for w in caught) == told


def test_several_eos_ids():
    specials = ("<s>", "<|im_start|>", "<|im_end|>", "<turn>")
    tokenizer = make_tokenizer(
        template=TEMPLATE.replace("<|im_end|>\n", "<turn>\n"), specials=specials
    )
    turn = tokenizer.convert_tokens_to_ids("<turn>")
    out = tokenize_preference(PAIR, tokenizer, eos_token_ids=[turn, tokenizer.eos_token_id])
    assert tokenizer.decode(out["chosen_ids"]) == "the sky is blue<turn>"
    # Not known as an end: the tail stays, and the tokenizer's own end is appended.
    out = tokenize_preference(PAIR, tokenizer)
    assert tokenizer.decode(out["chosen_ids"]) == "the sky is blue<turn>\n<|im_end|>"
    # A template that writes two ends: generation stops at the first.
    tokenizer = make_tokenizer(
        template=TEMPLATE.replace("<|im_end|>\n", "<turn>\n<|im_end|>"), specials=specials
    )
    out = tokenize_preference(PAIR, tokenizer, eos_token_ids=(tokenizer.eos_token_id, turn))
    assert tokenizer.decode(out["chosen_ids"]) == "the sky is blue<turn>"
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        tokenize_preference(PAIR, tokenizer)
    assert tokenize_preference(PAIR, tokenizer, eos_token_ids=turn)["chosen_ids"][-1] == turn


def test_tools_and_template_options():
    template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% if loud %}LOUD{% endif %}" + TEMPLATE
    )
    tokenizer = make_tokenizer(template=template)
    # Tables fill in None for what one row has and another lacks; it must not reach the template.
    tools = [{"name": "search", "limit": None}]
    plain = tokenize_preference(
        {**PAIR, "tools": None, "chat_template_kwargs": {"loud": None}}, tokenizer
    )
    assert plain == tokenize_preference(PAIR, TOKENIZER)
    for given_tools in (tools, json.dumps(tools)):
        out = tokenize_preference(
            {**PAIR, "tools": given_tools, "chat_template_kwargs": {"loud": True}}, tokenizer
        )
        assert tokenizer.decode(out["prompt_ids"]).startswith(
            '[{"name": "search"}]LOUD<|im_start|>user'
        )


def test_several_messages_in_a_response():
    example = {
        "prompt": PAIR["prompt"],
        "chosen": [
            assistant("hello"),
            {"role": "tool", "content": "blue"},
            assistant("the sky is blue"),
        ],
        "rejected": PAIR["rejected"],
    }
    text = decode(tokenize_preference(example, TOKENIZER)["chosen_ids"])
    assert text.startswith("hello<|im_end|>\n<|im_start|>tool\n")
    assert text.endswith("<|im_start|>assistant\nthe sky is blue<|im_end|>")


def test_truncation_keeps_the_start():
    full = tokenize_preference(PAIR, TOKENIZER)
    prompt, chosen = full["prompt_ids"], full["chosen_ids"]
    exact = len(prompt) + len(chosen)
    out = tokenize_preference(PAIR, TOKENIZER, max_length=exact)
    assert (out["chosen_ids"], out["chosen_truncated"]) == (chosen, False)
    for cut in range(1, len(chosen)):
        out = tokenize_preference(PAIR, TOKENIZER, max_length=len(prompt) + cut)
        assert out["prompt_ids"] == prompt
        assert (out["chosen_ids"], out["chosen_truncated"]) == (chosen[:cut], True)
        assert EOS not in out["chosen_ids"]
    with pytest.raises(PromptTooLongError) as error:
        tokenize_preference(PAIR, TOKENIZER, max_length=len(prompt), index=7)
    for part in ("row 7", str(len(prompt)), f"max_length={len(prompt)}", "drop_long_prompts=True"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": [assistant("")]}, "row 5: 'chosen' is empty"),
        ({"chosen": [assistant(None)]}, "row 5: 'chosen' is empty"),
        ({"rejected": []}, "row 5: 'rejected' is empty"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "row 5: 'chosen' is empty"),
        (
            {"prompt": "what?"},
            "row 5: mixed formats: 'prompt' is a string, 'chosen' is a message list",
        ),
        ({"chosen": "blue"}, "row 5: mixed formats"),
        ({"chosen": None}, "row 5: 'chosen' is neither a string nor a list of messages"),
        (
            {"chosen": [user("again"), assistant("blue")]},
            "role 'user'; both responses must follow the same prompt",
        ),
        ({"prompt": None}, "share no leading message"),
        ({"prompt": None, "chosen": "same", "rejected": "same"}, "the same text"),
    ],
)
def test_bad_rows(change, message):
    with pytest.raises(ValueError, match=message):
        tokenize_preference(PAIR | change, TOKENIZER, index=5)


def test_content_that_the_template_strips_is_empty():
    tokenizer = make_tokenizer(template=TEMPLATE.replace("m['content']", "m['content'] | trim"))
    with pytest.raises(ValueError, match="'chosen' is empty"):
        tokenize_preference(PAIR | {"chosen": [assistant("  ")]}, tokenizer)


# ------------------------------------------------------------------------------------------ prepare


def test_prepare_dataset(caplog):
    long = {**PAIR, "prompt": [user("hello " * 60)]}
    dataset = datasets.Dataset.from_list([PAIR, long, PAIR])
    prepared = prepare_dataset(dataset, TOKENIZER, max_length=500)
    assert prepared.column_names == [
        "prompt_ids",
        "chosen_ids",
        "rejected_ids",
        "chosen_truncated",
        "rejected_truncated",
    ]
    assert prepared[2] == tokenize_preference(PAIR, TOKENIZER)
    assert prepare_dataset(prepared, TOKENIZER) is prepared
    # Only ids, as from another library: ends, cuts and flags are made here.
    raw = prepared.remove_columns(["chosen_truncated", "rejected_truncated"])
    raw = raw.map(lambda row: {"chosen_ids": row["chosen_ids"][:-1]})
    assert prepare_dataset(raw, TOKENIZER)[0] == prepared[0]
    assert prepare_dataset(
        raw.select([0]), TOKENIZER, max_length=len(prepared[0]["prompt_ids"]) + 2
    )[0]["chosen_truncated"]

    with pytest.raises(ValueError, match="row 1: the prompt has"):
        prepare_dataset(dataset, TOKENIZER, max_length=60)
    with caplog.at_level("WARNING"):
        prepared = prepare_dataset(dataset, TOKENIZER, max_length=60, drop_long_prompts=True)
    assert len(prepared) == 2
    assert "Dropped 1 of 3 pairs" in caplog.text
    with pytest.raises(ValueError, match="no pairs left: all 3 prompts"):
        prepare_dataset(dataset, TOKENIZER, max_length=5, drop_long_prompts=True)
    assert len(prepare_dataset(dataset, TOKENIZER, max_length=500, num_proc=2)) == 3
    assert len(prepare_dataset(dataset, TOKENIZER, max_length=500, eos_token_ids=iter([EOS]))) == 3


def test_prepare_dataset_errors():
    dataset = datasets.Dataset.from_list([PAIR])
    with pytest.raises(TypeError, match=r"DatasetDict; choose a split, such as data\['train'\]"):
        prepare_dataset(datasets.DatasetDict(train=dataset), TOKENIZER)
    with pytest.raises(TypeError, match=r"dataset: expected .* found str .load_preference_data"):
        prepare_dataset("pairs.jsonl", TOKENIZER)
    for empty in (dataset.select([]), prepare_dataset(dataset, TOKENIZER).select([])):
        with pytest.raises(ValueError, match="dataset: expected one pair or more, found no rows"):
            prepare_dataset(empty, TOKENIZER)
    with pytest.raises(ValueError, match=r"missing column\(s\) rejected; found: prompt, chosen"):
        prepare_dataset(dataset.remove_columns("rejected"), TOKENIZER)


def test_a_stream_is_tokenised_as_it_is_read(caplog):
    rows = [
        PAIR,
        PAIR | {"chosen": [assistant("")]},
        PAIR | {"prompt": [user("hello " * 60)]},
        PAIR,
    ]
    dataset = datasets.Dataset.from_list(rows)
    expected = list(prepare_dataset(dataset.select([0, 3]), TOKENIZER))
    nameless = datasets.IterableDataset.from_generator(lambda: iter(rows))
    assert nameless.column_names is None
    for stream in (dataset.to_iterable_dataset(), nameless):
        prepared = prepare_dataset(stream, TOKENIZER, max_length=60, skip_bad_rows=True)
        assert list(prepared) == expected
        assert prepare_dataset(prepared, TOKENIZER) is prepared
        for words in ("Dropped row 1: 'chosen' is empty", "Dropped row 2: the prompt has"):
            assert words in caplog.text
        caplog.clear()
        with pytest.raises(ValueError, match="row 1: 'chosen' is empty"):
            list(prepare_dataset(stream, TOKENIZER))
