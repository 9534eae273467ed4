"""``qadapter serve``: the command line that it hands to vLLM, and what it says without vLLM.

What vLLM does with it: tests/serving.
"""

import importlib.util
import json
import os
import sys

import pytest
from peft import LoraConfig

from qadapter import QAdapterModel
from qadapter.cli import main
from tests.tiny_models import make_base, make_model, perturb


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("models")
    make_base("llama").save_pretrained(folder / "base")
    tiny_tokenizer.save_pretrained(folder / "base")
    model = perturb(QAdapterModel.from_pretrained(folder / "base", lora_config=LoraConfig(r=4)))
    model.save_pretrained(folder / "plain")
    model.recommended_strength, model.kl_budget = 0.625, 0.02
    model.save_pretrained(folder / "budget")
    tiny_tokenizer.save_pretrained(folder / "budget")
    model.set_composition(2.0, 2.0, 1.0)
    model.recommended_strength = None
    model.save_pretrained(folder / "half")
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Returns the status, the command that was to be run, and what was printed to stderr."""
    found = importlib.util.find_spec

    def call(*options, vllm=True):
        commands = []
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda n: vllm or None if n == "vllm" else found(n)
        )
        monkeypatch.setattr(os, "execv", lambda path, command: commands.append((path, command)))
        status = main(["serve", *map(str, options)])
        return status, commands, capsys.readouterr().err

    return call


def overrides(command):
    return json.loads(command[command.index("--hf-overrides") + 1])


def test_without_vllm_one_line_says_what_to_install_and_what_works(run, folder):
    status, commands, err = run("--adapter", folder / "plain", vllm=False)
    assert (status, commands) == (2, [])
    assert err.count("\n") == 1
    for part in ('pip install "qadapter[vllm]"', "generate and chat", "export --strength"):
        assert part in err


def test_the_command(run, folder):
    status, commands, err = run("--adapter", folder / "plain", "--dtype", "float32")
    ((path, command),) = commands
    assert status == 0 and path == sys.executable == command[0]
    assert command[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    given = dict(zip(command[3::2], command[4::2], strict=True))
    del given["--hf-overrides"]
    assert given == {
        "--model": str(folder / "base"),
        "--tokenizer": str(folder / "base"),
        "--served-model-name": "qadapter",
        "--generation-config": "vllm",
        "--dtype": "float32",
        "--host": "127.0.0.1",
        "--port": "8000",
    }
    assert overrides(command) == {
        "architectures": ["QAdapterLlamaForCausalLM"],
        "qadapter": {
            "adapters": {"default": str(folder / "plain")},
            "weights": {"default": 1.0},
            "strength": None,
        },
    }
    assert "http://127.0.0.1:8000/v1" in err


def test_options_of_vllm_come_last(run, folder):
    more = ["--max-model-len", "64", "--served-model-name", "mine"]
    options = ("--adapter", folder / "plain", "--host", "0.0.0.0", "--port", "81", "--", *more)
    _, ((_, command),), err = run(*options)
    assert command[-4:] == more and "http://0.0.0.0:81/v1" in err
    status, commands, _ = run("--adapter", folder / "plain", "--", "--enforce-eager")
    assert status == 0 and commands[0][1][-1] == "--enforce-eager"


@pytest.mark.parametrize(
    ("adapter", "options", "strength"),
    [
        ("plain", (), None),
        ("budget", (), 0.625),
        ("budget", ("--strength", "recommended"), 0.625),
        ("budget", ("--strength", "2"), 2.0),
        ("half", (), None),
    ],
)
def test_the_strength_of_requests_that_name_none(run, folder, adapter, options, strength):
    _, ((_, command),), _ = run("--adapter", folder / adapter, *options)
    assert overrides(command)["qadapter"]["strength"] == strength
    own = "budget" if adapter == "budget" else "base"  # a tokenizer of the adapter's own
    assert command[command.index("--tokenizer") + 1] == str(folder / own)


def test_several_adapters(run, folder):
    options = ["--adapter", f"one={folder / 'plain'}", "--adapter", f"two={folder / 'budget'}"]
    _, ((_, command),), _ = run(*options, "--weight", "two=-0.5")
    served = overrides(command)["qadapter"]
    assert served["weights"] == {"one": 1.0, "two": -0.5} and served["strength"] is None
    assert list(served["adapters"]) == ["one", "two"]
    status, commands, err = run(*options[:2], "--adapter", f"two={folder / 'half'}")
    assert (status, commands) == (2, []) and "different alpha_0 and alpha_tilde" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--strength", "-1"), "strength: expected a number from 0 (the base) to 1000, got -1.0"),
        (("--strength", "nan"), "strength: expected a number from 0"),
        (("--strength", "recommended"), "strength: 'recommended' is of one adapter alone"),
        (("--weight", "other=1"), "--weight: there is no adapter 'other'"),
        (("--base-model", "./nowhere"), "./nowhere: no such folder"),
    ],
)
def test_what_does_not_fit_is_one_line(run, folder, options, message):
    status, commands, err = run("--adapter", folder / "plain", *options)
    assert (status, commands) == (2, []) and message in err and err.count("\n") == 1


def test_a_base_that_is_not_served_is_refused_by_name(run, tmp_path):
    model = make_model("gpt2")
    model.hf_model.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    status, commands, err = run(
        "--adapter", tmp_path / "adapter", "--base-model", tmp_path / "base"
    )
    assert (status, commands) == (2, [])
    assert "GPT2LMHeadModel is not served" in err and "LlamaForCausalLM" in err
