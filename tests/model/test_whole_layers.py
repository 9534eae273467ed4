"""A layer in one operation: which layers are taken, and that steps give what the modules give."""

import pytest
import torch
import transformers as tf
from peft import LoraConfig

from qadapter import QAdapterModel
from qadapter.model import whole_layers
from qadapter.ops import cpp
from tests.tiny_models import make_base, make_model, perturb

if not cpp.available()[0]:
    pytest.skip(cpp.available()[1], allow_module_level=True)

IDS = torch.randint(5, 97, (3, 9), generator=torch.Generator().manual_seed(2))
MASK = torch.ones_like(IDS)
MASK[1, :4] = 0
NEW = 12
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": NEW}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture
def calls(monkeypatch):
    """The rows of each layer that was one operation."""
    seen, operation = [], whole_layers.decoder_layer

    def counted(hidden, *args, **given):
        seen.append(len(hidden))
        return operation(hidden, *args, **given)

    monkeypatch.setattr(whole_layers, "decoder_layer", counted)
    return seen


def adapted(base, **lora):
    config = LoraConfig(**{"r": 4, "target_modules": ALL, "task_type": "CAUSAL_LM", **lora})
    return perturb(QAdapterModel.from_base(base, lora_config=config))


def logits(model, monkeypatch=None, **options):
    """Of each step, float32 [new, B, V]; by the layers' own modules where monkeypatch is given."""
    if monkeypatch is not None:
        monkeypatch.setattr(whole_layers, "MOST_ROWS", 0)
    options = {"strength": 0.6, "return_dict_in_generate": True, "output_logits": True, **options}
    made = model.generate(IDS, MASK, **GREEDY, **options)
    return torch.stack(made.logits)


def assert_near(got, want, dtype=torch.float32):
    """Up to the first token that another rounding has chosen, which float32 knows none of."""
    allowed = 2e-5 if dtype == torch.float32 else 0.1
    same = (got.argmax(-1) == want.argmax(-1)).all(-1).long().cumprod(0).sum()
    steps = min(int(same) + 1, len(want))
    assert steps > 2 and (steps == len(want) or dtype != torch.float32)
    assert (got - want)[:steps].abs().max() <= allowed * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "llama-64"])
def test_steps_give_what_the_modules_give(kind, dtype, calls, monkeypatch):
    model = adapted(make_base(kind, dtype=dtype))
    got = logits(model)
    assert calls[-3 * (NEW - 1) :] == [6] * 3 * (NEW - 1)  # the rest are trials
    count = len(calls)
    assert_near(got, logits(model, monkeypatch), dtype)
    assert len(calls) == count


def test_layers_below_the_first_lora_are_taken_for_one_stream(calls, monkeypatch):
    model = adapted(make_base(), layers_to_transform=[1, 2])
    got = logits(model)
    assert calls[-3:] == [3, 6, 6]
    assert_near(got, logits(model, monkeypatch))


@pytest.mark.parametrize("strength", [0.0, 1.0, [0.0, 1.0, 2.0]])
def test_one_stream_and_strengths_by_row(strength, calls, monkeypatch):
    model = adapted(make_base())
    got = logits(model, strength=strength)
    assert calls[-1] == (6 if isinstance(strength, list) else 3)
    assert_near(got, logits(model, monkeypatch, strength=strength))


def test_weights_are_those_of_the_moment(calls, monkeypatch):
    model = adapted(make_base())
    before = logits(model)
    layer = model.hf_model.base_model.layers[1]
    with torch.no_grad():
        layer.mlp.up_proj.base_layer.weight.mul_(1.5)
        layer.self_attn.k_proj.lora_A["default"].weight = torch.nn.Parameter(torch.ones(4, 32))
        layer.self_attn.o_proj.scaling["default"] = 3.0
    got = logits(model)
    assert not torch.allclose(got[0], before[0])
    assert calls[-1] == 6
    assert_near(got, logits(model, monkeypatch))


def of_class(name, **more):
    torch.manual_seed(0)
    config = getattr(tf, f"{name}Config")(**SIZES, **more)
    return tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("base", "layers"),
    [
        (lambda: of_class("Granite"), 3),
        (lambda: of_class("Granite", residual_multiplier=0.5), 0),
        (lambda: of_class("Granite", attention_multiplier=2.0), 3),  # the factor of the scores
        (lambda: of_class("Mistral", sliding_window=None), 3),
        (lambda: of_class("Llama", hidden_act="gelu"), 0),
        (lambda: of_class("Llama", attention_bias=True, mlp_bias=True), 3),
        (lambda: of_class("Llama", head_dim=6), 3),
        (lambda: of_class("Qwen3", head_dim=8), 0),  # norms of queries and keys
        (lambda: make_base("gemma2"), 0),
        (lambda: make_base("gpt2"), 0),
    ],
)
def test_which_layers_are_taken(base, layers, calls, monkeypatch):
    base = base()
    targets = ["c_attn"] if base.config.model_type == "gpt2" else ALL
    model = adapted(base, target_modules=targets)
    model.streams((None, "default"))
    del calls[:]  # of trials
    got = logits(model)
    assert len(calls) == layers * (NEW - 1)
    assert_near(got, logits(model, monkeypatch))


def test_a_window_of_keys_is_left_to_the_modules(calls, monkeypatch):
    model = adapted(of_class("Mistral", sliding_window=8))
    got, trials = logits(model), 6
    assert len(calls) <= trials
    assert_near(got, logits(model, monkeypatch))


@pytest.mark.parametrize(
    "part", ["mlp", "self_attn", "input_layernorm", "self_attn.v_proj", "mlp.up_proj.base_layer"]
)
def test_hooks_on_parts_of_a_layer_run(part, calls):
    model = adapted(make_base())
    logits(model)
    layer = model.hf_model.base_model.layers[1]
    seen = []
    hook = layer.get_submodule(part).register_forward_hook(lambda *_: seen.append(1))
    del calls[:]
    logits(model)
    assert len(seen) == NEW and len(calls) == 2 * (NEW - 1)  # the other layers
    hook.remove()
    del calls[:]
    logits(model)
    assert len(calls) == 3 * (NEW - 1)


def test_a_part_whose_forward_was_replaced_is_called():
    model = make_model()
    before = logits(model)
    norm = model.hf_model.base_model.layers[1].input_layernorm
    own = norm.forward
    norm.forward = lambda x: own(x) * 1.5
    replaced = logits(model)
    assert not torch.allclose(before[-1], replaced[-1])
    norm.forward = own
    assert torch.equal(logits(model), before)
