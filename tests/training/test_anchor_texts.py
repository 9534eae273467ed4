"""Anchor texts are samples of the base alone, each once, whatever interrupts their making."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig
from torch import nn

from qadapter import QAdapterModel
from qadapter.text.anchors import tokenize_anchor
from qadapter.text.answers import derived_seed
from qadapter.text.messages import message_list
from qadapter.training import anchor_texts
from qadapter.training.anchor_files import append, read_anchors
from qadapter.training.anchor_texts import chat_turns, make_anchors
from tests.text.chat_tokenizer import make_tokenizer
from tests.tiny_models import make_base, perturb
from tests.tiny_text import template_with_variables, word_tokenizer

SHORT = {"max_new_tokens": 16, "max_prompt_tokens": 8, "progress": False}


def make_model(base=None, *, moved=True):
    base = make_base("llama", vocab=len(word_tokenizer())) if base is None else base
    model = QAdapterModel.from_base(base, lora_config=LoraConfig(r=4, target_modules="all-linear"))
    return perturb(model) if moved else model


def with_probabilities(probabilities):
    """A base that draws from these words whatever came before."""
    tokenizer = word_tokenizer()
    base = make_base("llama", vocab=len(tokenizer))
    base.lm_head = nn.Linear(32, len(tokenizer))
    with torch.no_grad():
        base.lm_head.weight.zero_()
        base.lm_head.bias.fill_(-1e4)
        for word, p in probabilities.items():
            base.lm_head.bias[tokenizer.convert_tokens_to_ids(word)] = float(torch.tensor(p).log())
    return make_model(base, moved=False)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def expected(model):
    return make_anchors(model, word_tokenizer(), 10, batch_size=4, **SHORT)


def drawn(model, prompt, seed, tokens, ends):
    """What the base alone says: its own loop, one row, up to an end; and whether it came to one."""
    ids = model.generate(
        torch.tensor([prompt]),
        strength=0,
        base_settings=False,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        seed=torch.tensor([seed]),
        max_new_tokens=tokens,
        eos_token_id=ends,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    ended = bool(ids) and ids[-1] in ends
    return ids[:-1] if ended else ids, ended


def check_drawn(rows, model, tokenizer, ends):
    header = tokenizer("<u>", add_special_tokens=False).input_ids
    for row in rows:
        question, answer = row["messages"]
        assert (question["role"], answer["role"]) == ("user", "assistant")
        ids, _ = drawn(model, header, derived_seed(0, 2 * row["draw"]), 8, ends)
        assert question["content"] == tokenizer.decode(ids, skip_special_tokens=True)
        prompt = tokenizer.apply_chat_template(
            row["messages"][:1], add_generation_prompt=True, return_dict=False
        )
        ids, ended = drawn(model, prompt, derived_seed(0, 2 * row["draw"] + 1), 16, ends)
        assert answer["content"] == tokenizer.decode(ids, skip_special_tokens=True)
        assert row["truncated"] == (not ended)


def test_rows_are_what_the_base_asks_and_answers(model, expected):
    assert len(expected) == 10
    check_drawn(expected, make_model(moved=False), word_tokenizer(), [2])
    assert {row["truncated"] for row in expected} == {True, False}
    assert list(model._streams) == [(None,)]  # one stream, that of the base


def test_draws_have_the_probabilities_of_the_base():
    model = with_probabilities({"cat": 0.5, "dog": 0.2, "bird": 0.1, "</s>": 0.2})
    # Settings of the base that would move them.
    model.generation_config.update(top_p=0.6, top_k=2, repetition_penalty=5.0, temperature=0.3)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = None
    rows = make_anchors(model, tokenizer, 300, max_new_tokens=40, progress=False)
    words = " ".join(row["text"] for row in rows).split()
    for word, p in (("cat", 0.625), ("dog", 0.25), ("bird", 0.125)):
        # Short texts are all duplicates after a while, so long ones are what is left.
        assert words.count(word) / len(words) == pytest.approx(p, abs=0.05)
    assert sum(not row["truncated"] for row in rows) > 290


def test_ends_are_those_of_the_template(model):
    """A turn may end in what is no end token of the model's."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<u> {{ m['content'] }} <b>"
        "{% else %} {{ m['content'] }} cat {% endif %}{% endfor %}"
    )
    assert chat_turns(tokenizer) == ("<u>", "<b>", "cat")
    base = with_probabilities({"dog": 0.5, "<b>": 0.2, "cat": 0.3})
    rows = make_anchors(base, tokenizer, 4, **{**SHORT, "max_prompt_tokens": 30})
    for row in rows:
        assert set(row["messages"][1]["content"].split()) == {"dog"}
    assert not all(row["truncated"] for row in rows)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_texts_do_not_depend_on_the_batch(model, expected, batch_size):
    rows = make_anchors(model, word_tokenizer(), 10, batch_size=batch_size, **SHORT)
    assert rows == expected


def test_another_seed_is_another_set(model, expected):
    other = make_anchors(model, word_tokenizer(), 10, seed=1, **SHORT)
    assert not {str(row["messages"]) for row in other} & {str(row["messages"]) for row in expected}


@pytest.mark.parametrize(
    ("calls", "cut"), [(0, 0), (1, 0), (2, 0), (2, 9), (3, 5000), (4, 9), (5, 0)]
)
def test_interrupted_it_goes_on_to_the_same(model, expected, tmp_path, monkeypatch, calls, cut):
    path = tmp_path / "anchors.jsonl"
    done, original = [], anchor_texts.answer

    def answer_or_stop(*arguments, **options):
        done.append(arguments)
        if len(done) > calls:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(anchor_texts, "answer", answer_or_stop)
        with pytest.raises(KeyboardInterrupt):
            make_anchors(model, word_tokenizer(), 10, batch_size=4, path=path, **SHORT)
    if calls < 2:  # questions and answers of the first batch
        assert not path.exists()
    else:
        path.write_bytes(path.read_bytes()[: -cut or None])  # in the middle of a row
    rows = make_anchors(model, word_tokenizer(), 10, batch_size=4, path=path, **SHORT)
    assert rows == expected
    assert [json.loads(line) for line in path.read_text().splitlines()] == expected
    monkeypatch.setattr(anchor_texts, "answer", None)  # nothing is made any more
    assert make_anchors(model, word_tokenizer(), 10, batch_size=4, path=path, **SHORT) == expected
    assert make_anchors(model, word_tokenizer(), 3, path=path, **SHORT) == expected[:3]


def test_more_of_them_go_on_with_those_that_are_there(model, expected, tmp_path):
    path = tmp_path / "anchors.jsonl"
    make_anchors(model, word_tokenizer(), 4, path=path, **SHORT)
    assert make_anchors(model, word_tokenizer(), 10, path=path, **SHORT) == expected


def test_duplicates_are_replaced():
    model = with_probabilities({"cat": 0.6, "dog": 0.2, "bird": 0.19, "</s>": 0.01})
    short = {**SHORT, "max_prompt_tokens": 1}
    rows = make_anchors(model, word_tokenizer(), 3, seed=3, batch_size=2, **short)
    assert {row["messages"][0]["content"] for row in rows} == {"cat", "dog", "bird"}
    assert rows[-1]["draw"] > 2


def test_a_base_that_repeats_itself_gives_what_there_is():
    model = with_probabilities({"cat": 0.5, "dog": 0.4, "</s>": 0.1})
    with pytest.warns(
        UserWarning, match=r"gave 2 of 9 texts in 36 draws \(\d+ were empty, \d+ dup"
    ):
        rows = make_anchors(model, word_tokenizer(), 9, **{**SHORT, "max_prompt_tokens": 1})
    assert len(rows) == 2


@pytest.mark.parametrize("template", [True, False])
def test_a_base_that_only_ends_is_an_error(tmp_path, template):
    tokenizer = word_tokenizer()
    if not template:
        tokenizer.chat_template = None
    model = with_probabilities({"</s>": 1.0})
    path = tmp_path / "anchors.jsonl"
    with pytest.raises(ValueError, match=r"no texts in 20 draws \(20 were empty, 0 duplicates"):
        make_anchors(model, tokenizer, 5, path=path, **SHORT)
    assert not path.exists()


def test_a_plain_model_writes_from_bos(model):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = None
    rows = make_anchors(model, tokenizer, 5, **SHORT)
    for row in rows:
        ids, ended = drawn(model, [1], derived_seed(0, 2 * row["draw"] + 1), 16, [2])
        assert row["text"] == tokenizer.decode(ids, skip_special_tokens=True)
        assert row["truncated"] == (not ended) and row["source"] == "start of text"
    tokenizer.bos_token = None
    (row,) = make_anchors(model, tokenizer, 1, **SHORT)
    ids, _ = drawn(model, [2], derived_seed(0, 2 * row["draw"] + 1), 16, [2])
    assert row["text"] == tokenizer.decode(ids, skip_special_tokens=True)


def test_nothing_to_begin_with_is_an_error():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = tokenizer.bos_token = tokenizer.eos_token = None
    model = make_model()
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="tokenizer: expected a chat template, a bos_token or"):
        make_anchors(model, tokenizer, 1, **SHORT)


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no') }}", "{{ messages[0]['content'] }}", "{{ messages | length }}"],
)
def test_a_template_without_a_header_is_said(model, template):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    with pytest.warns(UserWarning, match="shows no user header"):
        rows = make_anchors(model, tokenizer, 2, **SHORT)
    assert all(row["source"] == "start of text" and row["text"] for row in rows)


CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} "
    "[/INST]{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] }}{% else %} "
    "ASSISTANT: {{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "turns"),
    [
        (
            CHATML,
            (
                "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n",
                "<|im_end|>",
                "<|im_end|>",
            ),
        ),
        (INST, ("<s>[INST]", "[/INST]", "<|im_end|>")),
        (PLAIN, ("USER:", "ASSISTANT:", None)),
        ("{{ messages[0]['content'] }}", None),
        (None, None),
    ],
)
def test_turns_of_templates(template, turns):
    assert chat_turns(make_tokenizer(template=template)) == turns


def test_given_prompts_are_answered(model):
    tokenizer = word_tokenizer()
    prompts = [
        "tell me about the cat",
        [{"role": "user", "content": "hello"}],
        "  Hello ",  # again
        [
            {"role": "user", "content": "who"},
            {"role": "assistant", "content": "you"},
            {"role": "user", "content": "why"},
        ],
        [{"role": "user", "content": "what"}, {"role": "assistant", "content": "it is"}],
    ]
    rows = make_anchors(model, tokenizer, prompts=prompts, **SHORT)
    assert [row["draw"] for row in rows] == [0, 1, 2, 3]
    assert rows[0]["messages"][0] == {"role": "user", "content": prompts[0]}
    assert rows[2]["messages"][:3] == prompts[3]
    begun = rows[3]["messages"]
    assert len(begun) == 2 and begun[1]["content"].startswith("it is")
    for row in rows[:3]:
        text = tokenizer.apply_chat_template(
            row["messages"][:-1], add_generation_prompt=True, return_dict=False
        )
        ids, _ = drawn(model, text, derived_seed(0, 2 * row["draw"] + 1), 16, [2])
        assert row["messages"][-1]["content"] == tokenizer.decode(ids, skip_special_tokens=True)
    assert make_anchors(model, tokenizer, 2, prompts=prompts, **SHORT) == rows[:2]


def test_given_prompts_with_something_for_the_template(model):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template_with_variables()
    loud = {"chat_template_kwargs": {"loud": True}}
    prompts = ["why", {"prompt": "why", **loud}, {"prompt": "why", **loud}]
    rows = make_anchors(model, tokenizer, prompts=prompts, **SHORT)
    assert [row.get("chat_template_kwargs") for row in rows] == [None, {"loud": True}]
    ids = tokenizer("very <u> why </s> <b>", add_special_tokens=False).input_ids
    made = tokenize_anchor(rows[1], tokenizer)
    assert list(made.ids[: made.first + 1]) == ids
    said, _ = drawn(model, ids, derived_seed(0, 2 * rows[1]["draw"] + 1), 16, [2])
    assert rows[1]["messages"][-1]["content"] == tokenizer.decode(said, skip_special_tokens=True)


def test_given_prompts_of_a_plain_model_and_empty_answers(tmp_path):
    model = with_probabilities({"cat": 0.5, "</s>": 0.5})
    tokenizer = word_tokenizer()
    tokenizer.chat_template = None
    prompts = [f"the {word} " for word in ("cat", "dog", "bird", "tree", "house", "red", "blue")]
    path = tmp_path / "anchors.jsonl"
    with pytest.warns(UserWarning, match=r"of 7 answers in 7 prompts \(\d were empty, 0 dup"):
        rows = make_anchors(model, tokenizer, prompts=prompts, path=path, batch_size=3, **SHORT)
    assert 0 < len(rows) < 7
    for row in rows:
        rest = row["text"].removeprefix(prompts[row["draw"]])
        assert rest != row["text"] and set(rest.split()) == {"cat"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = make_anchors(model, tokenizer, prompts=prompts, path=path, batch_size=3, **SHORT)
    assert again == rows


def test_rows_load_as_conversations(expected, tmp_path):
    from datasets import load_dataset

    path = tmp_path / "anchors.jsonl"
    append(path, expected)
    loaded = load_dataset("json", data_files=[str(path)], split="train", cache_dir=str(tmp_path))
    for row, made in zip(loaded, expected, strict=True):
        assert message_list(row["messages"], "a row", "messages") == made["messages"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, r"line 1: made with other settings: seed \(0 there, 1 now\); take"),
        ({"max_new_tokens": 5}, r"max_new_tokens \(16 there, 5 now\)"),
        ({"max_prompt_tokens": 5}, r"max_prompt_tokens \(8 there, 5 now\)"),
        ({"prompts": ["why"]}, r"source \('user header' there, 'prompts [0-9a-f]{16}' now\)"),
    ],
)
def test_a_file_of_other_settings_is_refused(model, expected, tmp_path, options, message):
    path = tmp_path / "anchors.jsonl"
    append(path, expected)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        make_anchors(model, word_tokenizer(), 10, path=path, **{**SHORT, **options})
    assert path.read_bytes() == before


def test_a_file_of_another_base_is_refused(model, expected, tmp_path):
    path = tmp_path / "anchors.jsonl"
    append(path, expected)
    tokenizer = word_tokenizer()
    larger = make_model(make_base("llama", vocab=97))
    with pytest.raises(
        ValueError, match=r"line 1: made by another base: vocab_size \d\d there, 97"
    ):
        make_anchors(larger, tokenizer, 10, path=path, **SHORT)
    other = make_base("llama", vocab=len(tokenizer))
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(ValueError, match="another base: same shape, other weights"):
        make_anchors(make_model(other), tokenizer, 10, path=path, **SHORT)
    half = make_model(make_base("llama", vocab=len(tokenizer), dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"dtype \('float32' there, 'bfloat16' now\)"):
        make_anchors(half, tokenizer, 10, path=path, **SHORT)
    # Another adapter is the same base.
    assert make_anchors(make_model(moved=False), tokenizer, 10, path=path, **SHORT) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"}\nb', r"line 1: no anchor made by qadapter: without draw, base, source"),
        ("why\n\nhalf", "line 1: not valid JSON"),
    ],
)
def test_a_file_of_something_else_is_left_alone(model, tmp_path, content, message):
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        make_anchors(model, word_tokenizer(), 2, path=path, **SHORT)
    assert path.read_text() == content


def test_rows_out_of_order_are_refused(expected, tmp_path):
    path = tmp_path / "anchors.jsonl"
    append(path, [*expected[:2], expected[1]])
    with pytest.raises(ValueError, match="twice or out of order"):
        read_anchors(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count: expected an integer of 1 or more, got 0"),
        ({"count": 2.5}, r"count: expected an integer of 1 or more, got 2\.5"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected"),
        ({"max_prompt_tokens": True}, "max_prompt_tokens: expected an integer"),
        ({"batch_size": -1}, "batch_size: expected"),
        ({"seed": "x"}, "seed: expected an integer of at most 64 bits, got 'x'"),
        ({"max_new_tokens": 250}, "together have 259 tokens, more than the model's 256 positions"),
        ({"prompts": []}, r"prompts: expected a list of one or more, got \[\]"),
        ({"prompts": "why"}, "prompts: expected a list of one or more, got 'why'"),
        ({"prompts": ["why", " "]}, r"prompts\[1\]: prompt: expected some text"),
        (
            {"prompts": ["why " * 250]},
            r"prompts\[0\] and max_new_tokens have 269 tokens, more than the model's 256 positions",
        ),
    ],
)
def test_bad_arguments_are_named(model, options, message):
    with pytest.raises(ValueError, match=message):
        make_anchors(model, word_tokenizer(), **{**SHORT, **options})
