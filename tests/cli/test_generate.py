"""``qadapter generate`` answers every prompt once, goes on where it stopped, names bad input."""

import io
import json

import pytest

from qadapter import QAdapterModel
from qadapter.cli import generate, main
from qadapter.text.answers import derived_seed
from qadapter.text.prompts import encode_prompts
from tests.tiny_models import save_two_adapters
from tests.tiny_text import template_with_variables, word_tokenizer

ROWS = [
    {"prompt": "tell me about the cat", "id": "a", "source": {"page": 3}},
    {"messages": [{"role": "system", "content": "short ."}, {"role": "user", "content": "hello"}]},
    {"prompt": [{"role": "user", "content": "who ran over the old red house"}], "strength": 0.25},
    {"prompt": "the big dog", "seed": 7, "response": "mine", "text": "naïve 猫"},
    {"prompt": "why"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    """A base and two adapters of it, saved."""
    return save_two_adapters(tmp_path_factory.mktemp("models"), tiny_tokenizer)


@pytest.fixture
def run(folder, tmp_path):
    """Run generate with an input file; returns (status, the output's rows)."""

    def call(*options, rows=ROWS, output="out.jsonl", adapter=None):
        write(tmp_path / "in.jsonl", rows)
        status = main(
            [
                "generate", "--adapter", *([str(folder / "one")] if adapter is None else adapter),
                "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / output),
                "--max-new-tokens", "6", *options,
            ]
        )  # fmt: skip
        path = tmp_path / output
        return status, read(path) if path.exists() else None

    return call


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def last_error(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_what_the_chat_template_is_given(tmp_path, capsys):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template_with_variables()
    folder = save_two_adapters(tmp_path, tokenizer)
    loud, quiet = ({"chat_template_kwargs": {"loud": value}} for value in (True, False))
    rows = [{"prompt": "why"}, {"prompt": "why", **loud}, {"prompt": "why", **quiet}]
    write(tmp_path / "in.jsonl", rows)

    def answers(*options):
        command = ["generate", "--adapter", str(folder / "one"), "--max-new-tokens", "6"]
        files = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
        assert main([*command, *files, *options]) == 0
        return read(tmp_path / "out.jsonl")

    def prompted(text):
        model = QAdapterModel.from_pretrained(folder / "one")
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        made = model.generate(
            ids, max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0
        )
        return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)

    want = {loud: prompted(f"{'very ' * loud}<u> why </s> <b>") for loud in (False, True)}
    assert want[False] != want[True]
    said = [row["response"] for row in answers()]
    assert said == [want[False], want[True], want[False]]
    made = answers("--chat-template-kwargs", '{"loud": true}')
    assert [row["response"] for row in made] == [want[True], want[True], want[False]]
    assert made[1]["chat_template_kwargs"] == {"loud": True}
    for given in ("{loud", "[1]", '{"tokenize": true}'):
        with pytest.raises(SystemExit):
            answers("--chat-template-kwargs", given)
        assert "--chat-template-kwargs: " in last_error(capsys)


SAMPLED = ("--temperature", "1", "--seed", "3")


def test_answers_in_order_with_the_rows_own_fields(run, folder, tmp_path):
    status, made = run("--strength", "2", *SAMPLED, "--batch-size", "2")
    assert status == 0
    assert [row["index"] for row in made] == [0, 1, 2, 3, 4]
    assert made[0]["id"] == "a" and made[0]["source"] == {"page": 3}
    assert [row["strength"] for row in made] == [2, 2, 0.25, 2, 2]
    assert made[3]["text"] == "naïve 猫" and made[3]["input_response"] == "mine"
    assert made[3]["response"] != "mine"
    assert made[1]["prompt"] == ROWS[1]["messages"] and made[4]["prompt"] == "why"
    assert made[3]["seed"] == 7 and made[4]["seed"] == derived_seed(3, 4)
    for row in made:
        assert 1 <= row["tokens"] <= 6 and row["mean_logprob"] < 0
        assert row["finish_reason"] == ("length" if row["tokens"] == 6 else "eos")
        assert row["adapters"] == {"default": 1.0}
        assert row["alpha_0"] is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_the_answers_are_those_of_the_model(run, folder, tiny_tokenizer):
    _, made = run("--strength", "0.5", "--batch-size", "5")
    model = QAdapterModel.from_pretrained(folder / "one")
    prompts = [row.get("prompt", row.get("messages")) for row in ROWS]
    for i, prompt in enumerate(prompts):
        inputs = encode_prompts(tiny_tokenizer, [prompt])
        strength = ROWS[i].get("strength", 0.5)
        ids = model.generate(**inputs, strength=strength, max_new_tokens=6, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        assert made[i]["response"] == tiny_tokenizer.decode(new, skip_special_tokens=True)


def test_draws_do_not_depend_on_the_batch(run):
    options = (*SAMPLED, "--num-return-sequences", "2", "--strength", "0", "1")
    _, one = run("--batch-size", "1", *options, output="one.jsonl")
    _, many = run("--batch-size", "7", *options, output="many.jsonl")
    assert len(one) == 18  # 4 rows at 2 strengths, one at its own
    for a, b in zip(one, many, strict=True):
        assert a.pop("mean_logprob") == pytest.approx(b.pop("mean_logprob"), abs=1e-4)
        assert a == b
    assert one[0]["response"] != one[1]["response"]  # another sample of the same row
    _, other = run("--temperature", "1", "--seed", "4", output="other.jsonl")
    assert [r["response"] for r in other] != [r["response"] for r in one if r["sample"] == 0][:5]


def test_a_rows_seed_repeats_it_elsewhere(run):
    _, first = run(*SAMPLED)
    again = [{"prompt": "why", "seed": first[4]["seed"]}, {"prompt": "why"}]
    _, made = run(*SAMPLED, rows=again, output="again.jsonl")
    assert made[0]["response"] == first[4]["response"]
    assert made[1]["seed"] != made[0]["seed"]


def interrupt_after(monkeypatch, count, error=KeyboardInterrupt):
    """Fails in the batch after ``count`` of them; returns the batches that were made."""
    made, original = [], generate._Maker.answers

    def answers_or_stop(self, batch, streamer=None):
        if len(made) == count:
            raise error
        made.append(list(batch))
        return original(self, batch, streamer)

    monkeypatch.setattr(generate._Maker, "answers", answers_or_stop)
    return made


@pytest.mark.parametrize("cut", [False, True])
def test_resume_after_an_interrupt(run, tmp_path, monkeypatch, capsys, cut):
    options = (*SAMPLED, "--batch-size", "2")
    _, whole = run(*options, output="whole.jsonl")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        status, made = run(*options)
    assert status == 130 and made is None
    partial = tmp_path / "out.jsonl.partial"
    assert len(partial.read_text().splitlines()) == 1 + 4  # the row with a strength is a batch
    assert "4 of 5 answers" in capsys.readouterr().err
    if cut:
        partial.write_bytes(partial.read_bytes()[:-9])

    assert run(*options)[0] == 2  # not over what is there
    assert "--resume" in last_error(capsys)
    with monkeypatch.context() as patch:
        batches = interrupt_after(patch, 99)
        status, made = run(*options, "--resume")
    assert status == 0 and made == whole
    assert len(batches) == (2 if cut else 1)
    assert not partial.exists()


def test_a_seed_that_was_drawn_is_kept(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert run("--temperature", "1", "--batch-size", "2")[0] == 130
    drawn = read(tmp_path / "out.jsonl.partial")[0]["seed"]
    status, made = run("--temperature", "1", "--batch-size", "2", "--resume")
    assert status == 0
    assert [r["seed"] for r in made] == [7 if i == 3 else derived_seed(drawn, i) for i in range(5)]


@pytest.mark.parametrize(
    ("options", "rows", "named"),
    [
        (("--temperature", "0.5"), ROWS, "--temperature (1.0 then, 0.5 now)"),
        (("--strength", "2"), ROWS, "--strength (None then, [2.0] now)"),
        (("--stop", "the"), ROWS, "--stop"),
        (("--weight", "default=0.5"), ROWS, "the adapters or their weights"),
        ((), [*ROWS[:4], {"prompt": "who"}], "in.jsonl"),
    ],
)
def test_resume_refuses_what_changed(run, monkeypatch, capsys, options, rows, named):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        assert run(*SAMPLED)[0] == 130
    assert run(*SAMPLED, *options, "--resume", rows=rows) == (2, None)
    error = last_error(capsys)
    assert "was made with other settings" in error and named in error
    assert run(*SAMPLED, "--resume", "--batch-size", "1")[0] == 0


def test_a_failure_at_the_end_leaves_the_old_file(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "out.jsonl").write_text('{"old": 1}\n')

    def full(path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(generate.files, "replacing_file", full)
        status, made = run()
    assert status == 2 and made == [{"old": 1}]
    assert "No space left" in last_error(capsys)
    status, made = run("--resume")
    assert status == 0 and len(made) == 5


def test_a_failure_keeps_what_was_made_and_nothing_else(run, tmp_path, monkeypatch, capsys):
    for count in (0, 1):
        with monkeypatch.context() as patch:
            interrupt_after(patch, count, ValueError("logits are NaN"))
            assert run("--batch-size", "2") == (2, None)
        assert "logits are NaN" in last_error(capsys)
        assert (tmp_path / "out.jsonl.partial").exists() == (count > 0)
    status, made = run("--batch-size", "2", "--resume")
    assert status == 0 and len(made) == 5


def test_strengths_share_a_batch_only_where_there_are_few(run, monkeypatch):
    rows = [{"prompt": "a cat " * i} for i in range(1, 4)]
    batches = interrupt_after(monkeypatch, 99)
    run("--strength", "0", "1", "--batch-size", "2", rows=rows)
    assert [{r.strength for r in batch} for batch in batches] == [{0}, {0}, {1}, {1}]
    assert [r.row for r in batches[0]] == [2, 1]  # the longest first
    batches.clear()
    run("--strength", "0", "1", "--batch-size", "8", rows=rows)
    assert [r.strength for r in batches[0]] == [0, 1] * 3 and len(batches) == 1
    # Left to the adapter is not a strength.
    batches.clear()
    run("--batch-size", "8", rows=[*rows, {"prompt": "why", "strength": 2}])
    assert [[r.strength for r in batch] for batch in batches] == [[None] * 3, [2]]


@pytest.mark.parametrize(
    "lines", ["tell me\n\nwhy {\n", '{"prompt": "tell me"}\n{"prompt": "why {"}\n']
)
def test_pipes(folder, run, monkeypatch, capsys, lines):
    _, expected = run(rows=[{"prompt": "tell me"}, {"prompt": "why {"}])
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    capsys.readouterr()
    command = ["generate", "--adapter", str(folder / "one"), "--max-new-tokens", "6"]
    assert main([*command, "--input", "-", "--output", "-"]) == 0
    made = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert made == expected


def test_bad_pipes_are_named(folder, monkeypatch, capsys):
    command = ["generate", "--adapter", str(folder / "one"), "--input", "-"]
    for text, message in (
        ('{"prompt": "a"}\nb\n', "stdin, line 2: not valid JSON"),
        ('{"prompt": "a"}\n{"a": "b"}\n', "stdin, line 2: expected one of the fields"),
        ("\n", "stdin: no rows"),
    ):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert main(command) == 2
        assert message in last_error(capsys)


def test_the_bases_own_settings_do_not_count(folder, tmp_path, run):
    _, plain = run()
    settings = folder / "base" / "generation_config.json"
    before = settings.read_text()
    try:
        settings.write_text(json.dumps({**json.loads(before), "repetition_penalty": 9.0}))
        _, made = run(output="again.jsonl")
    finally:
        settings.write_text(before)
    assert made == plain


def test_damaged_partial(run, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        assert run()[0] == 130
    partial = tmp_path / "out.jsonl.partial"
    lines = partial.read_text().splitlines(keepends=True)
    partial.write_text(lines[0] + "{oops\n" + "".join(lines[2:]))
    assert run("--resume") == (2, None)
    assert "out.jsonl.partial, line 2: damaged" in last_error(capsys)
    partial.write_text(lines[0][:20])  # the disk was full at the very start
    assert run("--resume")[0] == 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*ROWS[:2], {"prompt": "a", "strength": -0.5}], "in.jsonl, line 3: strength: expected 0"),
        ([{"prompt": "a"}, {"text": "a"}], "line 2: expected one of the fields 'prompt' and"),
        ([{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}], "both are there"),
        ([{"prompt": "a"}, {"prompt": " "}], "line 2: prompt: expected some text"),
        ([{"messages": []}], "line 1: messages: expected text or a list"),
        ([{"messages": [{"role": "user"}]}], "line 1: messages: message 0"),
        ([{"prompt": "a", "seed": 1.5}], "line 1: seed: expected an integer"),
        ([{"prompt": "a", "strength": True}], "line 1: strength"),
        ([{"prompt": "a", "strength": float("nan")}], "line 1: strength"),
        ([3], "line 1: expected an object or a string"),
        ([], "no rows"),
        ([{"prompt": "a"}, {"prompt": "the " * 260}], "line 2: the prompt has 2"),
    ],
)
def test_bad_rows_are_named(run, tmp_path, capsys, rows, message):
    assert run(rows=rows) == (2, None)
    error = last_error(capsys)
    assert error.startswith("qadapter: error: ") and message in error and "in.jsonl" in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--adapter", "{dir}/nothing"), "nothing is not the folder of a saved adapter"),
        (("--adapter", "{dir}/one", "--adapter", "{dir}/two"), "need a name each"),
        (("--adapter", "a={dir}/one", "--adapter", "a={dir}/two"), "a is given twice"),
        (("--adapter", "a={dir}/one", "--weight", "b=1"), "no adapter 'b'; known are a"),
        (("--adapter", "a={dir}/one", "--weight", "a=x"), "--weight: a: expected a number"),
        (("--adapter", "a={dir}/one", "--weight", "a"), "expected NAME=NUMBER"),
        (("--adapter", "{dir}/one", "--strength", "-1"), "--strength: expected 0"),
        (("--adapter", "{dir}/one", "--strength", "1", "--alpha-0", "1"), "not both"),
        (("--adapter", "{dir}/one", "--top-p", "0"), "--top-p: expected a number in (0, 1]"),
        (("--adapter", "{dir}/one", "--alpha-tilde", "0"), "--alpha-tilde: expected more than 0"),
        (("--adapter", "{dir}/one", "--alpha-0", "nan"), "--alpha-0: expected a finite number"),
        (("--adapter", "{dir}/one", "--batch-size", "0"), "--batch-size: expected 1 or more"),
        (("--adapter", "{dir}/one", "--resume"), "--resume: only an --output"),
        (("--adapter", "{dir}/one", "--output", "{dir}"), "is a folder"),
        (("--adapter", "{dir}/one", "--prompt", ""), "expected some text"),
    ],
)
def test_bad_options_are_named(folder, capsys, options, message):
    prompt = () if "--prompt" in options else ("--prompt", "a")
    assert main(["generate", *prompt, *(option.format(dir=folder) for option in options)]) == 2
    assert message in last_error(capsys)


def test_stop_strings(run, tiny_tokenizer):
    _, free = run("--strength", "2")
    texts = [row["response"].split() for row in free]
    number = [len(text) for text in texts].index(6)  # words only, no special tokens
    words = texts[number]
    stop = words[3]
    at = words.index(stop)
    _, made = run("--strength", "2", "--stop", stop, output="stopped.jsonl")
    row = made[number]
    assert row["finish_reason"] == "stop" and row["tokens"] == at + 1
    assert row["response"].split() == words[:at]
    # A stop string in the prompt ends nothing.
    (row,) = run("--stop", "cat", rows=[{"prompt": "the cat"}], output="prompt.jsonl")[1]
    assert row["finish_reason"] != "stop" or row["tokens"] > 1


def test_on_the_terminal(folder, capsys, monkeypatch):
    command = ["generate", "--adapter", str(folder / "one"), "--max-new-tokens", "12"]
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*command, "--prompt", "a cat", "--strength", "0"]) == 0
    alone = capsys.readouterr().out
    assert main([*command, "--prompt", "a cat", "--prompt", "a dog", "--strength", "0", "3"]) == 0
    out = capsys.readouterr().out
    assert "> a cat" in out and "> a dog" in out
    head, rule, *lines = out.splitlines()[1:]
    assert head.split(" | ")[1].strip() == "strength 3" and set(rule) == {"-", " ", "|"}
    assert all(len(line) <= 80 for line in out.splitlines())
    first = " ".join(line.split(" | ")[0].strip() for line in lines[: lines.index("")])
    assert first.split() == alone.split()
    monkeypatch.setattr("sys.stdin", io.StringIO("a cat\n"))
    assert main([*command, "--strength", "0"]) == 0
    assert capsys.readouterr().out == alone


def test_several_adapters_add(run, folder):
    both = [f"one={folder / 'one'}", "--adapter", f"two={folder / 'two'}"]
    _, alone = run("--strength", "1.5", "--repetition-penalty", "1.3")
    _, off = run(
        "--strength", "1.5", "--weight", "two=0", "--repetition-penalty", "1.3",
        adapter=both, output="off.jsonl",
    )  # fmt: skip
    assert [r["response"] for r in off] == [r["response"] for r in alone]
    assert off[0]["adapters"] == {"one": 1.0, "two": 0.0}
    _, blended = run("--strength", "1.5", "--weight", "two=0.7", adapter=both, output="b.jsonl")
    assert [r["response"] for r in blended] != [r["response"] for r in alone]
    assert blended[0]["adapters"] == {"one": 1.0, "two": 0.7}
