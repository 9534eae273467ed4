"""The example's picture of preference against forgetting shows what the model's own calls give."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from qadapter import QAdapterModel
from qadapter.text.data import load_preference_data, prepare_dataset
from qadapter.text.prompts import encode_prompts
from qadapter.text.tokenization import eos_token_ids
from tests.tiny_models import make_base, perturb
from tests.tiny_text import preference_rows

SOURCE = Path(__file__).parents[2] / "examples" / "frontier.py"


@pytest.fixture(scope="module")
def frontier():
    spec = importlib.util.spec_from_file_location("frontier", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("models")
    make_base("llama", vocab=len(tiny_tokenizer)).save_pretrained(folder / "base")
    tiny_tokenizer.save_pretrained(folder / "base")
    for name, std in (("one", 0.3), ("two", -0.4)):
        # gamma does not count: what is shown is the policy's.
        model = QAdapterModel.from_pretrained(
            folder / "base", lora_config=LoraConfig(r=4), gamma=0.5
        )
        perturb(model, std=std).save_pretrained(folder / name)
    for name, rows in (("pairs", preference_rows(6)), ("unrelated", preference_rows(8)[6:])):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


@pytest.fixture
def run(frontier, folder, tmp_path, capsys):
    """Returns (status, frontier.json, what was printed as an error)."""

    def call(*options, adapter="one"):
        given = ["--adapter", folder / adapter, "--data", folder / "pairs.jsonl"]
        given += ["--unrelated", folder / "unrelated.jsonl", "--output", tmp_path / "out"]
        status = frontier.main([*map(str, given), "--max-new-tokens", "4", *options])
        path = tmp_path / "out" / "frontier.json"
        error = capsys.readouterr().err.splitlines()
        return status, json.loads(path.read_text()) if path.exists() else None, error[-1:]

    return call


def test_figures_are_those_of_the_policy(run, folder, tiny_tokenizer, tmp_path):
    pytest.importorskip("matplotlib")
    status, made, _ = run("--strength", "2", "0", "0.5", "--rule")
    assert status == 0
    assert [p["strength"] for p in made["points"]] == [0, 0.5, 2]
    assert (tmp_path / "out" / "frontier.png").stat().st_size > 10_000
    assert {"follows", "pairs"} <= set(made["points"][0])

    model = QAdapterModel.from_pretrained(folder / "one")
    rows = prepare_dataset(
        load_preference_data(folder / "pairs.jsonl"),
        tiny_tokenizer,
        eos_token_ids=eos_token_ids(model, tiny_tokenizer),
    )
    for point in made["points"]:
        s, gains, likelier = point["strength"], [], []
        for row in rows:
            base_sums, sums, means = [], [], []
            for name in ("chosen_ids", "rejected_ids"):
                prompt, ids = row["prompt_ids"], torch.tensor(row[name])
                with torch.no_grad():
                    base, q = model(torch.tensor([prompt + row[name]]))
                at = slice(len(prompt) - 1, len(prompt) + len(ids) - 1)
                policy = (s * q + (1 - s) * base)[at].log_softmax(-1).gather(1, ids[:, None])
                reference = base[at].log_softmax(-1).gather(1, ids[:, None])
                sums.append(policy.sum())
                base_sums.append(reference.sum())
                means.append(policy.mean())
            gains.append((sums[0] - sums[1]) - (base_sums[0] - base_sums[1]))
            likelier.append(float(means[0] > means[1]))
        assert point["gain"] == pytest.approx(float(sum(gains)) / len(gains), abs=2e-4)
        assert point["accuracy"] == sum(likelier) / len(likelier)
    kl = [p["kl_base_policy"] for p in made["points"]]
    assert kl[0] == 0 < kl[1] < kl[2]


def test_answers_are_checked_by_the_rule(run, folder, tiny_tokenizer, frontier, monkeypatch):
    checked = []
    monkeypatch.setattr(frontier, "follows", lambda text: checked.append(text) or len(checked) < 3)
    _, made, _ = run("--strength", "3", "--rule")
    model = QAdapterModel.from_pretrained(folder / "one")
    for row, text in zip(preference_rows(6), checked, strict=True):
        inputs = encode_prompts(tiny_tokenizer, [row["prompt"]])
        ids = model.generate(**inputs, strength=3.0, max_new_tokens=4, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        assert text == tiny_tokenizer.decode(new, skip_special_tokens=True)
    assert made["points"][0]["follows"] == 2 / 6


def test_goes_on_and_adds_strengths(run, frontier, monkeypatch):
    made_at, original = [], frontier._point

    def point(model, tokenizer, data, unrelated, strength, *rest):
        if len(made_at) == 2:
            raise RuntimeError("stopped")
        made_at.append(strength)
        return original(model, tokenizer, data, unrelated, strength, *rest)

    monkeypatch.setattr(frontier, "_point", point)
    with pytest.raises(RuntimeError, match="stopped"):
        run("--strength", "0", "1", "2")
    made_at.clear()
    status, made, _ = run("--strength", "0", "1", "2")
    assert status == 0 and made_at == [2]
    assert [p["strength"] for p in made["points"]] == [0, 1, 2]
    assert "follows" not in made["points"][0]
    status, made, _ = run("--strength", "1.5")
    assert status == 0 and made_at == [2, 1.5]
    assert [p["strength"] for p in made["points"]] == [0, 1, 1.5, 2]


def test_refuses_figures_of_other_settings(run):
    assert run("--strength", "1")[0] == 0
    for options, adapter, changed in (
        (("--rule",), "one", "rule"),
        (("--max-length", "64"), "one", "max_length"),
        ((), "two", "adapter_sha256"),
    ):
        status, made, (error,) = run("--strength", "1", *options, adapter=adapter)
        assert status == 2 and len(made["points"]) == 1
        assert f"was made with other settings ({changed})" in error


def test_bad_input_is_named(run, tmp_path):
    for options, message in (
        (("--adapter", str(tmp_path)), "is not the folder of a saved adapter"),
        (("--strength", "-1"), "--strength: expected 0 (the base) or more"),
        (("--data", str(tmp_path / "none.jsonl")), "none.jsonl"),
    ):
        status, made, (error,) = run(*options)
        assert status == 2 and made is None
        assert error.startswith("frontier: error: ") and message in error
