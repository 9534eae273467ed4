"""The two streams are the base and its LoRA, files bring them back, and misuse is refused."""

import json
import os

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from qadapter import QAdapterModel
from qadapter.model.checkpoint import fingerprint
from tests.tiny_models import make_base, make_model, perturb

IDS = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, 6:] = 0
MASK[2, 3:] = 0
KINDS = ["llama", "llama-tied", "qwen2", "gpt2", "gemma2"]


@pytest.mark.parametrize("kind", KINDS)
def test_streams_are_the_base_and_the_adapter(kind):
    model = make_model(kind)
    out = model(IDS, MASK)
    with torch.no_grad(), model.peft_model.disable_adapter():
        base = model.peft_model(input_ids=IDS, attention_mask=MASK).logits
    adapter = model.peft_model(input_ids=IDS, attention_mask=MASK).logits
    torch.testing.assert_close(out.base_logits, base.flatten(0, 1))
    torch.testing.assert_close(out.q_logits, adapter.flatten(0, 1))
    assert (out.base_logits - out.q_logits).abs().max() > 0.05
    assert not out.base_logits.requires_grad and out.q_logits.requires_grad
    rows = torch.tensor([2, 0, 11, 20])
    some = model(IDS, MASK, rows)
    torch.testing.assert_close(some.q_logits, out.q_logits[rows])
    torch.testing.assert_close(some.base_logits, out.base_logits[rows])


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing(kind):
    model = make_model(kind, moved=False)
    model.train()
    out = model(IDS, MASK)
    assert torch.equal(out.base_logits, out.q_logits)


def test_only_selected_rows_reach_the_head():
    model = make_model("llama")
    seen = []
    head = model.hf_model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    model(IDS, MASK, torch.tensor([1, 5]))
    assert seen == [(2, 32), (2, 32)]


def test_soft_capped_logits_take_the_exact_path(caplog):
    model = make_model("gemma2")
    assert not model.selects_hidden_rows
    assert "computed at every position" in caplog.text
    assert make_model("llama").selects_hidden_rows


def test_adapted_head_takes_the_exact_path():
    base = make_base("llama")
    peft_model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    model = perturb(QAdapterModel(peft_model))
    assert not model.selects_hidden_rows
    out = model(IDS, MASK)
    reference = make_base("llama")(input_ids=IDS, attention_mask=MASK).logits
    torch.testing.assert_close(out.base_logits, reference.flatten(0, 1).detach())
    torch.testing.assert_close(
        out.q_logits, peft_model(input_ids=IDS, attention_mask=MASK).logits.flatten(0, 1)
    )


def test_adapter_off_restores_the_state():
    model = make_model("llama")
    with pytest.raises(RuntimeError, match="inside"), model.adapter_off():
        raise RuntimeError("inside")
    out = model(IDS, MASK)
    assert (out.base_logits - out.q_logits).abs().max() > 0.05


# Files.


@pytest.fixture
def base_dir(tmp_path):
    make_base("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_save_and_load(base_dir, tmp_path):
    model = perturb(
        QAdapterModel.from_pretrained(base_dir, alpha_0=0.9, alpha_tilde=1.1, gamma=0.95)
    )
    model.save_pretrained(tmp_path / "adapter")
    names = {p.name for p in (tmp_path / "adapter").iterdir()}
    assert names == {
        "adapter_config.json", "adapter_model.safetensors", "qadapter_config.json", "README.md"
    }  # fmt: skip
    again = QAdapterModel.from_pretrained(tmp_path / "adapter")
    assert (again.alpha_0, again.alpha_tilde, again.center, again.gamma) == (0.9, 1.1, 1.0, 0.95)
    before, after = model(IDS, MASK), again(IDS, MASK)
    assert torch.equal(before.base_logits, after.base_logits)
    assert torch.equal(before.q_logits, after.q_logits)
    assert any(p.requires_grad for p in again.parameters())
    # What is saved is a plain LoRA: PEFT alone reads it, and gives the adapter stream.
    plain = PeftModel.from_pretrained(make_base("llama"), tmp_path / "adapter")
    torch.testing.assert_close(
        plain(input_ids=IDS, attention_mask=MASK).logits.flatten(0, 1), after.q_logits
    )
    override = QAdapterModel.from_pretrained(tmp_path / "adapter", alpha_0=1.0, alpha_tilde=1.0)
    assert override.alpha_0 == 1.0 and override.gamma == 0.95


def test_saving_twice_replaces(base_dir, tmp_path):
    model = QAdapterModel.from_pretrained(base_dir)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "notes.txt").write_text("mine")
    perturb(model).save_pretrained(tmp_path / "adapter")
    again = QAdapterModel.from_pretrained(tmp_path / "adapter")
    assert torch.equal(again(IDS).q_logits, model(IDS).q_logits)
    assert (tmp_path / "adapter" / "notes.txt").read_text() == "mine"


def test_a_full_disk_leaves_what_was_there(base_dir, tmp_path, monkeypatch):
    model = QAdapterModel.from_pretrained(base_dir)
    target = tmp_path / "adapter"
    model.save_pretrained(target)
    before = {p.name: p.read_bytes() for p in target.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    monkeypatch.setattr("peft.peft_model.safe_save_file", full)
    for place in (target, tmp_path / "new"):
        with pytest.raises(OSError, match=f"could not save to .*{place.name}.*No space left"):
            perturb(model).save_pretrained(place)
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_saving_over_a_file_is_refused(base_dir, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="it is a file"):
        QAdapterModel.from_pretrained(base_dir).save_pretrained(tmp_path / "file")


def test_adapter_for_another_base(base_dir, tmp_path):
    QAdapterModel.from_pretrained(base_dir).save_pretrained(tmp_path / "adapter")
    make_base("llama", vocab=101).save_pretrained(tmp_path / "wider")
    with pytest.raises(ValueError, match=r"another base .*vocab_size 97 at training, 101 here"):
        QAdapterModel.from_pretrained(tmp_path / "adapter", base_model=tmp_path / "wider")
    other = make_base("llama")
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.1)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="same shape, other weights"):
        QAdapterModel.from_pretrained(tmp_path / "adapter", base_model=tmp_path / "other")
    half = QAdapterModel.from_pretrained(tmp_path / "adapter", dtype=torch.bfloat16)
    assert half.hf_model.dtype == torch.bfloat16  # another dtype is the same base


def test_folders_that_are_not_ours(base_dir, tmp_path):
    model = QAdapterModel.from_pretrained(base_dir)
    model.peft_model.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"no qadapter_config\.json: it was not saved by qadapter"):
        QAdapterModel.from_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "qadapter_config.json"
    content = json.loads(config.read_text())
    del content["alpha_0"]
    config.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="missing alpha_0"):
        QAdapterModel.from_pretrained(tmp_path / "adapter")
    config.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        QAdapterModel.from_pretrained(tmp_path / "adapter")
    os.remove(tmp_path / "adapter" / "adapter_config.json")
    with pytest.raises(ValueError, match=r"no adapter_config\.json"):
        QAdapterModel.from_pretrained(tmp_path / "adapter")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no model"):
        QAdapterModel.from_pretrained(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        QAdapterModel.from_pretrained(tmp_path / "nowhere")


# Refusals.


def test_refuses_what_it_cannot_compose():
    with pytest.raises(ValueError, match=r"expected a peft\.PeftModel, got LlamaForCausalLM"):
        QAdapterModel(make_base("llama"))
    merged = make_model("llama")
    merged.peft_model.merge_adapter()
    with pytest.raises(ValueError, match="merged into the base"):
        QAdapterModel(merged.peft_model)
    trained = make_model("llama")
    trained.hf_model.model.norm.weight.requires_grad_()
    with pytest.raises(ValueError, match=r"base weights require gradients \(model.norm.weight"):
        QAdapterModel(trained.peft_model)
    tied = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    with pytest.raises(ValueError, match="tied to the language-model head"):
        QAdapterModel(get_peft_model(make_base("llama-tied"), tied))
    two = make_model("llama").peft_model
    two.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    two.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="one active adapter, got 2"):
        QAdapterModel(two)


def test_bad_arguments(base_dir, tmp_path):
    with pytest.raises(ValueError, match="alpha_tilde"):
        QAdapterModel.from_pretrained(base_dir, alpha_tilde=0.0)
    with pytest.raises(ValueError, match=r"expected a peft\.LoraConfig, got dict"):
        QAdapterModel.from_pretrained(base_dir, lora_config={"r": 2})
    with pytest.raises(ValueError, match="PEFT cannot put this LoRA on the base"):
        QAdapterModel.from_pretrained(base_dir, lora_config=LoraConfig(target_modules=["nothing"]))
    with pytest.warns(UserWarning, match="far from the base"):
        QAdapterModel.from_pretrained(base_dir, alpha_0=0.01)


@pytest.mark.parametrize("given", [None, "smollm2", torch.nn.Linear(2, 2)])
def test_what_is_no_model(given):
    with pytest.raises(ValueError, match="base: expected a transformers model"):
        QAdapterModel.from_base(given)
    with pytest.raises(ValueError, match=r"expected a peft\.PeftModel"):
        QAdapterModel(given)
    with pytest.raises(ValueError, match="expected the name or the folder of a model, got 3"):
        QAdapterModel.from_pretrained(3)


@pytest.mark.parametrize("ids", [[[3, 4]], torch.tensor([3, 4]), torch.ones(1, 2), "hello"])
def test_what_is_no_batch_of_ids(ids):
    with pytest.raises(ValueError, match="input_ids: expected a 2-D int64 or int32 tensor"):
        make_model()(ids)


def test_fingerprint_ignores_the_adapter():
    plain = fingerprint(make_base("llama"))
    assert fingerprint(make_model("llama").hf_model) == plain
