"""Training on a quantised base: with what is kept of it, and from the command line."""

import importlib.util
import json

import pytest
import torch
from peft import LoraConfig

from qadapter import QAdapterModel
from qadapter.cli import main
from tests.tiny_models import make_base, make_quantised, perturb, quantisation_of
from tests.tiny_text import preference_rows
from tests.training.tiny_trainer import trainer


def moved(folder, how):
    torch.manual_seed(0)
    base = make_quantised(folder, how)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return perturb(QAdapterModel.from_base(base, lora_config=lora), std=0.1)


def trained(folder, tokenizer, how, **config):
    run = trainer(folder, tokenizer, model=moved(folder / "base", how), optim="sgd", **config)
    start = weights(run)
    run.train()
    return weights(run) - start, run


def weights(run):
    named = run.model.named_parameters()
    return torch.cat([p.detach().flatten() for name, p in named if "lora_" in name])


@pytest.mark.parametrize("how", ["nf4", "int8", "torchao"])
def test_what_is_kept_of_a_quantised_base_is_what_it_computes(tmp_path, tiny_tokenizer, how):
    update, run = trained(tmp_path / "a", tiny_tokenizer, how)
    cached, again = trained(tmp_path / "b", tiny_tokenizer, how, precompute_base=True)
    assert update.norm() > 0 and float((cached - update).norm() / update.norm()) < 1e-5
    assert type(run.data_collator).__name__ == "PackedPreferenceCollator"
    assert again._base_identity()["config"]["quantization_config"]["quant_method"]


def test_outliers_of_a_batch_cannot_be_kept(tmp_path, tiny_tokenizer):
    with pytest.raises(ValueError, match=r"precompute_base: .*llm_int8_threshold=0, or nf4"):
        trained(tmp_path, tiny_tokenizer, "LLM.int8", precompute_base=True)


@pytest.fixture
def command(tmp_path, tiny_tokenizer):
    make_base("llama-64").save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    text = "".join(json.dumps(row) + "\n" for row in preference_rows(6))
    (tmp_path / "pairs.jsonl").write_text(text)
    return [
        *("train", "--data", str(tmp_path / "pairs.jsonl"), "--output", str(tmp_path / "out")),
        *("--use-cpu", "--max-steps", "2", "--report-to", "none", "--save-strategy", "no"),
        *("--per-device-train-batch-size", "2", "--model"),
    ]


def test_a_run_in_4_bits_and_its_answer(tmp_path, command, capsys):
    quantisation_of("nf4")
    assert main([*command, str(tmp_path / "base"), "--load-in-4bit", "--precompute-base"]) == 0
    config = json.loads((tmp_path / "out" / "qadapter_config.json").read_text())
    settings = config["base_fingerprint"]["quantisation"]
    assert settings["load_in_4bit"] and settings["bnb_4bit_quant_type"] == "nf4"
    assert settings["bnb_4bit_use_double_quant"]
    capsys.readouterr()
    asked = ["--prompt", "hello", "--max-new-tokens", "2", "--strength", "0.5"]
    assert main(["generate", "--adapter", str(tmp_path / "out"), *asked]) == 0
    # On with the saved one, whose base is quantised as it was.
    assert main([*command, str(tmp_path / "out")]) == 0


def test_bad_options(tmp_path, command, capsys, monkeypatch):
    base = str(tmp_path / "base")
    assert main([*command, base, "--load-in-4bit", "--load-in-8bit"]) == 2
    assert "--load_in_4bit, --load_in_8bit: give one of them" in capsys.readouterr().err
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name == "bitsandbytes" else found(name, *a),
    )
    assert main([*command, base, "--load-in-8bit"]) == 2
    assert "--load_in_8bit: needs bitsandbytes (pip install bitsandbytes)" in (
        capsys.readouterr().err
    )
