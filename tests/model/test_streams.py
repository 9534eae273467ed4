"""All streams in one forward are what a forward with PEFT's own layers gives for each."""

import copy
import logging

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model

from qadapter import QAdapterModel
from qadapter.model import values
from qadapter.model.streams import Streams
from tests.tiny_models import make_base, make_model, perturb

IDS = torch.randint(3, 97, (3, 7), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(IDS)
MASK[1, :3] = 0
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
KINDS = ["llama", "qwen2", "gpt2"]
TARGETS = {
    "attention": {"gpt2": ["c_attn"], "": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "mlp": {"gpt2": ["c_fc"], "": ["gate_proj", "down_proj"]},
}


def lora(kind, targets="attention", **options):
    names = TARGETS[targets].get(kind, TARGETS[targets][""])
    return LoraConfig(**{"r": 4, "target_modules": names, "task_type": "CAUSAL_LM", **options})


def build(kind, config, **composition):
    torch.manual_seed(0)
    return perturb(QAdapterModel.from_base(make_base(kind), lora_config=config, **composition))


@torch.no_grad()
def composed(model, mix, ids, mask):
    """Logits of whole forwards, weighted; ``mix`` is {adapter or None: weights}."""
    own = model.adapter_names[0]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    total = 0.0
    for name, weight in mix.items():
        if name is None:
            with model.peft_model.disable_adapter():
                logits = model.peft_model(**inputs).logits
        else:
            model.peft_model.set_adapter(name)
            logits = model.peft_model(**inputs).logits
            model.peft_model.set_adapter(own)
        total = total + torch.as_tensor(weight).reshape(-1, 1, 1) * logits.double()
    return total


def stepwise(model, mix, steps, ids=IDS, mask=MASK):
    """Greedy text, everything recomputed at every token."""
    for _ in range(steps):
        best = composed(model, mix, ids, mask)[:, -1].argmax(-1)
        ids = torch.cat([ids, best[:, None]], 1)
        mask = torch.cat([mask, mask.new_ones(len(ids), 1)], 1)
    return ids


def is_greedy(model, mix, text, steps):
    """Whether every token behind IDS is the best after those before it, as with `stepwise`."""
    start = IDS.shape[1]
    mask = torch.cat([MASK, MASK.new_ones(len(IDS), steps)], 1)
    best = composed(model, mix, text, mask)[:, start - 1 : -1].argmax(-1)
    return torch.equal(text, torch.cat([IDS, best], 1))


OPTIONS = {
    "plain": {},
    "mlp": {"targets": "mlp"},
    "rslora": {"use_rslora": True},
    "rank and alpha patterns": {
        "rank_pattern": {r"layers.1.*q_proj|h.1.*c_attn": 2},
        "alpha_pattern": {r"layers.2.*v_proj|h.2.*c_attn": 33},
    },
    "upper layers": {"layers_to_transform": [1, 2]},
    "last layer": {"layers_to_transform": [2], "targets": "mlp"},
    "all linear": {"target_modules": "all-linear"},
    "lora bias": {"lora_bias": True},
    "dropout": {"lora_dropout": 0.5},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_lora_on_linear_layers_is_exact(kind, options):
    """200 greedy tokens for the options that differ most, 24 for the others."""
    model = build(kind, lora(kind, **options))
    streams = model.streams((None, "default"))
    assert streams.reason is None
    layers = options.get("layers_to_transform", [0])
    assert streams.shared_layers == layers[0]
    steps = 200 if options in ({}, OPTIONS["upper layers"]) else 24
    got = model.generate(IDS, MASK, strength=0.6, max_new_tokens=steps, **GREEDY)
    assert is_greedy(model, {None: 0.4, "default": 0.6}, got, steps)
    base = model.generate(IDS, MASK, strength=0.0, max_new_tokens=24, **GREEDY)
    assert not torch.equal(got[:, : base.shape[1]], base)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_below_the_first_lora_run_once(kind):
    """And their keys and values are kept once."""
    model = build(kind, lora(kind, layers_to_transform=[2]))
    layers = model.hf_model.base_model.h if kind == "gpt2" else model.hf_model.base_model.layers
    assert model.streams((None, "default")).shared_layers == 2
    model.generate(IDS, MASK, max_new_tokens=1, **GREEDY)  # the first tries what the base can do
    rows = {i: set() for i in range(3)}
    hooks = [
        layer.register_forward_hook(
            lambda module, args, kwargs, output, i=i: rows[i].add(
                (output[0] if isinstance(output, tuple) else output).shape[0]
            ),
            with_kwargs=True,
        )
        for i, layer in enumerate(layers)
    ]
    out = model.generate(
        IDS, MASK, strength=0.5, max_new_tokens=5, return_dict_in_generate=True, **GREEDY
    )
    for hook in hooks:
        hook.remove()
    assert rows[0] == {3} and rows[1] == {3} and rows[2] == {6}
    assert [layer.keys.shape[0] for layer in out.past_key_values.layers] == [3, 3, 6]


def test_the_model_is_as_before_afterwards():
    model = make_model()
    before = model.hf_model(input_ids=IDS).logits
    forwards = {module: vars(module).get("forward") for module in model.modules()}

    def unchanged():
        return all(vars(module).get("forward") == before for module, before in forwards.items())

    model.generate(IDS, MASK, strength=0.5, max_new_tokens=2, **GREEDY)
    assert unchanged()
    assert all(not module._forward_pre_hooks for module in model.hf_model.modules())
    assert torch.equal(model.hf_model(input_ids=IDS).logits, before)

    def fail(*_):
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        model.generate(IDS, strength=0.5, max_new_tokens=2, logits_processor=[fail], **GREEDY)
    assert unchanged()


OTHERS = {
    "dora": (lora("llama", use_dora=True), "Dora"),
    "modules to save": (lora("llama", modules_to_save=["lm_head"]), "trained beside"),
    "embedding": (
        lora("llama", target_modules=["embed_tokens", "q_proj"]),
        "layer.Embedding",
    ),
}


@pytest.mark.parametrize(("config", "reason"), OTHERS.values(), ids=OTHERS.keys())
def test_what_is_no_plain_lora_takes_two_passes_and_says_so(config, reason, caplog):
    model = build("llama", copy.deepcopy(config))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name or "embedding_B" in name or "magnitude" in name:
            with torch.no_grad():
                parameter.mul_(1.5).add_(0.1)
    with caplog.at_level(logging.WARNING):
        got = model.generate(IDS, MASK, strength=0.6, max_new_tokens=24, **GREEDY)
    assert reason in caplog.text and "a forward pass of its own" in caplog.text
    assert torch.equal(got, stepwise(model, {None: 0.4, "default": 0.6}, 24))


def test_another_kind_of_adapter_takes_two_passes(caplog):
    config = IA3Config(
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    )
    model = QAdapterModel(get_peft_model(make_base(), config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3_l" in name:
                parameter.add_(0.5 * torch.randn_like(parameter))
    with caplog.at_level(logging.WARNING):
        got = model.generate(IDS, MASK, strength=0.6, max_new_tokens=24, **GREEDY)
    assert "a forward pass of its own" in caplog.text
    assert torch.equal(got, stepwise(model, {None: 0.4, "default": 0.6}, 24))


def test_heads_that_are_adapted_or_capped_are_composed_as_logits():
    model = build("llama", lora("llama", target_modules=["q_proj", "lm_head"]))
    assert model.streams((None, "default")).reason is None and not model.selects_hidden_rows
    got = model.generate(IDS, MASK, strength=0.6, max_new_tokens=24, **GREEDY)
    assert torch.equal(got, stepwise(model, {None: 0.4, "default": 0.6}, 24))
    model = make_model("gemma2")
    got = model.generate(IDS, MASK, strength=0.6, max_new_tokens=24, **GREEDY)
    assert torch.equal(got, stepwise(model, {None: 0.4, "default": 0.6}, 24))


def test_a_head_with_bias():
    model = make_model()
    head = model.hf_model.lm_head
    head.bias = torch.nn.Parameter(3 * torch.randn(97), requires_grad=False)
    model.selects_hidden_rows = values.head_is_plain(model.hf_model)
    assert model.selects_hidden_rows
    for strength, other in ((0.6, 0.4), (2.0, -1.0)):
        got = model.generate(IDS, MASK, strength=strength, max_new_tokens=24, **GREEDY)
        assert torch.equal(got, stepwise(model, {None: other, "default": strength}, 24))
    model.set_composition(0.5, 0.25, 0.0)
    got = model.generate(IDS, MASK, max_new_tokens=24, **GREEDY)
    assert torch.equal(got, stepwise(model, {None: 2.0, "default": 4.0}, 24))


def test_a_layer_that_gets_a_part_of_the_tokens_is_noticed(caplog):
    """As an expert of a mixture does: slices of rows would mean nothing there."""
    model = make_model()
    layer = model.hf_model.base_model.layers[1].self_attn.q_proj
    plain = type(layer).forward

    class Half(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = layer

        def forward(self, x):
            half = x.shape[1] // 2 + 1
            first = self.inner(x.flatten(0, 1)[:half]), self.inner(x.flatten(0, 1)[half:])
            return torch.cat(first).view(*x.shape[:-1], -1)

    model.hf_model.base_model.layers[1].self_attn.q_proj = Half()
    with caplog.at_level(logging.WARNING):
        got = model.generate(IDS, MASK, strength=0.6, max_new_tokens=24, **GREEDY)
    assert "a part of the tokens" in caplog.text and type(layer).forward is plain
    assert torch.equal(got, stepwise(model, {None: 0.4, "default": 0.6}, 24))


# Several adapters.


@pytest.fixture
def two_adapters(tmp_path):
    """A model with a second adapter on other layers and modules, and another center."""
    other = build("llama", lora("llama", "mlp", layers_to_transform=[1, 2]), center=0.5)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-0.7)
    other.save_pretrained(tmp_path / "other")
    model = build("llama", lora("llama"))
    model.load_adapter(tmp_path / "other", "other")
    return model


def test_adapters_blend(two_adapters):
    model = two_adapters
    assert model.adapter_names == ["default", "other"]
    weights = {"default": 0.7, "other": 0.5}
    got = model.generate(IDS, MASK, adapters=weights, max_new_tokens=40, **GREEDY)
    base = 1.0 - 0.7 - 0.5 * 0.5
    assert model.streams((None, "default", "other")).reason is None
    assert torch.equal(got, stepwise(model, {None: base, **weights}, 40))
    # With a strength: alpha_0 = alpha_tilde = 1 / 2.
    got = model.generate(IDS, MASK, adapters=weights, strength=2.0, max_new_tokens=24, **GREEDY)
    mix = {None: 1.0 - 2 * 0.95, "default": 1.4, "other": 1.0}
    assert torch.equal(got, stepwise(model, mix, 24))
    # One of them alone is what it is alone.
    got = model.generate(IDS, MASK, adapters={"other": 1.0}, max_new_tokens=24, **GREEDY)
    assert torch.equal(got, stepwise(model, {None: 0.5, "other": 1.0}, 24))
    # Nothing of either is the base.
    got = model.generate(IDS, MASK, adapters={"other": 0.0}, max_new_tokens=24, **GREEDY)
    assert torch.equal(got, model.generate(IDS, MASK, strength=0.0, max_new_tokens=24, **GREEDY))


def test_weights_by_row(two_adapters):
    weights = {"default": [0.0, 0.7, 1.0], "other": torch.tensor([0.0, 0.5, 0.0])}
    got = two_adapters.generate(IDS, MASK, adapters=weights, max_new_tokens=24, **GREEDY)
    mix = {None: [1.0, 1 - 0.95, 0.0], "default": [0.0, 0.7, 1.0], "other": [0.0, 0.5, 0.0]}
    assert torch.equal(got, stepwise(two_adapters, mix, 24))


def test_other_adapters_take_no_part_in_the_rest(two_adapters, tmp_path):
    model = two_adapters
    alone = build("llama", lora("llama"))
    assert torch.equal(model(IDS).q_logits, alone(IDS).q_logits)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, p in alone.named_parameters() if p.requires_grad
    }
    model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "other").exists()
    with pytest.raises(ValueError, match="for another base"):
        build("qwen2", lora("qwen2")).load_adapter(tmp_path / "saved", "x")


def test_adapters_that_peft_has_loaded():
    """They have the composition of the model; those that come later are seen too."""
    peft_model = get_peft_model(make_base(), lora("llama"))
    peft_model.add_adapter("formal", lora("llama", "mlp"))
    model = QAdapterModel(peft_model)
    perturb(model)
    assert model.adapter_names == ["default", "formal"]
    weights = {"default": 0.7, "formal": 0.5}
    got = model.generate(IDS, MASK, adapters=weights, max_new_tokens=24, **GREEDY)
    assert torch.equal(got, stepwise(model, {None: -0.2, **weights}, 24))
    # An adapted head cannot be one product.
    assert model.selects_hidden_rows
    peft_model.add_adapter("brief", lora("llama", target_modules=["lm_head", "o_proj"]))
    perturb(model, 0.2)
    weights = {"formal": 0.5, "brief": 0.25}
    got = model.generate(IDS, MASK, adapters=weights, max_new_tokens=24, **GREEDY)
    assert torch.equal(got, stepwise(model, {None: 0.25, **weights}, 24))
    assert model.adapter_names == ["default", "formal", "brief"] and not model.selects_hidden_rows
    peft_model.delete_adapter("brief")
    with pytest.raises(ValueError, match="no adapter is named 'brief'"):
        model.generate(IDS, adapters=weights, max_new_tokens=2, **GREEDY)


def test_adapters_with_different_alphas_need_a_word(tmp_path):
    make_model(alpha_0=2.0, alpha_tilde=2.0).save_pretrained(tmp_path / "two")
    model = make_model()
    model.load_adapter(tmp_path / "two", "two")
    weights = {"default": 0.5, "two": 0.5}
    with pytest.raises(ValueError, match="alpha_0: these adapters were trained with different"):
        model.generate(IDS, adapters=weights, max_new_tokens=2, **GREEDY)
    got = model.generate(IDS, MASK, adapters=weights, strength=0.5, max_new_tokens=9, **GREEDY)
    mix = {None: 0.5, "default": 0.25, "two": 0.25}
    assert torch.equal(got, stepwise(model, mix, 9))
    got = model.generate(IDS, MASK, adapters={"two": 1.0}, max_new_tokens=9, **GREEDY)
    assert torch.equal(got, stepwise(model, {None: 0.5, "two": 0.5}, 9))


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ({}, "adapters: expected weights by adapter name"),
        ([0.5], "adapters: expected weights by adapter name"),
        ({"nobody": 1.0}, "no adapter is named 'nobody', there are: default"),
        ({"default": "much"}, r"adapters\['default'\]"),
        ({"default": [0.1, 0.2]}, r"adapters\['default'\]: expected a number or one for each of"),
        ({"default": float("nan")}, r"adapters\['default'\]"),
    ],
)
def test_refuses_weights(adapters, message):
    with pytest.raises(ValueError, match=message):
        make_model().generate(IDS, adapters=adapters, max_new_tokens=2)


def test_refuses_adapters(tmp_path):
    model = make_model()
    with pytest.raises(ValueError, match="not the folder of a saved adapter"):
        model.load_adapter(tmp_path, "x")
    model.save_pretrained(tmp_path / "a")
    in_paths = [(name, "in the path of") for name in ("1", "layers", "v", "lora_A")]
    for name, message in (("default", "already"), ("", "name"), ("a.b", "without dots"), *in_paths):
        with pytest.raises(ValueError, match=message):
            model.load_adapter(tmp_path / "a", name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stream_that_is_not_its_own_is_noticed(dtype, monkeypatch):
    model = build("llama", lora("llama"))
    model.to(dtype)
    assert Streams(model.peft_model, (None, "default")).reason is None
    right = Streams.hidden

    def mixed(self, *args):
        base, adapter = right(self, *args).chunk(2)
        return torch.cat([base, 0.5 * (base + adapter)])

    monkeypatch.setattr(Streams, "hidden", mixed)
    assert "differs by" in (Streams(model.peft_model, (None, "default")).reason or "")
