"""A pair in any of the forms in which people have it becomes the ids of the plain form."""

import pytest
from datasets import Dataset

from qadapter.text.data import prepare_dataset
from qadapter.text.forms import pair
from qadapter.text.tokenization import tokenize_preference
from tests.text.chat_tokenizer import (
    EOS,
    PAIR,
    TEMPLATE,
    TOKENIZER,
    assistant,
    make_tokenizer,
    user,
)

QUESTION, GOOD, BAD = "what color is the sky?", "the sky is blue", "the sky is green"
PLAIN = tokenize_preference(PAIR, TOKENIZER)
SYSTEM = {"role": "system", "content": "hello"}
WITH_SYSTEM = PAIR | {"prompt": [SYSTEM, *PAIR["prompt"]]}


def parts(*texts):
    return [{"type": "text", "text": text, "image_url": None} for text in texts]


def said(speaker, text):
    return {"from": speaker, "value": text}


PLAIN_FORMS = {
    "UltraFeedback": {
        "prompt": QUESTION,
        "messages": [user(QUESTION), assistant(GOOD)],
        "chosen": [user(QUESTION), assistant(GOOD)],
        "rejected": [user(QUESTION), assistant(BAD)],
        "score_chosen": 8.0,
    },
    "a list that repeats the prompt": PAIR | {"chosen": [*PAIR["prompt"], *PAIR["chosen"]]},
    "both lists repeat it": PAIR | {c: [*PAIR["prompt"], *PAIR[c]] for c in ("chosen", "rejected")},
    "one message by itself": {
        "prompt": user(QUESTION), "chosen": assistant(GOOD), "rejected": assistant(BAD),
    },
    "text parts": {
        "prompt": [user(parts("what color ", "is the sky?"))],
        "chosen": [assistant(parts(GOOD))],
        "rejected": [assistant(parts("the sky ", "is green"))],
    },
    "parts without a type": PAIR | {"rejected": [assistant(["the sky ", {"text": "is green"}])]},
    "UltraFeedback, some in parts": {
        "prompt": QUESTION,
        "chosen": [user(parts(QUESTION)), assistant(parts(GOOD))],
        "rejected": [user(QUESTION), assistant(parts(BAD))],
    },
    "ShareGPT": {
        "conversations": [said("human", QUESTION)],
        "chosen": said("gpt", GOOD),
        "rejected": said("gpt", BAD),
    },
    "ShareGPT, whole conversations": {
        "chosen": [said("human", QUESTION), said("gpt", GOOD)],
        "rejected": [said("user", QUESTION), said("assistant", BAD)],
    },
    "OpenAI": {
        "input": {"messages": [user(QUESTION)], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [assistant(GOOD)],
        "non_preferred_output": [assistant(BAD)],
    },
    "JSON in cells": {
        "prompt": '[{"role": "user", "content": "what color is the sky?"}]',
        "chosen": '{"role": "assistant", "content": "the sky is blue"}',
        "rejected": '[{"content": "the sky is green", "role": "assistant"}]',
        "tools": "",
    },
    "a column of system messages, empty": {
        "system": "", "question": QUESTION, "chosen": GOOD, "rejected": BAD,
    },
    "lists that hold the prompt, next to a column of that name": {
        "instruction": "something else",
        "chosen": [user(QUESTION), assistant(GOOD)],
        "rejected": [user(QUESTION), assistant(BAD)],
    },
}  # fmt: skip
SYSTEM_FORMS = {
    "in the lists only": PAIR
    | {c: [SYSTEM, *PAIR["prompt"], *PAIR[c]] for c in ("chosen", "rejected")},
    "in the prompt only": WITH_SYSTEM
    | {c: [*PAIR["prompt"], *PAIR[c]] for c in ("chosen", "rejected")},
    "in both": WITH_SYSTEM
    | {c: [*WITH_SYSTEM["prompt"], *PAIR[c]] for c in ("chosen", "rejected")},
    "behind a prompt in text": {
        "prompt": QUESTION,
        "chosen": [SYSTEM, user(QUESTION), assistant(GOOD)],
        "rejected": [SYSTEM, user(QUESTION), assistant(BAD)],
    },
    "in a column": {"system": "hello", "question": QUESTION, "chosen": GOOD, "rejected": BAD},
    "in a column, with lists": {
        "system": "hello",
        "conversations": [said("human", QUESTION)],
        "chosen": said("gpt", GOOD),
        "rejected": said("gpt", BAD),
    },
    "OpenAI's": {
        "input": {"messages": [SYSTEM, user(QUESTION)]},
        "preferred_output": [assistant(GOOD)],
        "non_preferred_output": [assistant(BAD)],
    },
}


@pytest.mark.parametrize("name", PLAIN_FORMS)
def test_the_plain_pair(name):
    assert tokenize_preference(PLAIN_FORMS[name], TOKENIZER) == PLAIN
    # It stays what it is, also behind a table, which fills None into what is not there.
    once = pair(PLAIN_FORMS[name], "here")
    assert tokenize_preference(pair(once, "here"), TOKENIZER) == PLAIN
    if name not in (
        "parts without a type",
        "UltraFeedback, some in parts",
    ):  # texts and objects in one list: no table holds that
        table = Dataset.from_list([PLAIN_FORMS[name]])
        assert prepare_dataset(table, TOKENIZER)[0] == PLAIN


@pytest.mark.parametrize("name", SYSTEM_FORMS)
def test_a_pair_with_a_system_message(name):
    expected = tokenize_preference(WITH_SYSTEM, TOKENIZER)
    assert "hello" in TOKENIZER.decode(expected["prompt_ids"])
    assert tokenize_preference(SYSTEM_FORMS[name], TOKENIZER) == expected


@pytest.mark.parametrize("column", ["question", "instruction", "input"])
def test_other_names_of_the_prompt(column, caplog):
    row = {column: "the sky is", "chosen": " blue", "rejected": " green", "chosen_score": 4}
    row |= {"chosen_model": "one", "rejected_model": "another"}
    strings = {"prompt": "the sky is", "chosen": " blue", "rejected": " green"}
    prepared = prepare_dataset(Dataset.from_list([row]), TOKENIZER)
    assert prepared[0] == tokenize_preference(strings, TOKENIZER)
    assert f"'{column}' as the prompt" in caplog.text
    # A column of TRL's name is the prompt, whatever the others are called.
    caplog.clear()
    prepared = prepare_dataset(Dataset.from_list([row | strings | {column: "no"}]), TOKENIZER)
    assert prepared[0] == tokenize_preference(strings, TOKENIZER)
    assert not caplog.text


def test_the_tools_of_openais_format():
    tokenizer = make_tokenizer(template="{{ tools | tojson }}" + TEMPLATE)
    tools = [{"type": "function", "function": {"name": "search"}}]
    row = PLAIN_FORMS["OpenAI"] | {"input": {"messages": [user(QUESTION)], "tools": tools}}
    assert tokenize_preference(row, tokenizer) == tokenize_preference(
        PAIR | {"tools": tools}, tokenizer
    )


def test_turns_that_both_responses_share():
    turns = [user("hello"), assistant("hello world"), user(QUESTION)]
    row = {"prompt": QUESTION, "chosen": [*turns, assistant(GOOD)]}
    row["rejected"] = [*turns, assistant(BAD)]
    # The text is the last turn: what stands before it is the prompt, too.
    assert pair(row, "here")["prompt"] == turns
    assert pair(row | {"prompt": "hello"}, "here")["prompt"] == turns[:1]


def test_an_answer_that_has_begun_goes_on():
    row = {"prompt": [user(QUESTION), assistant("the sky")]}
    row |= {"chosen": [assistant(" is blue")], "rejected": [assistant(" is green")]}
    made = tokenize_preference(row, TOKENIZER)
    assert TOKENIZER.decode(made["prompt_ids"]).endswith("assistant\nthe sky")
    assert made["prompt_ids"] + made["chosen_ids"] == PLAIN["prompt_ids"] + PLAIN["chosen_ids"]
    for repeated in (
        {"chosen": [assistant("the sky")]},
        {c: PAIR[c] for c in ("chosen", "rejected")},
    ):
        with pytest.raises(
            ValueError, match="row 2: the prompt ends in the beginning of an answer"
        ):
            tokenize_preference(row | repeated, TOKENIZER, index=2)


CALL = {"type": "function", "function": {"name": "search", "arguments": {"what": "sky"}}}
CALLS = {"role": "assistant", "tool_calls": [CALL]}
NAMES = "{% for c in m.tool_calls or [] %}!{{ c.function.name }}{% endfor %};"
WRITES = "{{ m['role'] }}:{{ m['content'] }}" + NAMES
TEMPLATES = {
    "writes whatever content is": WRITES,
    "adds to content": WRITES.replace("{{ m['content'] }}", "{{ '' + m['content'] }}"),
    "asks whether it is none": "{% if m['content'] is none %}{{ m['role'] }}:!search;"
    "{% else %}" + WRITES + "{% endif %}",
    "asks for tool calls": "{% if m.tool_calls %}{{ m['role'] }}:!search;{% else %}"
    "{{ m['role'] }}:{{ m['content'] }};{% endif %}",
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("content", [{}, {"content": None}])
def test_tool_calls_without_content(name, content):
    template = "{% for m in messages %}" + TEMPLATES[name] + "{% endfor %}"
    tokenizer = make_tokenizer(template=template)
    prompt = [user("a"), {**CALLS, **content}, {"role": "tool", "content": "b"}]
    row = {"prompt": prompt, "chosen": [assistant("c")], "rejected": [{**CALLS, **content}]}
    expected = "user:a;assistant:!search;tool:b;assistant:"
    for made in (
        tokenize_preference(row, tokenizer, eos_token_ids=EOS),
        prepare_dataset(Dataset.from_list([row]), tokenizer)[0],
    ):
        text = tokenizer.decode(made["prompt_ids"] + made["chosen_ids"])
        assert text == expected + "c;<|im_end|>"
        text = tokenizer.decode(made["prompt_ids"] + made["rejected_ids"])
        assert text == expected + "!search;<|im_end|>"


@pytest.mark.filterwarnings("error")
def test_a_tool_answers_a_call_that_ends_the_prompt():
    row = {"prompt": [user("a"), CALLS | {"content": "hello"}]}
    row["chosen"] = [{"role": "tool", "content": "b"}, assistant("d")]
    row["rejected"] = [{"role": "tool", "content": "e"}, assistant("d")]
    made = tokenize_preference(row, TOKENIZER)
    assert TOKENIZER.decode(made["prompt_ids"]).endswith("hello<|im_end|>\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "why?"} | {c: [user(QUESTION), *PAIR[c]] for c in ("chosen", "rejected")},
         "mixed formats: 'prompt' is a string"),
        ({"chosen": [user("why?"), assistant(GOOD)]},
         "the response in 'chosen' begins with a message of role 'user'"),
        ({"prompt": [user([{"type": "image", "image": "a.png"}, *parts("what?")])]},
         "'prompt': message 0 has a part of type 'image'"),
        ({"chosen": [assistant([{"type": "text", "text": None}])]},
         "'chosen': message 0 has a part of type 'text'"),
        ({"prompt": [user(None)]}, "'prompt': message 0 is not an object with 'role'"),
        ({"prompt": [user(7)]}, "'prompt': message 0 is not an object"),
        ({"prompt": [user({"text": "what?"})]}, "'prompt': message 0 is not an object"),
        ({"prompt": [said("robot", "what?")]}, "'prompt': message 0 is from 'robot'"),
        ({"prompt": []}, "'prompt': expected text or a list of messages"),
        ({"chosen": [assistant("a \ud83d b")]}, "'chosen': message 0 has half of a"),
        ({"prompt": "a", "chosen": "b", "rejected": "\udce9"}, "'rejected' has half of a"),
        ({"prompt": "[{'role': 'user', 'content': 'what?'}]"}, "'prompt' holds messages in Py"),
        ({"chosen": "[{'from': 'gpt', 'value': 'a'}]"}, "'chosen' holds messages in Py"),
        ({"tools": "[{"}, "'tools' is not valid JSON"),
        (SYSTEM_FORMS["in the lists only"]
         | {"prompt": [{**SYSTEM, "content": "no"}, user(QUESTION)]},
         "two system messages: 'no' and 'hello'"),
        ({"chosen": [SYSTEM, user(QUESTION), assistant(GOOD)],
          "rejected": [user(QUESTION), assistant(BAD)]}, "a system message in 'chosen' or"),
    ],
)  # fmt: skip
def test_what_is_refused(change, message):
    with pytest.raises(ValueError, match=f"row 5: {message}"):
        tokenize_preference(PAIR | change, TOKENIZER, index=5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "sum up", "input": "a text", "chosen": "b", "rejected": "c"},
         "'instruction' and 'input' may both be the prompt"),
        ({"question": "", "chosen": "a b", "rejected": "a c"}, "the prompt is empty: question"),
        ({"question": "a", "chosen": "a b", "rejected": "a c"},
         "'chosen' and 'rejected' both begin with 'question'"),
        ({"question": "a", "system": 3, "chosen": "b", "rejected": "c"}, "'system' is not a str"),
    ],
)  # fmt: skip
def test_what_is_refused_of_other_names(row, message):
    with pytest.raises(ValueError, match=f"here: {message}"):
        pair(row, "here")


def test_text_that_is_json_stays_text():
    for text in ('{"value": 10}', '[{"content": 3}]', "{'role': 'x'}", '{"role": "x", '):
        row = {"prompt": "make JSON: ", "chosen": text, "rejected": "no"}
        assert pair(row, "here") == row


def test_a_template_that_refuses_names_the_row():
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    failing = "{{ messages[0].content + 1 }}"
    dataset = Dataset.from_list([PAIR, WITH_SYSTEM])
    for template, row in ((refusing + TEMPLATE, 1), (failing, 0)):
        tokenizer = make_tokenizer(template=template)
        with pytest.raises(
            ValueError, match=f"row {row}: the chat template refuses the messages: "
        ):
            prepare_dataset(dataset, tokenizer)
    with pytest.raises(ValueError, match=r"row 0: .*chat_template is not set"):
        prepare_dataset(dataset, make_tokenizer(template=None))
