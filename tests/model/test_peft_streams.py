"""The base stream is the base that was given, the adapter's counts, whatever PEFT does to them."""

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.utils.hotswap import hotswap_adapter
from torch import nn

from qadapter import QAdapterModel
from qadapter.model.probe import BaseProbe
from qadapter.model.recompute import recompute_cheap
from tests.tiny_models import make_base, make_model, perturb

IDS = torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(5))
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 6}


def lora(*targets, **options):
    names = list(targets) or ["q_proj", "v_proj"]
    return LoraConfig(**{"r": 4, "target_modules": names, "task_type": "CAUSAL_LM", **options})


@torch.no_grad()
def base_logits(kind="llama"):
    """By the same kernels, which a base of transformers alone does not have."""
    base = make_base(kind).requires_grad_(False)
    recompute_cheap(base)
    return base(IDS).logits.flatten(0, 1)


# Initialisations.


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal"])
def test_the_base_stream_is_the_base(kind, init):
    targets = ["c_attn"] if kind == "gpt2" else ["q_proj", "down_proj"]
    config = lora(*targets, init_lora_weights=init, fan_in_fan_out=kind == "gpt2")
    model = QAdapterModel.from_base(make_base(kind), lora_config=config)
    assert torch.equal(model(IDS).base_logits, base_logits(kind))


@pytest.mark.parametrize("init", ["pissa", "PiSSA_niter_2", "olora", "OLoRA", "corda", "lora_ga"])
def test_a_base_that_would_be_moved_is_left_as_it_is(init):
    base = make_base()
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}'.*no base stream left"):
        QAdapterModel.from_base(base, lora_config=lora(init_lora_weights=init))
    assert torch.equal(base(IDS).logits, make_base()(IDS).logits)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_a_base_that_was_moved_elsewhere_is_refused(init):
    moved = get_peft_model(make_base(), lora(init_lora_weights=init))
    with pytest.raises(ValueError, match="no base stream left"):
        QAdapterModel(moved)


def test_a_base_that_peft_moves_later_is_refused():
    model = make_model()
    model.peft_model.add_adapter("moving", lora(init_lora_weights="olora"))
    with pytest.raises(ValueError, match="adapter 'moving': init_lora_weights='olora'"):
        model(IDS)
    model.peft_model.delete_adapter("moving")  # which does not move it back
    with pytest.raises(ValueError, match="no base stream left"):
        model.generate(IDS, **GREEDY)


def test_an_initialisation_that_nobody_knows_is_noticed(monkeypatch):
    """A little: the smallest move that changes a logit, found by its effect and not by its name."""
    plain = LoraLayer.reset_lora_parameters

    def moving(self, name, init):
        plain(self, name, init)
        self.get_base_layer().weight.data[0, 0] += 1e-3

    monkeypatch.setattr(LoraLayer, "reset_lora_parameters", moving)
    with pytest.raises(ValueError, match=r"this LoRA .* changes the base: .*off by"):
        QAdapterModel.from_base(make_base(), lora_config=lora())


def test_a_base_that_does_not_repeat_itself_may_differ_by_as_much():
    base, size = make_base(), 0.0
    forward = base.lm_head.forward
    generator = torch.Generator().manual_seed(0)

    def noisy(x):
        out = forward(x)
        return out + 1e-5 * torch.rand(out.shape, generator=generator) + size

    base.lm_head.forward = noisy
    probe = BaseProbe(base)
    probe.check(base, "nothing")
    size = 1e-2
    with pytest.raises(ValueError, match="nothing changes the base"):
        probe.check(base, "nothing")


def test_wrapping_leaves_modes_and_gradients_alone():
    base = make_base().train()
    assert all(module.training for module in base.modules())
    peft_model = get_peft_model(base, lora())
    before = [p.requires_grad for p in peft_model.parameters()]
    QAdapterModel(peft_model)
    assert [p.requires_grad for p in peft_model.parameters()] == before
    assert all(p.grad is None for p in peft_model.parameters())


# Adapters that do not count.


def test_an_adapter_that_is_disabled_is_refused():
    peft_model = make_model().peft_model
    peft_model.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match="none of its 12 weights takes part"):
        QAdapterModel(peft_model)


def test_activated_lora_is_refused():
    config = lora(alora_invocation_tokens=[5, 6])
    with pytest.raises(ValueError, match="alora_invocation_tokens"):
        QAdapterModel.from_base(make_base(), lora_config=config)
    with pytest.raises(ValueError, match="alora_invocation_tokens"):
        QAdapterModel(get_peft_model(make_base(), config))


def test_an_adapter_that_cannot_be_turned_off_is_refused():
    peft_model = make_model().peft_model
    layer = peft_model.get_base_model().model.layers[0].self_attn.q_proj
    forward = layer.forward

    def always(x):
        layer._disable_adapters = False
        return forward(x)

    layer.forward = always
    with pytest.raises(ValueError, match=r"turned off, it still takes part \(.*0.self_attn.q_proj"):
        QAdapterModel(peft_model)


def test_layers_that_are_not_called_are_named(caplog):
    """As a fused kernel does: it takes the weight past the layer."""
    base = make_base()
    down = base.model.layers[1].mlp.down_proj
    base.model.layers[1].mlp.forward = lambda x: nn.functional.linear(
        torch.zeros(*x.shape[:-1], 48), down.weight
    )
    QAdapterModel.from_base(base, lora_config=lora("down_proj"))
    assert "1 adapted layers take no part" in caplog.text
    assert "model.layers.1.mlp.down_proj" in caplog.text
    caplog.clear()
    make_model()
    assert "take no part" not in caplog.text


def test_a_base_with_an_adapter_in_it_is_refused():
    with pytest.raises(ValueError, match="there is an adapter in this base already"):
        QAdapterModel.from_base(make_model().hf_model, lora_config=lora())


# Adapters that are replaced.

LAYERS = {
    "same": {},
    "more": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "fewer": {"target_modules": ["v_proj"]},
    "higher": {"layers_to_transform": [2]},
    "lower": {"layers_to_transform": [0]},
    "rank": {"r": 2, "lora_alpha": 32},
}


def assert_alike(one, other):
    """Products of small matrices round by where their weights lie in memory, on some CPUs."""
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Adapters on other layers, in folders of their names."""
    folder = tmp_path_factory.mktemp("adapters")
    make_base().save_pretrained(folder / "base")
    for seed, (name, options) in enumerate(LAYERS.items()):
        torch.manual_seed(seed)
        base = tf.AutoModelForCausalLM.from_pretrained(folder / "base")
        model = QAdapterModel.from_base(base, lora_config=lora(**options), alpha_0=1.0 + seed / 10)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.4)
        model.save_pretrained(folder / name)
    return folder


def decoded(model, **adapters):
    out = model.generate(
        IDS, strength=0.7, adapters=adapters or None, return_dict_in_generate=True,
        output_logits=True, **GREEDY,
    )  # fmt: skip
    return torch.stack(out.logits)


@pytest.mark.parametrize("by_peft", [False, True])
@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("same", "more"),
        ("more", "fewer"),
        ("higher", "lower"),
        ("lower", "higher"),
        ("same", "rank"),
    ],
)
def test_an_adapter_is_replaced_by_one_of_its_name(saved, first, then, by_peft):
    def load(model, name):
        if by_peft:
            model.peft_model.load_adapter(str(saved / name), "x")
        else:
            model.load_adapter(saved / name, "x")

    fresh = QAdapterModel.from_pretrained(saved / "same")
    load(fresh, then)
    want = decoded(fresh, x=1.0, default=0.5)
    model = QAdapterModel.from_pretrained(saved / "same")
    load(model, first)
    assert not torch.equal(decoded(model, x=1.0, default=0.5), want)
    model.peft_model.delete_adapter("x")
    load(model, then)
    torch.testing.assert_close(decoded(model, x=1.0, default=0.5), want)
    assert torch.equal(model(IDS).base_logits, fresh(IDS).base_logits)


def test_the_models_own_adapter_is_replaced(saved):
    model = QAdapterModel.from_pretrained(saved / "fewer")
    decoded(model), model(IDS)
    model.peft_model.delete_adapter("default")
    with pytest.raises(ValueError, match="the model's own adapter was deleted"):
        model(IDS)
    model.peft_model.load_adapter(str(saved / "more"), "default")
    model.peft_model.set_adapter("default")
    fresh = QAdapterModel.from_pretrained(saved / "more")
    assert_alike(model(IDS).q_logits, fresh(IDS).q_logits)
    assert torch.equal(model(IDS).base_logits, fresh(IDS).base_logits)
    torch.testing.assert_close(decoded(model), decoded(fresh))


def test_weights_that_peft_swaps_in_place_are_seen(saved):
    model = QAdapterModel.from_pretrained(saved / "same")
    decoded(model)
    torch.manual_seed(9)
    other = perturb(QAdapterModel.from_base(make_base(), lora_config=lora()), std=0.5)
    other.save_pretrained(saved / "swapped")
    hotswap_adapter(model.peft_model, str(saved / "swapped"), adapter_name="default")
    torch.testing.assert_close(decoded(model), decoded(other))


def test_a_replaced_adapter_does_not_inherit_its_composition(saved):
    model = QAdapterModel.from_pretrained(saved / "same")
    model.load_adapter(saved / "lower", "x")
    assert model.compositions["x"].alpha_0 == 1.4
    model.peft_model.delete_adapter("x")
    model.peft_model.load_adapter(str(saved / "higher"), "x")
    assert model.compositions["x"] == model.compositions["default"]


def test_two_active_adapters_are_no_stream(saved):
    """PEFT would add both of them up."""
    model = QAdapterModel.from_pretrained(saved / "same")
    model.load_adapter(saved / "more", "x")
    want = model(IDS).q_logits
    model.peft_model.base_model.set_adapter(["default", "x"])
    for call in (model, lambda ids: model.generate(ids, **GREEDY)):
        with pytest.raises(ValueError, match="one active adapter, got 2: default, x"):
            call(IDS)
    model.peft_model.set_adapter("default")
    assert torch.equal(model(IDS).q_logits, want)


# Which layers the default LoRA is on.

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
SSM = {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_n_groups": 1}
MAMBA2 = {"head_dim": 8, "num_heads": 8, "state_size": 8, "n_groups": 1}
SCAN = {"x_proj", "dt_proj", "out_proj"}
SPECIAL = {
    "Llama4TextConfig": (
        {**HEADS, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2},
        {"router"},
    ),
    "PhimoeConfig": ({**HEADS, "num_local_experts": 4}, {"router"}),
    "MambaConfig": ({"state_size": 8}, SCAN),
    "FalconMambaConfig": ({"state_size": 8}, SCAN),
    "Mamba2Config": (MAMBA2, SCAN),
    "FalconH1Config": ({**HEADS, **SSM, "mamba_d_ssm": 32, "mamba_d_head": 8}, SCAN),
    "NemotronHConfig": (
        {
            **HEADS,
            "head_dim": 8,
            "hybrid_override_pattern": "M*",
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
        },
        SCAN,
    ),
    "JambaConfig": (
        {
            **HEADS,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "num_experts": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
        },
        SCAN,
    ),
    "BambaConfig": ({**HEADS, **SSM, "mamba_d_head": 16, "attn_layer_indices": [1]}, SCAN),
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("given", [False, True])
def test_all_linear_leaves_out_what_is_not_a_plain_product(kind, given, tmp_path, caplog):
    options, special = SPECIAL[kind]
    torch.manual_seed(0)
    base = tf.AutoModelForCausalLM.from_config(getattr(tf, kind)(**SIZES, **options)).eval()
    base.save_pretrained(tmp_path / "base")
    base.config._name_or_path = str(tmp_path / "base")
    want = base(IDS).logits.flatten(0, 1)
    config = lora(target_modules="all-linear") if given else None
    model = QAdapterModel.from_base(base, lora_config=config)
    adapted = {
        path.rpartition(".")[2]
        for path, module in model.hf_model.named_modules()
        if isinstance(module, LoraLayer)
    }
    assert adapted and adapted.isdisjoint(special)
    assert "take no part" not in caplog.text
    perturb(model)
    out = model(IDS)
    torch.testing.assert_close(out.base_logits, want, rtol=1e-4, atol=1e-4)
    assert (out.q_logits - want).abs().max() > 0.01
    model.save_pretrained(tmp_path / "adapter")
    again = QAdapterModel.from_pretrained(tmp_path / "adapter")
    assert_alike(again(IDS).q_logits, out.q_logits)


def test_all_linear_keeps_a_layer_that_is_a_product_in_other_words():
    """Falcon's own linear layer multiplies as any does."""
    config = tf.FalconConfig(**SIZES, num_attention_heads=4)
    model = QAdapterModel.from_base(tf.AutoModelForCausalLM.from_config(config))
    adapted = sum(isinstance(m, LoraLayer) for m in model.modules())
    assert adapted == 8


def test_a_router_that_is_asked_for_is_refused():
    """PEFT's layer expects a tensor and gets a choice of experts."""
    options = SPECIAL["Llama4TextConfig"][0]
    base = tf.AutoModelForCausalLM.from_config(tf.Llama4TextConfig(**SIZES, **options))
    with pytest.raises(ValueError, match=r"a forward with it fails \(AttributeError"):
        QAdapterModel.from_base(base, lora_config=lora("q_proj", "router"))
