"""The strength that training with a KL budget found is said, and taken where it is asked for."""

import io
import json

import pytest
import torch
from peft import LoraConfig

from qadapter import QAdapterModel
from qadapter.cli import main
from tests.tiny_models import make_base, perturb

STRENGTH = 0.625  # exact in binary, and in a file
GREEDY = ("--temperature", "0", "--max-new-tokens", "6")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    """A base, an adapter with a recommended strength and one without."""
    folder = tmp_path_factory.mktemp("models")
    make_base("llama", vocab=len(tiny_tokenizer)).save_pretrained(folder / "base")
    tiny_tokenizer.save_pretrained(folder / "base")
    model = perturb(QAdapterModel.from_pretrained(folder / "base", lora_config=LoraConfig(r=4)))
    model.save_pretrained(folder / "plain")
    model.recommended_strength, model.kl_budget = STRENGTH, 0.02
    model.save_pretrained(folder / "budget")
    return folder


def answers(folder, tmp_path, *options, adapter="budget", rows=({"prompt": "tell me"},)):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["generate", "--adapter", str(folder / adapter), *GREEDY, *options]
    output = tmp_path / "out.jsonl"
    status = main([*command, "--input", str(tmp_path / "in.jsonl"), "--output", str(output)])
    return status, [
        json.loads(line) for line in output.read_text().splitlines()
    ] if status == 0 else []


def test_the_model_takes_it_by_name(folder):
    model, ids = QAdapterModel.from_pretrained(folder / "budget"), torch.tensor([[5, 9, 11]])
    options = {"max_new_tokens": 12, "do_sample": True, "seed": 1}
    made = model.generate(ids, strength="recommended", **options)
    assert torch.equal(made, model.generate(ids, strength=STRENGTH, **options))
    assert not torch.equal(made, model.generate(ids, **options))
    own = model.adapter_names[0]
    same = model.generate(ids, strength="recommended", adapters={own: 1.0}, **options)
    assert torch.equal(same, made)

    model.load_adapter(folder / "plain", "other")
    for adapters in ({own: 0.5}, {"other": 1.0}, {own: 1.0, "other": 1.0}):
        with pytest.raises(ValueError, match="own adapter alone, with weight 1; got adapters="):
            model.generate(ids, strength="recommended", adapters=adapters)
    with pytest.raises(ValueError, match="expected a number or 'recommended', got 'much'"):
        model.generate(ids, strength="much")
    with pytest.raises(ValueError, match="give strength, or the two"):
        model.generate(ids, strength="recommended", alpha_0=1.0)
    plain = QAdapterModel.from_pretrained(folder / "plain")
    with pytest.raises(ValueError, match="no recommended strength; training with a kl_budget"):
        plain.generate(ids, strength="recommended")


def test_it_goes_with_the_weights(folder):
    model = QAdapterModel.from_pretrained(folder / "budget")
    model.load_adapter_weights(folder / "plain")
    assert (model.recommended_strength, model.kl_budget) == (None, None)
    model.load_adapter_weights(folder / "budget")
    assert (model.recommended_strength, model.kl_budget) == (STRENGTH, 0.02)


def test_generate(folder, tmp_path, capsys):
    rows = [{"prompt": "tell me"}, {"prompt": "why", "strength": "recommended"}]
    _, made = answers(folder, tmp_path, "--strength", "0", "recommended", rows=rows)
    assert [row["strength"] for row in made] == [0, STRENGTH, STRENGTH]
    assert "recommended strength 0.625 (keeps KL 0.02)" in capsys.readouterr().err
    _, same = answers(folder, tmp_path, "--strength", str(STRENGTH))
    assert same[0]["response"] == made[1]["response"]
    answers(folder, tmp_path)
    assert "; used as trained, --strength recommended takes it" in capsys.readouterr().err
    answers(folder, tmp_path, adapter="plain")
    assert "recommended" not in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "chat", "eval"])
def test_an_adapter_without_one_is_refused_before_anything_is_loaded(folder, capsys, command):
    rest = {"generate": ["--prompt", "a"], "eval": ["--data", "nothing.jsonl"]}.get(command, [])
    adapter = str(folder / "plain")
    options = ["--adapter", adapter, "--strength", "recommended"]
    assert main([command, *options, *rest]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == (
        f"qadapter: error: --strength: {adapter} has no recommended strength; train with "
        "--kl-budget to get one"
    )
    with pytest.raises(SystemExit):
        main([command, "--adapter", adapter, "--strength", "much", *rest])
    assert "expected a number or recommended, got 'much'" in capsys.readouterr().err


def test_a_row_that_asks_for_what_is_not_there_is_named(folder, tmp_path, capsys):
    rows = [{"prompt": "a"}, {"prompt": "b", "strength": "recommended"}]
    assert answers(folder, tmp_path, adapter="plain", rows=rows)[0] == 2
    assert "in.jsonl, line 2: strength: " in capsys.readouterr().err


def test_a_blend_has_none(folder, capsys):
    blend = [f"--adapter=a={folder / 'budget'}", f"--adapter=b={folder / 'plain'}"]
    assert main(["generate", *blend, "--prompt", "a", "--strength", "recommended"]) == 2
    assert "of one adapter alone, with weight 1; got a=1, b=1" in capsys.readouterr().err


def test_chat(folder, monkeypatch, capsys):
    lines = "/strength recommended\n/strength 2\n/weights default=2\n/strength recommended\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main(["chat", "--adapter", str(folder / "budget"), "--strength", "recommended"]) == 0
    out, err = capsys.readouterr()
    assert "recommended strength 0.625 (keeps KL 0.02)" in err
    begin, *parts = out.split("> /")
    assert begin.startswith("strength 0.625; ")
    assert "(strength 0.625)" in parts[0] and "(strength 2)" in parts[1]
    assert "(/strength: recommended is of one adapter alone" in parts[3]
