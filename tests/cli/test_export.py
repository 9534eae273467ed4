"""``qadapter export``: what it writes, measures, prints and refuses."""

import json
import os
import sys

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qadapter import QAdapterModel
from qadapter.cli import main
from tests.tiny_models import make_base, perturb
from tests.tiny_text import preference_rows

# In the place of llama.cpp's: writes its arguments, or fails.
CONVERTER = """import json, pathlib, sys
if "FAIL" in pathlib.Path(__file__).parent.name:
    sys.exit("no such architecture")
arguments = sys.argv[1:]
pathlib.Path(arguments[arguments.index("--outfile") + 1]).write_text(json.dumps(arguments))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("models")
    make_base("llama", vocab=len(tiny_tokenizer)).save_pretrained(folder / "base")
    tiny_tokenizer.save_pretrained(folder / "base")
    lora = LoraConfig(r=4, lora_alpha=8)
    model = perturb(QAdapterModel.from_pretrained(folder / "base", lora_config=lora), 0.1)
    model.save_pretrained(folder / "plain")
    model.recommended_strength, model.kl_budget = 0.625, 0.02
    model.save_pretrained(folder / "budget")
    model.recommended_strength = None
    model.set_composition(1.0, 1.0, 0.0)
    model.save_pretrained(folder / "released")
    model.set_composition(2.0, 2.0, 1.0)
    model.save_pretrained(folder / "half")
    text = "".join(json.dumps(row) + "\n" for row in preference_rows(4))
    (folder / "text.jsonl").write_text(text)
    return folder


@pytest.fixture
def run(folder, tmp_path, capsys):
    """Returns the status, what was printed, and the config of what was written."""

    def call(*options, adapter="plain"):
        command = ["export", "--adapter", str(folder / adapter), "--output", str(tmp_path / "out")]
        status = main([*command, *map(str, options)])
        path = tmp_path / "out" / "adapter_config.json"
        return status, capsys.readouterr(), json.loads(path.read_text()) if path.exists() else None

    return call


def test_a_plain_lora(run, folder, tmp_path):
    status, printed, config = run("--strength", "0.5")
    assert (status, config["lora_alpha"], config["r"]) == (0, 4, 4)
    assert "plain LoRA of rank 4, alpha 4, in" in printed.out and "--check FILE" in printed.out
    assert "trained at" not in printed.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_strengths_by_name_and_default(run, tmp_path):
    status, printed, config = run("--strength", "recommended", adapter="budget")
    assert (status, config["lora_alpha"]) == (0, 5)
    assert "recommended strength 0.625 (keeps KL 0.02)" in printed.err
    (tmp_path / "out").rename(tmp_path / "first")
    status, printed, config = run(adapter="half")  # trained at strength 0.5
    assert (status, config["lora_alpha"]) == (0, 8)
    assert "was trained at strength 0.5" in printed.err
    assert printed.out.endswith(": strength 1\n")  # the blend itself


def test_several(folder, tmp_path):
    one, two = folder / "plain", folder / "half"
    options = ["--adapter", f"a={one}", "--adapter", f"b={two}", "--weight", "b=-0.5"]
    assert main(["export", *options, "--output", str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 8)  # scale 1, B has the factors
    before = load_file(one / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    key = next(key for key in before if "lora_B" in key)
    assert torch.equal(after[key], torch.cat((2 * before[key], -before[key]), 1))


def test_merged_has_a_tokenizer(run, tmp_path, tiny_tokenizer):
    status, printed, config = run("--merge", "--strength", "2", "--dtype", "bfloat16")
    assert status == 0 and config is None and "merged model in" in printed.out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("tell me about the cat").input_ids
    assert ids == tiny_tokenizer("tell me about the cat").input_ids


@pytest.mark.parametrize("merge", [[], ["--merge"]], ids=["lora", "merged"])
def test_check_prints_three_kl(run, folder, merge):
    status, printed, _ = run("--strength", "0.5", "--check", folder / "text.jsonl", *merge)
    assert status == 0
    lines = printed.out.splitlines()
    assert "--check FILE" not in lines[0]
    assert lines[1].startswith("KL in nats a token, with 95 % intervals, on ")
    assert "text.jsonl: 4 texts, " in lines[1]
    blend, exported, between = (float(line.split("  ")[-1].split(" (")[0]) for line in lines[2:5])
    assert 0.01 < blend < 10 and 0.5 < exported / blend < 2
    assert 0 < between < 0.5 * blend
    assert lines[4].endswith("% of KL(base || blend)")


def test_gguf_without_llama_cpp_prints_the_command(run, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    status, printed, _ = run("--gguf")
    out = tmp_path / "out"
    assert status == 0 and not list(out.glob("*.gguf"))
    assert printed.out.splitlines()[-1] == (
        f"python convert_lora_to_gguf.py --base {folder / 'base'} --outfile {out / 'adapter.gguf'} "
        f"{out}"
    )


@pytest.mark.parametrize("where", ["path", "folder"])
@pytest.mark.parametrize("merge", [[], ["--merge"]], ids=["lora", "merged"])
def test_gguf_by_the_converter(run, folder, tmp_path, monkeypatch, where, merge):
    there = tmp_path / "llama.cpp"
    there.mkdir()
    script = there / ("convert_hf_to_gguf.py" if merge else "convert_lora_to_gguf.py")
    script.write_text(CONVERTER)
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(there) if where == "path" else os.defpath)
    options = ["--llama-cpp", there] if where == "folder" else []
    status, printed, _ = run("--gguf", *options, *merge)
    made = tmp_path / "out" / ("model.gguf" if merge else "adapter.gguf")
    assert status == 0 and printed.out.splitlines()[-1] == f"GGUF in {made}"
    arguments = json.loads(made.read_text())
    base = [] if merge else ["--base", str(folder / "base")]
    assert [*arguments[: len(base)], arguments[-1]] == [*base, str(tmp_path / "out")]
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()).count(".gguf") == 1


def test_a_converter_that_fails(run, tmp_path):
    there = tmp_path / "FAIL"
    there.mkdir()
    (there / "convert_lora_to_gguf.py").write_text(CONVERTER)
    status, printed, config = run("--gguf", "--llama-cpp", there)
    assert status == 2 and config is not None
    error = printed.err.splitlines()[-1]
    assert "status 1: no such architecture" in error and sys.executable in error
    assert "is whole without it" in error and not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--strength", "-1"], "--strength: expected 0 (the base) or more, got -1.0"),
        (["--strength", "nan"], "--strength: expected 0 (the base) or more, got nan"),
        (["--strength", "recommended"], "plain has no recommended strength"),
        (["--weight", "other=1"], "--weight: there is no adapter 'other'"),
        (["--adapter", "nowhere"], "--adapter: several adapters need a name each"),
        (["--check", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--check", "{folder}/base/config.json"], "expected a list of objects, found dict"),
        (["--max-length", "1"], "--max-length: expected 2 or more, got 1"),
        (["--llama-cpp", "nowhere"], "--llama-cpp: is for --gguf, which is not given"),
        (["--gguf", "--llama-cpp", "nowhere"], "--llama-cpp: there is no convert_lora_to_gguf.py"),
        (["--output", "{folder}"], "is there and no empty folder; give a new one"),
        (["--base-model", "./nowhere"], "./nowhere: no such folder"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value),
)
def test_errors_are_one_line(run, folder, tmp_path, options, message):
    status, printed, config = run(*(option.format(folder=folder) for option in options))
    error = printed.err.splitlines()[-1]
    assert status == 2 and config is None
    assert error.startswith("qadapter: error: ") and message in error
    assert not (tmp_path / "out").exists()


def test_no_strength_and_other_text(run, folder, tmp_path):
    status, printed, config = run(adapter="released")
    assert status == 2 and "center is 0" in printed.err and config is None
    with pytest.raises(SystemExit):
        run("--strength", "much")
    (tmp_path / "other.jsonl").write_text('{"text": "a", "base": {"model_type": "x"}}\n' * 2)
    status, printed, config = run("--check", tmp_path / "other.jsonl")
    assert status == 2 and "anchor 0: made by another base" in printed.err and config is None
