"""An exported LoRA is the base plus strength times the change, in PEFT and by alpha / r alone."""

import json

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import qadapter
from qadapter import QAdapterModel
from qadapter.model import export
from tests.model.saved_adapters import ATTENTION, IDS, KINDS, in_peft
from tests.tiny_models import make_base


@torch.no_grad()
def changes(folder):
    """By layer, what PEFT adds to its weight and bias."""
    found = {}
    for path, layer in in_peft(folder).get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            found[path] = layer.get_delta_weight("default")
            if "default" in layer.lora_B and layer.lora_B["default"].bias is not None:
                found[f"{path}.bias"] = layer.lora_B["default"].bias * layer.scaling["default"]
    return found


def served(folder):
    """By layer, what a server adds that knows A, B, r and alpha alone."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    assert config["lora_alpha"] != 0  # which llama.cpp takes for a scale of 1
    found = {}
    for key, b in tensors.items():
        if key.endswith(("lora_B.weight", "lora_embedding_B")):
            a = tensors[key.replace("_B", "_A")]
            assert a.shape[0] == config["r"] == b.shape[1]
            delta = b @ a * (config["lora_alpha"] / config["r"])
            path = key.removeprefix("base_model.model.").partition(".lora_")[0]
            found[path] = delta.T if "embedding" in key else delta
    return found


def assert_close(found, expected):
    for path in found.keys() | expected.keys():
        zero = torch.zeros_like(found.get(path, expected.get(path)))
        one, other = found.get(path, zero), expected.get(path, zero)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "strength"),
    [*((kind, s) for kind in KINDS for s in (0, 0.3)), *(("plain", s) for s in (0.5, 1, 2))],
)
def test_the_change_is_scaled(folder, tmp_path, kind, strength):
    out = qadapter.export_adapter(folder / kind, tmp_path / "out", strength=strength)
    expected = {path: strength * delta for path, delta in changes(folder / kind).items()}
    assert max(delta.abs().max() for delta in changes(folder / kind).values()) > 0.1
    assert_close(changes(out), expected)
    assert_close(served(out), {p: d for p, d in expected.items() if not p.endswith(".bias")})


@pytest.mark.parametrize("strength", [0, 0.5, 1, 2])
def test_logits_are_those_of_the_scaled_weights(folder, tmp_path, strength):
    model = in_peft(qadapter.export_adapter(folder / "plain", tmp_path / "o", strength=strength))
    by_hand = make_base()
    config = json.loads((folder / "plain" / "adapter_config.json").read_text())
    tensors = load_file(folder / "plain" / "adapter_model.safetensors")
    with torch.no_grad():
        for key, b in tensors.items():
            if key.endswith("lora_B.weight"):
                delta = b @ tensors[key.replace("_B", "_A")] * config["lora_alpha"] / config["r"]
                path = key.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
                by_hand.get_submodule(path).weight += strength * delta
        base = make_base()(IDS).logits
        logits = model(IDS).logits
        torch.testing.assert_close(logits, by_hand(IDS).logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(logits, base) == (strength == 0)
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, base)


@pytest.mark.parametrize("kind", ["plain", "rslora", "bias", "embedding", "some-layers"])
def test_tensors_stay_what_they_are(folder, tmp_path, kind):
    """At any strength but 0 only alpha is another; at 1 that is the same, too."""
    before = load_file(folder / kind / "adapter_model.safetensors")
    config = json.loads((folder / kind / "adapter_config.json").read_text())
    for strength in (1, 0.5, 3):
        out = qadapter.export_adapter(folder / kind, tmp_path / f"{strength}", strength=strength)
        after = load_file(out / "adapter_model.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        written = json.loads((out / "adapter_config.json").read_text())
        if kind != "rslora":
            assert written["lora_alpha"] == strength * config["lora_alpha"]
        assert not written["use_rslora"]
        same = ("r", "target_modules", "layers_to_transform", "base_model_name_or_path")
        assert all(written[name] == config[name] for name in same)


@pytest.mark.parametrize("strength", [1, 0.5])
@pytest.mark.parametrize(
    "weights",
    [
        {"plain": 1.0, "other": 0.5},
        {"other": -0.7, "patterns": 1.5, "rslora": 0.25},
        {"plain": 1, "bias": 2},
        {"plain": 0.5, "strength-2": 0.5},
        {"embedding": 0.5, "some-layers": 0.0},
        {"plain": 0.4},
    ],
    ids=", ".join,
)
def test_several_are_added_up(folder, tmp_path, weights, strength):
    given = {folder / name: weight for name, weight in weights.items()}
    out = qadapter.export_adapter(given, tmp_path / "out", strength=strength)
    expected: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        for path, delta in changes(folder / name).items():
            expected[path] = expected.get(path, 0) + strength * weight * delta
    found = changes(out)
    assert_close(found, expected)
    assert found.keys() >= expected.keys()
    assert_close(served(out), {p: d for p, d in expected.items() if not p.endswith(".bias")})


def test_one_scale_for_all_leaves_the_tensors(folder, tmp_path):
    """Concatenated, and the scale in alpha."""
    out = qadapter.export_adapter(
        {folder / "plain": 0.5, folder / "strength-2": 0.75}, tmp_path / "out", strength=2
    )
    config = json.loads((out / "adapter_config.json").read_text())
    # 12 / 4 * 0.5 = 8 / 4 * 0.75 = 1.5, twice that at strength 2
    assert (config["r"], config["lora_alpha"]) == (8, 24)
    tensors = load_file(out / "adapter_model.safetensors")
    parts = [load_file(folder / n / "adapter_model.safetensors") for n in ("plain", "strength-2")]
    for key, tensor in tensors.items():
        joined = torch.cat([part[key] for part in parts], 0 if "lora_A" in key else 1)
        assert torch.equal(tensor, joined)


def test_a_16_bit_adapter_is_scaled_in_float32(folder, tmp_path):
    model = QAdapterModel.from_pretrained(folder / "patterns")
    model.peft_model.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    assert load_file(tmp_path / "half" / "adapter_model.safetensors").popitem()[1].itemsize == 2
    out = qadapter.export_adapter(tmp_path / "half", tmp_path / "out", strength=0.3)
    expected = {path: 0.3 * delta for path, delta in changes(tmp_path / "half").items()}
    assert_close(changes(out), expected)


# Refused, and the strength that is meant.


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"use_dora": True}, "use_dora=True cannot be exported: DoRA scales whole rows"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] cannot be exported"),
        ({"trainable_token_indices": [3, 5]}, r"trainable_token_indices=\[3, 5\] cannot be"),
        ({"target_parameters": ["q_proj.weight"], "target_modules": []}, "target_parameters="),
    ],
    ids=["dora", "modules", "tokens", "parameters"],
)
def test_what_alpha_does_not_scale_is_refused(folder, tmp_path, options, match):
    lora = LoraConfig(**{"r": 2, "target_modules": ATTENTION, **options})
    QAdapterModel.from_pretrained(folder / "base", lora_config=lora).save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=match):
        qadapter.export_adapter(tmp_path / "a", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_kind_of_adapter_is_refused(folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    ia3 = IA3Config(target_modules=ATTENTION, feedforward_modules=[])
    QAdapterModel(get_peft_model(base, ia3)).save_pretrained(tmp_path / "ia3")
    with pytest.raises(ValueError, match="IA3 adapter; only a LoRA can be exported"):
        qadapter.export_adapter(tmp_path / "ia3", tmp_path / "out")
    get_peft_model(base.base_model, LoraConfig(r=2)).save_pretrained(tmp_path / "foreign")
    with pytest.raises(ValueError, match="it was not saved by qadapter"):
        qadapter.export_adapter(tmp_path / "foreign", tmp_path / "out")


@pytest.mark.filterwarnings("ignore:center=1 with")
@pytest.mark.parametrize(
    ("alphas", "match"),
    [
        ({"center": 0.0, "alpha_0": 0.01}, "center is 0: at a strength s its policy"),
        ({"alpha_0": 0.5, "alpha_tilde": 1.0}, "alpha_0 is 0.5 and alpha_tilde 1, which are no"),
    ],
)
def test_alphas_that_are_no_strength_are_refused(folder, tmp_path, alphas, match):
    model = QAdapterModel.from_pretrained(folder / "plain", **alphas)
    model.save_pretrained(tmp_path / "a")
    for adapter in (tmp_path / "a", {folder / "plain": 1.0, tmp_path / "a": 1.0}):
        with pytest.raises(ValueError, match=match):
            qadapter.export_adapter(adapter, tmp_path / "out")


def test_the_strength_that_alphas_stand_for(folder):
    assert export.trained_strength(folder / "plain") == 1
    assert export.trained_strength(folder / "strength-2") == 2


def test_recommended(folder, tmp_path):
    model = QAdapterModel.from_pretrained(folder / "plain")
    model.recommended_strength, model.kl_budget = 0.625, 0.02
    model.save_pretrained(tmp_path / "a")
    out = qadapter.export_adapter(tmp_path / "a", tmp_path / "out", strength="recommended")
    assert json.loads((out / "adapter_config.json").read_text())["lora_alpha"] == 0.625 * 12
    with pytest.raises(ValueError, match="plain has no recommended strength"):
        qadapter.export_adapter(folder / "plain", tmp_path / "o", strength="recommended")
    with pytest.raises(ValueError, match="of one adapter alone, with weight 1"):
        qadapter.export_adapter({tmp_path / "a": 0.5}, tmp_path / "o", strength="recommended")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"strength": -1}, "strength: expected 0 .the base. or more, got -1"),
        ({"strength": float("nan")}, "strength: "),
        ({"strength": 1e300}, "strength: with the weights a LoRA's scale comes to"),
        ({"strength": "much"}, "strength: expected a number or 'recommended', got 'much'"),
        ({"adapter": {}}, "adapter: expected a folder, or weights by folder"),
        ({"adapter": "nowhere"}, "adapter: nowhere is not the folder of a saved adapter"),
        ({"weight": float("inf")}, "adapter.*plain.*: "),
        ({"output": "there"}, "output: .*there is there and no empty folder"),
        ({"output": "file"}, "output: .*file is there and no empty folder"),
        ({"base_model": "./nowhere"}, "./nowhere: no such folder"),
        ({"base_model": "./nowhere", "merge": True}, "./nowhere: no such folder"),
    ],
)
def test_bad_arguments_are_named(folder, tmp_path, arguments, match):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    (tmp_path / "file").write_text("mine")
    adapter = arguments.pop("adapter", {folder / "plain": arguments.pop("weight", 1.0)})
    output = tmp_path / arguments.pop("output", "out")
    with pytest.raises((ValueError, OSError), match=match):
        qadapter.export_adapter(adapter, output, **arguments)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "file").read_text() == "mine"


def test_adapters_of_two_bases_are_refused(folder, tmp_path):
    make_base("qwen2").save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=4, target_modules=ATTENTION)
    QAdapterModel.from_pretrained(tmp_path / "base", lora_config=lora).save_pretrained(
        tmp_path / "a"
    )
    with pytest.raises(ValueError, match=r"is for another base than that of .*plain"):
        qadapter.export_adapter({folder / "plain": 1.0, tmp_path / "a": 1.0}, tmp_path / "out")


def test_a_damaged_file_is_refused(folder, tmp_path):
    from safetensors.torch import save_file

    for name, change, match in (
        ("lacks", lambda t: t.pop(next(k for k in t if "lora_B" in k)), "A or B of .* is missing"),
        ("more", lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2)}), "no weig"),
    ):
        (tmp_path / name).mkdir()
        for file in (folder / "plain").iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=match):
            qadapter.export_adapter(tmp_path / name, tmp_path / "out")


def test_nothing_is_half_written(folder, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError("no space left")

    monkeypatch.setattr(export, "save_file", full)
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        with pytest.raises(OSError, match="no space left"):
            qadapter.export_adapter(folder / "plain", tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    assert not list((tmp_path / "empty").iterdir())


def test_the_card_says_what_it_is(folder, tmp_path):
    out = qadapter.export_adapter(folder / "plain", tmp_path / "lora", strength=0.5)
    card = (out / "README.md").read_text()
    for part in (
        f"base_model: {folder / 'base'}",
        "strength: 0.5",
        "`plain`",
        "not the blend of logits",
        "PeftModel.from_pretrained",
        "--max-lora-rank 8",
        "convert_lora_to_gguf.py",
    ):
        assert part in card
    given = {folder / "plain": 1.0, folder / "patterns": -0.5}
    card = (
        qadapter.export_adapter(given, tmp_path / "merged", merge=True) / "README.md"
    ).read_text()
    assert "1 times `plain` + -0.5 times `patterns`" in card
    assert "convert_hf_to_gguf.py" in card and "PeftModel" not in card
    assert "not the blend of logits" in card
