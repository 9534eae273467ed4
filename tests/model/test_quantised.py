"""Bases that bitsandbytes or torchao have quantised: exact streams, one forward, files."""

import pytest
import torch
from peft import LoraConfig
from torch import nn

from qadapter import QAdapterModel
from qadapter.model import packed_attention, quantised
from qadapter.training.base_identity import identity
from tests.tiny_models import make_base, make_quantised, perturb, quantisation_of

IDS = torch.tensor([[5, 17, 80, 41, 9, 33], [60, 7, 7, 22, 90, 12]])
HOW = ("nf4", "int8", "LLM.int8", "torchao")
ROW_BY_ROW = ("nf4", "int8", "torchao")


def lora():
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture(params=HOW)
def made(request, tmp_path):
    torch.manual_seed(0)
    base = make_quantised(tmp_path, request.param)
    return request.param, QAdapterModel.from_base(base, lora_config=lora())


def test_an_adapter_that_does_nothing_yet_is_the_base(made):
    """Both streams by the same products: with a gradient and without."""
    _, model = made
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            logits = model(IDS)
        assert torch.equal(logits.base_logits, logits.q_logits)
    assert quantised.mixes_rows(model) == (made[0] == "LLM.int8")
    assert packed_attention.enable(model.hf_model) is None and model.selects_hidden_rows


@torch.no_grad()
def test_decoding_takes_one_forward_where_rows_stay_apart(made):
    how, model = made
    perturb(model, std=0.1)
    streams = model.streams((None, "default"))
    assert (streams.reason is None) == (how in ROW_BY_ROW)
    if streams.reason is not None:
        assert "Linear8bitLt" in streams.reason
    text = IDS
    for _ in range(5):
        logits = model(text)
        mixed = 0.5 * logits.base_logits + 0.5 * logits.q_logits
        last = mixed.unflatten(0, text.shape)[:, -1]
        text = torch.cat([text, last.argmax(-1, keepdim=True)], 1)
    out = model.generate(IDS, strength=0.5, max_new_tokens=5, do_sample=False, eos_token_id=None)
    if how != "LLM.int8":  # which tokens are outliers depends on what else is in the batch
        assert torch.equal(out, text)
    assert out.shape == text.shape


def test_an_adapter_finds_its_base_quantised_as_it_was(made, tmp_path, caplog):
    how, model = made
    perturb(model, std=0.1)
    model.save_pretrained(tmp_path / "a")
    loaded = QAdapterModel.from_pretrained(tmp_path / "a", dtype=torch.float32)
    assert "is quantised as it was at training" in caplog.text
    assert torch.equal(loaded(IDS).q_logits, model(IDS).q_logits)
    assert identity(loaded) == identity(model)
    with pytest.raises(ValueError, match=r"quantisation .* at training, none here"):
        QAdapterModel.from_pretrained(tmp_path / "a", quantization_config=None)
    if how != "torchao":
        other = quantisation_of("int8" if how == "nf4" else "nf4")
        with pytest.raises(ValueError, match=r"quantisation .* at training"):
            QAdapterModel.from_pretrained(tmp_path / "a", quantization_config=other)
    assert identity(model)["weights"] != identity(plain())["weights"]


def plain():
    return QAdapterModel.from_base(make_base("llama-64"), lora_config=lora())


def test_a_base_that_was_used_before(tmp_path):
    """Some CPUs have another product for inference, which changes the weights in place."""
    base = make_quantised(tmp_path, "nf4")
    with torch.no_grad():
        base(IDS)
    if base.model.layers[0].mlp.up_proj.support_avx512bf16_for_cpu:
        with pytest.raises(ValueError, match="used before on a CPU"):
            QAdapterModel.from_base(base, lora_config=lora())
    else:
        QAdapterModel.from_base(base, lora_config=lora())


def test_the_dtype_that_a_quantised_base_computes_in(tmp_path, monkeypatch):
    make_base("llama", dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert quantised.compute_dtype("float16", str(tmp_path)) == torch.float16
    assert quantised.compute_dtype(torch.float32, str(tmp_path)) == torch.float32
    monkeypatch.setattr("qadapter.model.precision.fast_on_cpu", lambda dtype: True)
    assert quantised.compute_dtype("auto", str(tmp_path)) == torch.bfloat16
    monkeypatch.setattr("qadapter.model.precision.fast_on_cpu", lambda dtype: False)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert quantised.compute_dtype("auto", str(tmp_path)) == torch.float32


class Params4bit(nn.Parameter):
    """As bitsandbytes' class is called."""


class Int8Params(nn.Parameter):
    """As well."""


def holder(weight):
    model = nn.Linear(2, 2)
    model.weight = weight
    return model


@pytest.mark.parametrize(
    ("weight", "engine", "casts", "what"),
    [
        (Params4bit(torch.zeros(4, 1)), "FSDP2", None, None),
        (Params4bit(torch.zeros(4, 1, dtype=torch.bfloat16)), "FSDP2", torch.bfloat16, None),
        (nn.Parameter(torch.zeros(2, 2)), "FSDP2", torch.bfloat16, None),
        (nn.Parameter(torch.zeros(2, 2)), "ZeRO-3", None, None),
        (
            Params4bit(torch.zeros(4, 1)),
            "FSDP2",
            torch.bfloat16,
            "stored in torch.float32, .* bnb_4bit_quant_storage=torch.bfloat16",
        ),
        (
            Params4bit(torch.zeros(4, 1, dtype=torch.uint8), requires_grad=False),
            "FSDP2",
            None,
            r"Params4bit of torch.uint8\) .* bnb_4bit_quant_storage=torch.bfloat16 with nf4",
        ),
        (
            Int8Params(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False),
            "FSDP2",
            None,
            "leave the base whole",
        ),
        (Params4bit(torch.zeros(4, 1)), "ZeRO-3", None, "FSDP2 with nf4, or ZeRO-2"),
    ],
)
def test_what_an_engine_would_not_shard(weight, engine, casts, what):
    model = holder(weight)
    if what is None:
        quantised.refuse_shards(model, engine, casts)
        return
    with pytest.raises(ValueError, match=f"{engine}: weight is .*{what}"):
        quantised.refuse_shards(model, engine, casts)
