"""Merged weights are the base plus strength times the change, rounded once."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

import qadapter
from qadapter import QAdapterModel
from tests.model.saved_adapters import ATTENTION, IDS, in_peft, moved
from tests.tiny_models import make_base, perturb


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merged_weights_are_rounded_once(tmp_path, kind, dtype):
    make_base(kind, dtype=dtype).save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=4, target_modules="all-linear")
    model = QAdapterModel.from_pretrained(tmp_path / "base", lora_config=lora)
    moved(model, 3).save_pretrained(tmp_path / "adapter")
    options = {"strength": 0.7, "merge": True}
    out = qadapter.export_adapter(tmp_path / "adapter", tmp_path / "merged", **options)
    plain = qadapter.export_adapter(tmp_path / "adapter", tmp_path / "lora", strength=0.7)

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    peft_model = PeftModel.from_pretrained(base, str(plain))
    deltas = {
        path: layer.get_delta_weight("default")
        for path, layer in base.named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert all(delta.dtype == torch.float32 for delta in deltas.values())
    expected = peft_model.unload().state_dict()
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert merged.dtype == dtype
    assert not (out / "adapter_config.json").exists()
    for name, weight in merged.state_dict().items():
        delta = deltas.get(name.removesuffix(".weight"))
        if delta is None:
            assert torch.equal(weight, expected[name])
        else:
            assert torch.equal(weight, (expected[name].float() + delta).to(dtype))
            assert not torch.equal(weight, expected[name])


def test_merged_logits_are_those_of_the_lora(folder, tmp_path):
    given = {folder / "embedding": 1.0, folder / "patterns": -0.5}
    out = qadapter.export_adapter(given, tmp_path / "merged", strength=0.5, merge=True)
    plain = in_peft(qadapter.export_adapter(given, tmp_path / "lora", strength=0.5))
    merged = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-4)
    again = qadapter.export_adapter(
        folder / "plain", tmp_path / "half", merge=True, dtype=torch.bfloat16
    )
    assert AutoModelForCausalLM.from_pretrained(again).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "size"), [("bfloat16", 1e-3), ("bfloat16", 1.0), ("float32", 1e-3)]
)
def test_a_change_that_rounding_takes_away_is_said(tmp_path, caplog, dtype, size):
    make_base(dtype=getattr(torch, dtype)).save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=4, target_modules=ATTENTION)
    model = moved(QAdapterModel.from_pretrained(tmp_path / "base", lora_config=lora), 1)
    model.save_pretrained(tmp_path / "adapter")
    qadapter.export_adapter(tmp_path / "adapter", tmp_path / "out", strength=size, merge=True)
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("merge: ")]
    assert len(said) == (dtype == "bfloat16" and size < 1)
    assert not said or "rounded to bfloat16 are off by " in said[0]


def test_a_bias_is_merged_where_the_base_has_one(folder, tmp_path):
    base = make_base("qwen2")
    base.save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=4, lora_bias=True, target_modules=ATTENTION)
    model = moved(QAdapterModel.from_pretrained(tmp_path / "base", lora_config=lora), 1)
    model.save_pretrained(tmp_path / "adapter")
    out = qadapter.export_adapter(tmp_path / "adapter", tmp_path / "out", strength=2, merge=True)
    plain = qadapter.export_adapter(tmp_path / "adapter", tmp_path / "lora", strength=2)
    merged, scaled = (
        AutoModelForCausalLM.from_pretrained(out),
        PeftModel.from_pretrained(base, str(plain)),
    )
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, scaled(IDS).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"merge: lora_bias=True, and .*q_proj of the base has no"):
        qadapter.export_adapter(folder / "bias", tmp_path / "none", merge=True)
    assert not (tmp_path / "none").exists()


def test_merging_is_refused_where_it_would_change_more(tmp_path):
    make_base("llama-tied").save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    model = perturb(QAdapterModel.from_pretrained(tmp_path / "base", lora_config=lora))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="merge: lm_head shares its weight with another layer"):
        qadapter.export_adapter(tmp_path / "adapter", tmp_path / "out", merge=True)
    qadapter.export_adapter(tmp_path / "adapter", tmp_path / "out")  # the LoRA can be had


def test_merging_into_a_quantised_base_is_refused(folder, tmp_path):
    (tmp_path / "a").mkdir()
    for file in (folder / "plain").iterdir():
        (tmp_path / "a" / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "a" / "qadapter_config.json").read_text())
    config["base_fingerprint"]["quantisation"] = {"quant_method": "bitsandbytes"}
    (tmp_path / "a" / "qadapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"quantised \(bitsandbytes\): .* quantised anew"):
        qadapter.export_adapter(tmp_path / "a", tmp_path / "out", merge=True)
    qadapter.export_adapter(tmp_path / "a", tmp_path / "out")
