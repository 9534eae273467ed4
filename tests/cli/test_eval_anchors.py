"""``qadapter eval`` at a strength, with KL on anchors, and over strengths."""

import json

import pytest
from peft import LoraConfig

from qadapter import QAdapterModel
from qadapter.cli import main
from qadapter.model.checkpoint import fingerprint
from qadapter.training import frontier
from qadapter.training.anchors import anchor_texts
from tests.tiny_models import make_base, perturb
from tests.tiny_text import WORDS, preference_rows

STRENGTH = 0.625


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def anchor(number, **fields):
    answer = " ".join(WORDS[(3 * number + i) % 30] for i in range(3 + number % 4))
    messages = [{"role": "user", "content": f"what is {WORDS[number % 20]}"}]
    return {"messages": [*messages, {"role": "assistant", "content": answer}], **fields}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    """An adapter that keeps a budget, pairs, and anchors of another's making."""
    folder = tmp_path_factory.mktemp("models")
    make_base("llama", vocab=len(tiny_tokenizer)).save_pretrained(folder / "base")
    tiny_tokenizer.save_pretrained(folder / "base")
    model = perturb(QAdapterModel.from_pretrained(folder / "base", lora_config=LoraConfig(r=4)))
    model.recommended_strength, model.kl_budget = STRENGTH, 0.02
    model.save_pretrained(folder / "adapter")
    write(folder / "pairs.jsonl", preference_rows(4))
    own = [anchor(i, base=fingerprint(model.hf_model)) for i in range(21)]
    write(folder / "own.jsonl", own)
    write(folder / "mine.jsonl", [anchor(i) for i in range(30, 35)])
    other = {**own[0]["base"], "hidden_size": 8}
    write(folder / "other.jsonl", [anchor(1, base=other), anchor(2, base=other)])
    return folder


@pytest.fixture
def report(folder, tmp_path):
    def call(*options):
        command = ["eval", "--adapter", str(folder / "adapter"), "--max-examples", "4"]
        files = ["--data", str(folder / "pairs.jsonl"), "--unrelated", str(folder / "pairs.jsonl")]
        path = tmp_path / "report.json"
        status = main([*command, *files, "--json", str(path), *map(str, options)])
        return json.loads(path.read_text()) if status == 0 else None

    return call


def kl(folder, tokenizer, rows, strength):
    model = QAdapterModel.from_pretrained(folder / "adapter")
    texts = anchor_texts(rows, tokenizer, max_length=1024, eos_token_ids=[tokenizer.eos_token_id])
    options = {"batch_size": 4, "progress": False}
    return frontier.text_kl(
        model, tokenizer, texts, [model.composition_at(strength)], **options
    ).figures()


def test_at_a_strength_on_anchors_of_ones_own(report, folder, tiny_tokenizer, capsys):
    made = report("--strength", "recommended", "--anchors", folder / "mine.jsonl")
    assert made["strength"] == made["recommended_strength"] == STRENGTH
    assert made["alpha_0"] == made["alpha_tilde"] == 1 / STRENGTH
    rows = [anchor(i) for i in range(30, 34)]  # --max-examples
    figures = kl(folder, tiny_tokenizer, rows, STRENGTH)
    anchors = made["anchors"]
    assert (anchors["texts"], anchors["source"]) == (4, str(folder / "mine.jsonl"))
    assert {k: anchors[k] for k in figures} == pytest.approx(figures, rel=1e-5)
    assert 0 < anchors["kl_low"] < anchors["kl_base_policy"] < anchors["kl_high"]
    assert "strengths" not in made
    out, err = capsys.readouterr()
    assert "anchors (4 texts, " in out and ", budget 0.02" in out
    assert "recommended strength 0.625 (keeps KL 0.02)\n" in err
    as_trained = report()
    assert as_trained["strength"] is None and as_trained["alpha_0"] == 1
    assert "anchors" not in as_trained
    assert as_trained["forgetting"]["kl_base_policy"] > made["forgetting"]["kl_base_policy"]
    assert "used as trained" in capsys.readouterr().err


def test_a_picture_over_strengths(report, folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    made = report("--plot", tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert made["strengths"]["kl_on"] == "unrelated text"
    points = {point["strength"]: point for point in made["strengths"]["points"]}
    assert list(points) == [0.25, 0.5, STRENGTH, 0.75, 1.0, 1.5, 2.0]
    # The adapter was trained at strength 1.
    assert points[1.0]["accuracy"] == made["preference"]["accuracy_policy"]
    trained = made["forgetting"]["kl_base_policy"]
    assert points[1.0]["kl_base_policy"] == pytest.approx(trained, rel=1e-4)
    assert points[0.25]["kl_base_policy"] < points[2.0]["kl_base_policy"]
    assert "0.625" in capsys.readouterr().out


def test_the_anchors_of_the_training_are_those_it_held_out(report, folder, tiny_tokenizer, capsys):
    own = folder / "adapter" / "anchors.jsonl"
    own.write_text((folder / "own.jsonl").read_text())
    try:
        for options in ((), ("--anchors", own)):
            anchors = report(*options)["anchors"]
            want = kl(folder, tiny_tokenizer, [anchor(9), anchor(19)], 1.0)
            assert anchors["texts"] == 2
            assert {k: anchors[k] for k in want} == pytest.approx(want, rel=1e-5)
            assert f"the 2 of {own} that training held out" in capsys.readouterr().err
    finally:
        own.unlink()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--anchors", "other.jsonl"), "hidden_size"),
        (("--anchors", "none.jsonl"), "none.jsonl"),
        (("--strength", "0"), "--strength: expected more than 0 (which is the base), got 0"),
        (("--batch-size", "0"), "--batch-size: expected 1 or more, got 0"),
        (("--max-length", "1"), "--max-length: expected 2 or more, got 1"),
        (("--plot", "picture"), "--plot: expected a .png, .svg, .pdf file, got "),
    ],
)
def test_bad_options_are_named(report, folder, capsys, options, message):
    name, value = options
    is_file = name in ("--anchors", "--plot")
    assert report(name, folder / value if is_file else value) is None
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("qadapter: error: ") and message in error
