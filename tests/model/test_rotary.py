"""Models take the rotary kernel where it gives their own numbers, and only there."""

import pytest
import torch

from qadapter.model import rotary
from qadapter.model.rotary import fuse_rotary
from qadapter.ops import cpp, layer_rows
from tests.tiny_models import make_base

pytestmark = pytest.mark.skipif(not cpp.available()[0], reason=cpp.available()[1])


def hidden(model, rows=2):
    ids = torch.randint(5, 60, (rows, 9), generator=torch.Generator().manual_seed(0))
    return model.base_model(input_ids=ids, use_cache=False)[0]


@pytest.fixture
def calls(monkeypatch):
    made, kernel = [], layer_rows.rotary
    monkeypatch.setattr(layer_rows, "rotary", lambda *a: made.append(a[0].shape) or kernel(*a))
    return made


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits(kind, dtype, calls):
    model = make_base(kind, dtype=dtype).eval()
    expected = hidden(model)
    layers = len(model.base_model.layers)
    assert fuse_rotary(model) == layers
    calls.clear()
    assert torch.equal(hidden(model), expected)
    assert len(calls) == 2 * layers
    assert fuse_rotary(model) == 0  # they are already


def test_one_model_alone_changes(calls):
    model, other = make_base("llama").eval(), make_base("llama").eval()
    fuse_rotary(model)
    calls.clear()
    hidden(other)
    assert not calls


def test_gradients_pass():
    model = make_base("llama").eval().requires_grad_(False)

    def gradient():
        embeddings = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1))
        embeddings.requires_grad_()
        model.base_model(inputs_embeds=embeddings, use_cache=False)[0].square().sum().backward()
        return embeddings.grad

    expected = gradient()
    assert fuse_rotary(model) > 0
    torch.testing.assert_close(gradient(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "other",
    [
        lambda q, k, cos, sin: (q * cos.unsqueeze(1), k * cos.unsqueeze(1)),
        lambda q, k: (q, k),
    ],
)
def test_another_rotation_stays(other, monkeypatch):
    model = make_base("llama").eval()
    forward = type(model.base_model.layers[0].self_attn).forward
    monkeypatch.setitem(forward.__globals__, "apply_rotary_pos_emb", other)
    assert fuse_rotary(model) == 0


def test_without_the_extension_nothing_changes(monkeypatch):
    monkeypatch.setattr(cpp, "why_not_loaded", lambda: "no extension")
    assert rotary.fuse_rotary(make_base("llama")) == 0
