"""An adapter's files: for this base and this adapter, all of it, or refused and nothing changed."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qadapter import QAdapterModel
from qadapter.model.checkpoint import CONFIG_NAME, fingerprint, refuse_resized
from tests.tiny_models import make_base, perturb

IDS = torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(6))
# A plain PEFT model has norms and gates of transformers.
OWN_KERNELS = {"rtol": 1e-4, "atol": 1e-4}
WEIGHTS = "adapter_model.safetensors"


def lora(*targets, **options):
    names = list(targets) or ["q_proj"]
    return LoraConfig(**{"r": 4, "target_modules": names, "task_type": "CAUSAL_LM", **options})


@pytest.fixture
def base_dir(tmp_path):
    make_base().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def build(base_dir, *targets, seed=0, **options):
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(base_dir)
    model = QAdapterModel.from_base(base, lora_config=lora(*targets, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# An adapter with a name of its own.


def test_a_named_adapter_comes_back(base_dir, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(base_dir)
    model = perturb(QAdapterModel(get_peft_model(base, lora(), adapter_name="mine")))
    for _ in range(2):  # over itself, too
        model.save_pretrained(tmp_path / "a")
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        "adapter_config.json", WEIGHTS, CONFIG_NAME, "README.md"
    }  # fmt: skip
    want = model(IDS).q_logits
    assert torch.equal(QAdapterModel.from_pretrained(tmp_path / "a")(IDS).q_logits, want)
    plain = PeftModel.from_pretrained(make_base(), tmp_path / "a")
    torch.testing.assert_close(plain(IDS).logits.flatten(0, 1), want, **OWN_KERNELS)
    perturb(model, std=0.1)
    assert not torch.equal(model(IDS).q_logits, want)
    model.load_adapter_weights(tmp_path / "a")
    assert torch.equal(model(IDS).q_logits, want) and model.adapter_names == ["mine"]


# What is saved beside a LoRA.


@pytest.mark.parametrize(
    ("targets", "options"),
    [
        (("embed_tokens", "q_proj"), {}),
        (("lm_head",), {}),
        (("q_proj",), {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (("q_proj",), {"trainable_token_indices": IDS[0].tolist()}),
        (("q_proj",), {"use_dora": True, "lora_dropout": 0.1}),
    ],
)
def test_embeddings_and_heads_come_back(base_dir, tmp_path, targets, options):
    model = build(base_dir, *targets, **options)
    model.save_pretrained(tmp_path / "a")
    want = model(IDS)
    loaded = QAdapterModel.from_pretrained(tmp_path / "a")(IDS)
    assert torch.equal(loaded.q_logits, want.q_logits)
    assert torch.equal(loaded.base_logits, want.base_logits)
    plain = PeftModel.from_pretrained(make_base(), tmp_path / "a")
    torch.testing.assert_close(plain(IDS).logits.flatten(0, 1), want.q_logits, **OWN_KERNELS)
    resumed = build(base_dir, *targets, seed=1, **options)
    resumed.load_adapter_weights(tmp_path / "a")
    assert torch.equal(resumed(IDS).q_logits, want.q_logits)
    assert torch.equal(resumed(IDS).base_logits, want.base_logits)
    attached = build(base_dir, seed=2)
    attached.load_adapter(tmp_path / "a", "x")
    assert torch.equal(attached(IDS).base_logits, want.base_logits)


def test_a_saved_adapter_has_nothing_of_the_base(base_dir, tmp_path):
    build(base_dir, "embed_tokens").save_pretrained(tmp_path / "a")
    assert all("lora_" in name for name in load_file(tmp_path / "a" / WEIGHTS))


@pytest.mark.parametrize("way", ["load", "attach", "resume"])
def test_a_file_with_weights_of_another_base(base_dir, tmp_path, way):
    """PEFT would load them into this one."""
    build(base_dir, "embed_tokens").save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / WEIGHTS
    weights = load_file(file)
    embedding = make_base().get_input_embeddings().weight.detach().clone()
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    save_file({**weights, name: embedding}, file)
    model = build(base_dir, "embed_tokens")
    before = model(IDS)
    load_into(model, tmp_path / "a", way)  # those of this base may be there
    embedding[40:] += 1.0  # rows that no probe looks at
    save_file({**weights, name: embedding}, file)
    model = build(base_dir, "embed_tokens")
    with pytest.raises(ValueError, match=r"embed_tokens\.weight in its file is not that of this"):
        load_into(model, tmp_path / "a", way)
    after = model(IDS)
    assert torch.equal(after.base_logits, before.base_logits)
    assert torch.equal(after.q_logits, before.q_logits) and model.adapter_names == ["default"]


def load_into(model, folder, way):
    if way == "load":
        QAdapterModel.from_pretrained(folder)
    elif way == "attach":
        model.load_adapter(folder, "x")
    else:
        model.load_adapter_weights(folder)


# Files that do not fit.


@pytest.mark.parametrize("way", ["load", "attach", "resume"])
@pytest.mark.parametrize("change", ["lacks", "has too much"])
def test_a_file_with_other_weights_than_its_adapter(base_dir, tmp_path, way, change):
    build(base_dir, seed=3).save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / WEIGHTS
    weights = load_file(file)
    name = next(name for name in weights if "layers.1." in name)
    if change == "lacks":
        del weights[name]
    else:
        weights[name.replace("q_proj", "k_proj")] = weights[name].clone()
    save_file(weights, file)
    model = build(base_dir)
    before = model(IDS).q_logits
    with pytest.raises(ValueError, match=f"its file {change}:? 1 weights of this adapter"):
        load_into(model, tmp_path / "a", way)
    assert torch.equal(model(IDS).q_logits, before) and model.adapter_names == ["default"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_alpha": 32}, "lora_alpha is 8 in this adapter, 32 in the model's"),
        ({"use_rslora": True}, "use_rslora is False"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern is {}"),
        ({"r": 2, "lora_alpha": 4}, "is 4 in this adapter, 2|lora_alpha is 8"),
        ({"use_dora": True}, "use_dora is False"),
        ({"target_modules": ["q_proj", "v_proj"]}, "its file lacks 6 weights"),
        ({"layers_to_transform": [0]}, "its file has too much: 4 weights"),
    ],
)
def test_weights_of_another_lora_are_not_resumed(base_dir, tmp_path, options, message):
    build(base_dir, seed=4).save_pretrained(tmp_path / "a")
    model = build(base_dir, **options)
    before = model(IDS).q_logits
    with pytest.raises(ValueError, match=message):
        model.load_adapter_weights(tmp_path / "a")
    assert torch.equal(model(IDS).q_logits, before)


def test_dropout_and_initialisation_may_differ_on_resuming(base_dir, tmp_path):
    build(base_dir, seed=5).save_pretrained(tmp_path / "a")
    model = build(base_dir, lora_dropout=0.2, init_lora_weights="gaussian")
    model.load_adapter_weights(tmp_path / "a")
    assert torch.equal(model(IDS).q_logits, build(base_dir, seed=5)(IDS).q_logits)


@pytest.mark.parametrize("way", ["load", "attach", "resume"])
def test_an_adapter_that_moves_the_base_is_not_loaded(base_dir, tmp_path, way):
    build(base_dir).save_pretrained(tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    edit(config, lambda c: c.update(init_lora_weights="pissa"))
    model = build(base_dir)
    before = model(IDS)
    with pytest.raises(ValueError, match="init_lora_weights='pissa': PiSSA takes"):
        load_into(model, tmp_path / "a", way)
    assert torch.equal(model(IDS).base_logits, before.base_logits)


@pytest.mark.parametrize(
    "options",
    [
        {"layers_to_transform": range(2)},
        {"rank_pattern": {"q_proj": torch.tensor(2)}},
        {"lora_alpha": torch.tensor(8.0)},
    ],
)
def test_what_could_not_be_saved_is_refused_before_training(options):
    with pytest.raises(ValueError, match="cannot be saved as JSON"):
        QAdapterModel.from_base(make_base(), lora_config=lora(**options))


# The base that an adapter is for.


def test_a_base_with_a_merged_adapter_is_another_base(base_dir, tmp_path):
    """Its embedding and its head are those of the original."""
    build(base_dir, seed=1).save_pretrained(tmp_path / "a")
    merged = build(base_dir, "q_proj", "down_proj", "v_proj").peft_model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    with pytest.raises(ValueError, match=r"same shape, other weights \(body\)"):
        QAdapterModel.from_pretrained(tmp_path / "a", base_model=tmp_path / "merged")


@pytest.mark.parametrize(
    ("trained", "used"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16),
    ],
)
def test_another_dtype_is_the_same_base(base_dir, tmp_path, trained, used):
    QAdapterModel.from_pretrained(base_dir, dtype=trained).save_pretrained(tmp_path / "a")
    model = QAdapterModel.from_pretrained(tmp_path / "a", dtype=used)
    assert model.hf_model.dtype == used


def test_layers_that_are_offloaded_are_not_compared(base_dir, tmp_path):
    """Where they are not in memory; the others still are."""
    model = build(base_dir)
    model.save_pretrained(tmp_path / "a")
    model.hf_model.model.layers[1].mlp.to("meta")
    model.load_adapter_weights(tmp_path / "a")
    model.hf_model.model.layers[2].mlp.up_proj.weight.data *= 1.1
    with pytest.raises(ValueError, match=r"other weights \(body\)"):
        model.load_adapter_weights(tmp_path / "a")


@pytest.mark.parametrize("levels", [127, 7])
def test_a_base_that_was_rounded_to_integers_is_another_base(base_dir, tmp_path, levels):
    """As one that was quantised to 8 or 4 bits and saved as floats again."""
    build(base_dir).save_pretrained(tmp_path / "a")
    rounded = AutoModelForCausalLM.from_pretrained(base_dir)
    for layer in rounded.model.layers:
        for linear in (layer.mlp.gate_proj, layer.mlp.down_proj, layer.self_attn.v_proj):
            step = linear.weight.data.abs().amax(1, keepdim=True) / levels
            linear.weight.data = (linear.weight.data / step).round() * step
    rounded.save_pretrained(tmp_path / "rounded")
    with pytest.raises(ValueError, match=r"other weights \(body\)"):
        QAdapterModel.from_pretrained(tmp_path / "a", base_model=tmp_path / "rounded")


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
QUANTISED = {
    "nf4": BitsAndBytesConfig(**NF4),
    "fp4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "gptq": {"quant_method": "gptq", "bits": 4, "dataset": "c4"},
}


@pytest.mark.parametrize(
    ("there", "here"),
    [
        *(("nf4", "none"), ("none", "nf4"), ("int8", "none"), ("nf4", "fp4"), ("int8", "nf4")),
        *(("gptq", "nf4"), ("nf4", "nf4"), ("gptq", "gptq")),
    ],
)
def test_a_base_that_is_quantised_otherwise_is_another_base(base_dir, tmp_path, there, here):
    """The settings alone: the packages that quantise need not be there."""
    saved = build(base_dir)
    saved.hf_model.config.quantization_config = QUANTISED.get(there)
    saved.save_pretrained(tmp_path / "a")
    model = build(base_dir, seed=1)
    model.hf_model.config.quantization_config = QUANTISED.get(here)
    if there == here:
        model.load_adapter_weights(tmp_path / "a")
        model.load_adapter(tmp_path / "a", "x")
        return
    for load in (model.load_adapter_weights, lambda folder: model.load_adapter(folder, "x")):
        with pytest.raises(ValueError, match=r"another base .*: quantisation .* at training"):
            load(tmp_path / "a")


def test_a_quantised_base_may_compute_in_another_dtype(base_dir, tmp_path):
    saved, model = build(base_dir), build(base_dir, seed=1)
    for one, dtype in ((saved, torch.float16), (model, torch.bfloat16)):
        settings = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=dtype)
        one.hf_model.config.quantization_config = settings
    saved.save_pretrained(tmp_path / "a")
    # A setting that a later release adds.
    change = {"bnb_4bit_of_tomorrow": True}
    edit(
        tmp_path / "a" / CONFIG_NAME, lambda c: c["base_fingerprint"]["quantisation"].update(change)
    )
    model.load_adapter_weights(tmp_path / "a")


def test_weights_that_are_quantised_without_a_config_are_seen():
    """In place, after loading: by their dtype, by their class, in torch's own layers."""
    base = make_base()
    assert fingerprint(base)["quantisation"] is None
    layer = base.model.layers[0].mlp
    layer.down_proj.weight = torch.nn.Parameter(
        torch.zeros(32, 48, dtype=torch.int8), requires_grad=False
    )
    assert fingerprint(base)["quantisation"] == {"weights": ["torch.int8"]}
    base = make_base()
    torch.ao.quantization.quantize_dynamic(base.model.layers, {torch.nn.Linear}, inplace=True)
    assert "LinearPackedParams" in fingerprint(base)["quantisation"]["weights"]


def test_folders_of_version_0_1_0_load(base_dir, tmp_path):
    """They know of no quantisation and of no weights between embedding and head."""
    model = build(base_dir)
    model.save_pretrained(tmp_path / "a")

    def before(config):
        config["qadapter_version"] = "0.1.0"
        for key in ("quantisation", "body_probe"):
            del config["base_fingerprint"][key]

    edit(tmp_path / "a" / CONFIG_NAME, before)
    loaded = QAdapterModel.from_pretrained(tmp_path / "a")
    assert torch.equal(loaded(IDS).q_logits, model(IDS).q_logits)
    model.load_adapter_weights(tmp_path / "a")
    model.load_adapter(tmp_path / "a", "x")


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": [3, 4, 5]},
        {"target_modules": ["embed_tokens", "lm_head", "down_proj"]},
        {"target_parameters": ["mlp.gate_proj.weight"]},
    ],
)
def test_the_fingerprint_is_the_bases(base_dir, options):
    plain = fingerprint(make_base())
    assert fingerprint(build(base_dir, **options).hf_model) == plain


def test_a_base_that_was_resized_in_memory(base_dir, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(base_dir)
    refuse_resized(base)
    refuse_resized(make_base())  # from no folder
    base.resize_token_embeddings(101)
    with pytest.raises(ValueError, match=r"the base has 101 tokens, .* has 97"):
        refuse_resized(base)
    base.save_pretrained(tmp_path / "wider")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "wider")
    refuse_resized(base)
    model = perturb(QAdapterModel.from_base(base, lora_config=lora("embed_tokens", "q_proj")))
    model.save_pretrained(tmp_path / "a")
    loaded = QAdapterModel.from_pretrained(tmp_path / "a")
    assert torch.equal(loaded(IDS).q_logits, model(IDS).q_logits)
