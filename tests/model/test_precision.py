"""``dtype="auto"``: the checkpoint's dtype where the machine is fast in it, else float32."""

import logging

import pytest
import torch

from qadapter import QAdapterModel
from qadapter.cli import main
from qadapter.model import precision
from tests.tiny_models import make_base

# x86 without any, a Zen 4, a Sapphire Rapids; Neoverse N1 and V1
AVX2 = {"avx2": True, "avx512_bf16": False}
ZEN_4 = {"avx2": True, "avx512_bf16": True}
AMX = {"avx512_bf16": True, "amx_bf16": True, "avx512_fp16": True}
N1 = {"neon": True, "fp16_arith": True, "bf16": False}
V1 = {"neon": True, "fp16_arith": True, "bf16": True}


@pytest.fixture
def machine(monkeypatch):
    def pretend(capabilities):
        monkeypatch.setattr(precision, "cpu_capabilities", lambda: capabilities)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)

    return pretend


@pytest.fixture
def folder(tmp_path):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        make_base("llama", dtype=dtype).save_pretrained(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [
        (AVX2, ()),
        (ZEN_4, ("bfloat16",)),
        (AMX, ("bfloat16", "float16")),
        (N1, ("float16",)),
        (V1, ("bfloat16", "float16")),
    ],
)
def test_auto_is_what_the_machine_is_fast_in(folder, machine, caplog, capabilities, fast):
    machine(capabilities)
    for stored in ("bfloat16", "float16", "float32"):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger=precision.__name__):
            model = QAdapterModel.from_pretrained(folder / stored)
        expected = stored if stored in fast else "float32"
        assert str(model.hf_model.dtype) == f"torch.{expected}"
        said = [r.getMessage() for r in caplog.records if "is loaded in float32" in r.getMessage()]
        assert len(said) == (expected != stored)
        if said:
            assert stored in said[0] and str(folder / stored) in said[0]


def test_float32_has_the_numbers_of_the_checkpoint(folder, machine):
    machine(AVX2)
    wide = QAdapterModel.from_pretrained(folder / "bfloat16").hf_model.state_dict()
    machine(AMX)
    stored = QAdapterModel.from_pretrained(folder / "bfloat16").hf_model.state_dict()
    names = [name for name in stored if "lora_" not in name]
    assert len(names) > 10
    for name in names:
        assert torch.equal(wide[name], stored[name].float()), name


def test_a_dtype_that_was_given_is_obeyed(folder, machine):
    machine(AVX2)
    for dtype in (torch.bfloat16, "bfloat16"):
        model = QAdapterModel.from_pretrained(folder / "bfloat16", dtype=dtype)
        assert model.hf_model.dtype == torch.bfloat16


def test_a_saved_adapter_finds_its_base_in_float32(folder, machine):
    machine(AMX)
    QAdapterModel.from_pretrained(folder / "bfloat16").save_pretrained(folder / "adapter")
    machine(AVX2)
    assert QAdapterModel.from_pretrained(folder / "adapter").hf_model.dtype == torch.float32


def test_a_device_other_than_the_cpu_takes_the_checkpoint(folder, machine, monkeypatch):
    machine(AVX2)
    source = str(folder / "bfloat16")
    assert precision.base_dtype("auto", source, "cuda") == "auto"
    assert precision.base_dtype("auto", source, "cpu") == torch.float32
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert precision.base_dtype("auto", source) == "auto"
    assert precision.base_dtype("auto", source, device_map="cpu") == torch.float32


def test_decoding_reads_weights_as_they_are_where_our_products_serve(folder, machine, monkeypatch):
    machine(AVX2)
    for limit, expected in ((4096, "auto"), (16, torch.float32), (0, torch.float32)):
        monkeypatch.setattr(precision.few_rows, "rows_linear_limit", lambda _, n=limit: n)
        assert precision.base_dtype("decode", str(folder / "bfloat16")) == expected
        assert precision.base_dtype("auto", str(folder / "bfloat16")) == torch.float32
    assert precision.base_dtype("decode", str(folder / "bfloat16"), "cuda") == "auto"
    monkeypatch.setattr(precision.few_rows, "rows_linear_limit", lambda dtype: 4096)
    model = QAdapterModel.from_pretrained(folder / "bfloat16", dtype="decode")
    assert model.hf_model.dtype == torch.bfloat16
    assert "to decode as it is" in precision.report()


def test_a_quantised_base_is_left_alone(folder, machine):
    from transformers import AutoConfig

    machine(AVX2)
    config = AutoConfig.from_pretrained(folder / "bfloat16")
    assert precision.base_dtype("auto", str(folder / "bfloat16"), config=config) == torch.float32
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert precision.base_dtype("auto", str(folder / "bfloat16"), config=config) == "auto"


def test_a_checkpoint_that_does_not_say(folder, machine):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder / "bfloat16")
    config.dtype = None
    machine(AMX)
    assert precision.base_dtype("auto", "some base", config=config) == "auto"
    machine(AVX2)
    assert precision.base_dtype("auto", "some base", config=config) == torch.float32


def test_env_says_it(machine, capsys):
    machine(ZEN_4)
    main(["env"])
    assert "bfloat16 as it is, float16 in float32" in capsys.readouterr().out


def test_this_machine_is_asked():
    """What torch says here is of the names that are looked for."""
    named = {name for names in precision._INSTRUCTIONS.values() for name in names}
    assert named & set(precision.cpu_capabilities())
