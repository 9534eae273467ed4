"""``qadapter anchors`` writes what `make_anchors` makes, and never over what is there unasked."""

import json

import pytest
from peft import LoraConfig

from qadapter import QAdapterModel
from qadapter.cli import main
from qadapter.training import anchor_texts
from qadapter.training.anchor_texts import make_anchors
from tests.tiny_models import make_base, perturb


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("models")
    make_base("llama", vocab=len(tiny_tokenizer)).save_pretrained(folder / "base")
    tiny_tokenizer.save_pretrained(folder / "base")
    model = QAdapterModel.from_pretrained(folder / "base", lora_config=LoraConfig(r=4))
    perturb(model).save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def run(folder, tmp_path):
    """Run the command; returns (status, the output's rows)."""

    def call(*options, model="base", output="a.jsonl"):
        path = tmp_path / output
        limits = ["--max-new-tokens", "6", "--max-prompt-tokens", "8"]
        command = ["anchors", "--model", str(folder / model), "--output", str(path), *limits]
        status = main([*command, *options])
        lines = path.read_text().splitlines() if path.exists() else []
        return status, [json.loads(line) for line in lines]

    return call


def last_error(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_what_it_makes_and_shows(run, folder, tiny_tokenizer, capsys):
    status, rows = run("--count", "6", "--seed", "3", "--show", "2", "--batch-size", "4")
    assert status == 0
    shown = capsys.readouterr()
    model = QAdapterModel.from_pretrained(folder / "base")
    limits = {"max_new_tokens": 6, "max_prompt_tokens": 8, "progress": False}
    assert rows == make_anchors(model, tiny_tokenizer, 6, seed=3, batch_size=4, **limits)
    question, answer = (message["content"] for message in rows[0]["messages"])
    assert f"user> {question}\nassistant> {answer}" in shown.out
    assert rows[1]["messages"][0]["content"] in shown.out
    assert rows[2]["messages"][0]["content"] not in shown.out
    assert ("[...]" in shown.out) == any(row["truncated"] for row in rows[:2])
    cut = sum(row["truncated"] for row in rows)
    assert "6 anchors in " in shown.err and f"{cut} of them cut" in shown.err
    assert f"left out as duplicates or empty: {rows[-1]['draw'] - 5}" in shown.err


def test_an_adapter_stands_for_its_base(run):
    assert run("--count", "3", model="adapter") == run("--count", "3", output="b.jsonl")


def test_what_is_there_is_kept_continued_or_replaced(run, tmp_path, capsys):
    _, rows = run("--count", "3")
    assert run("--count", "5") == (2, rows)
    assert "--output" in (error := last_error(capsys)) and "--resume goes on with it" in error
    status, more = run("--count", "5", "--resume")
    assert status == 0 and len(more) == 5 and more[:3] == rows
    assert run("--count", "5", "--resume", "--seed", "1") == (2, more)
    assert "seed (0 there, 1 now)" in last_error(capsys)
    status, other = run("--count", "2", "--overwrite", "--seed", "1")
    assert status == 0 and len(other) == 2 and other[0] != rows[0]


def test_an_interrupt_says_how_to_go_on(run, monkeypatch, capsys):
    _, whole = run("--count", "5", "--batch-size", "2", output="whole.jsonl")
    calls, original = [], anchor_texts.answer

    def answer_or_stop(*arguments, **options):
        calls.append(arguments)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(anchor_texts, "answer", answer_or_stop)
        status, rows = run("--count", "5", "--batch-size", "2")
    assert status == 130 and 0 < len(rows) < 5
    assert "--resume goes on" in capsys.readouterr().err
    assert run("--count", "5", "--batch-size", "2", "--resume") == (0, whole)


def test_given_prompts(run, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    asked = ["tell me about the cat", "why", "Why"]
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in asked))
    status, rows = run("--prompts", str(prompts))
    assert status == 0
    assert [row["messages"][0]["content"] for row in rows] == asked[:2]
    assert "repeated, unanswered or beyond --count: 1" in last_error(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--count", "0"), "--count: expected 1 or more, got 0"),
        (("--max-new-tokens", "0"), "--max-new-tokens: expected 1 or more, got 0"),
        (("--max-prompt-tokens", "-1"), "--max-prompt-tokens: expected 1 or more, got -1"),
        (("--batch-size", "0"), "--batch-size: expected 1 or more, got 0"),
        (("--show", "-1"), "--show: expected 0 or more, got -1"),
        (("--seed", str(2**63)), "seed: expected an integer of at most 64 bits"),
        (("--max-new-tokens", "300"), "more than the model's 256 positions"),
        (("--prompts", "nowhere.jsonl"), "no such file: nowhere.jsonl"),
        (("--model", "./nowhere"), "./nowhere: no such folder"),
        (("--output", "."), "--output: . is a folder, expected a file"),
    ],
)
def test_bad_arguments_are_one_line(run, capsys, options, message):
    status, rows = run(*options)
    assert status == 2 and rows == []
    assert message in last_error(capsys)
