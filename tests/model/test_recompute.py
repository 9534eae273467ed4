"""Recomputed norms and gates give the same numbers, bit for bit, and keep less."""

import copy

import pytest
import torch
from torch import nn

from qadapter.model.recompute import recompute_cheap
from tests.tiny_models import make_base, make_model


def run(model):
    """Hidden states, the gradient of the embeddings, and the bytes that backward keeps."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    embeddings = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    embeddings.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.base_model(inputs_embeds=embeddings, use_cache=False)[0]
    hidden.float().square().sum().backward()
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return hidden.detach(), embeddings.grad, sum(kept.values())


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_same_numbers_and_less_memory(kind):
    model = make_base(kind, dtype=torch.bfloat16).requires_grad_(False)
    lean = copy.deepcopy(model)
    assert recompute_cheap(lean) == 3 * 3 + 1  # two norms and a gate a layer, the last norm
    before, after = run(model), run(lean)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert after[2] < 0.75 * before[2]


def test_a_copy_is_independent_of_the_original():
    model = make_base(dtype=torch.bfloat16).requires_grad_(False)
    recompute_cheap(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert run(other)[0].abs().sum() > 0


def test_what_is_not_frozen_or_not_known_stays():
    model = make_base()  # its weights train
    assert recompute_cheap(model) == 3  # the gates, which have no weights of their own

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(4, 4) for _ in range(3))
            self.act_fn = nn.SiLU()

        def forward(self, hidden):  # gate and up change places
            return self.down_proj(self.act_fn(self.up_proj(hidden)) * self.gate_proj(hidden))

    assert recompute_cheap(nn.Sequential(Odd())) == 0
    assert recompute_cheap(make_base("gpt2")) == 0


def test_a_two_stream_model_uses_it():
    model = make_model()
    assert "forward" in vars(model.hf_model.base_model.layers[0].mlp)
    assert recompute_cheap(model.hf_model) == 0  # done already
