"""An adapter by its name on the Hub: what is in the Hub's cache, without a network."""

import json
import shutil

import pytest
import torch
from huggingface_hub import constants

from qadapter import QAdapterModel, export_adapter
from qadapter.cli import main
from qadapter.model.checkpoint import resolve_model
from tests.tiny_models import save_two_adapters

IDS = torch.tensor([[5, 6, 7]])
NEW = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def hub(tmp_path, tiny_tokenizer, monkeypatch):
    """A folder of two adapters, of which "me/mine" is the first one."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = save_two_adapters(tmp_path, tiny_tokenizer)
    repository = tmp_path / "hub" / "models--me--mine"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder / "one", repository / "snapshots" / ("0" * 40))
    return folder


def test_an_adapter_of_the_hub_is_that_of_its_folder(hub):
    model, want = (QAdapterModel.from_pretrained(f) for f in ("me/mine", hub / "one"))
    made = model.generate(IDS, strength=0.5, **NEW)
    assert torch.equal(made, want.generate(IDS, strength=0.5, **NEW))
    other = QAdapterModel.from_pretrained(hub / "two")
    other.load_adapter("me/mine", "mine")
    of_folder = QAdapterModel.from_pretrained(hub / "two")
    of_folder.load_adapter(hub / "one", "mine")
    blend = {"strength": 1.0, "adapters": {"default": 0.5, "mine": 0.5}, **NEW}
    assert torch.equal(other.generate(IDS, **blend), of_folder.generate(IDS, **blend))
    exported = export_adapter("me/mine", hub / "lora", strength=0.5)
    assert (exported / "adapter_model.safetensors").exists()


def test_the_commands_take_its_name(hub, capsys):
    ask = ["--prompt", "why", "--max-new-tokens", "4"]
    said = []
    for adapter in ("me/mine", f"mine={hub / 'one'}", "mine=me/mine"):
        assert main(["generate", "--adapter", adapter, *ask]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2]
    row = {"prompt": "why", "chosen": " a cat", "rejected": " the dog"}
    (hub / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    files = ["--data", str(hub / "pairs.jsonl"), "--unrelated", str(hub / "pairs.jsonl")]
    report = hub / "report.json"
    assert main(["eval", "--adapter", "me/mine", *files, "--json", str(report)]) == 0
    assert json.loads(report.read_text())["adapter"] == "me/mine"


def test_what_is_no_adapter_stays_a_name(hub, tmp_path, monkeypatch, capsys):
    assert resolve_model("me/other") == "me/other"
    assert main(["generate", "--adapter", "me/other", "--prompt", "why"]) == 2
    assert "--adapter: me/other is not the folder of a saved adapter" in capsys.readouterr().err
    with pytest.raises(ValueError, match="directory: me/other is not the folder"):
        QAdapterModel.from_pretrained(hub / "one").load_adapter("me/other", "other")
    # A folder of this name here comes first.
    monkeypatch.chdir(tmp_path)
    shutil.copytree(hub / "two", tmp_path / "me" / "mine")
    assert resolve_model("me/mine") == "me/mine"
