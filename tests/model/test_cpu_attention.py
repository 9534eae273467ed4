"""Attention by matrix products is as near to float64 as PyTorch's fused attention."""

import pytest
import torch
import torch.nn.functional as F

from qadapter.model import cpu_attention, packed_attention


def case(queries, keys, heads, groups, dim, dtype):
    generator = torch.Generator().manual_seed(queries + keys)
    shapes = [(1, heads, queries, dim), (1, groups, keys, dim), (1, groups, keys, dim)]
    tensors = [torch.randn(s, generator=generator).mul(1.5).to(dtype) for s in shapes]
    # As a model makes them: heads behind tokens in memory.
    tensors = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    return tensors, torch.randn(1, queries, heads, dim, generator=generator).to(dtype)


def fused(query, key, value, scaling, window):
    repeat = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeat, 1) for x in (key, value))
    mask = cpu_attention.causal_mask(query.shape[2], key.shape[2], window, query.device)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return output.transpose(1, 2)


def evaluate(function, tensors, upstream, window, dtype):
    tensors = [t.detach().to(dtype).requires_grad_() for t in tensors]
    output = function(*tensors, 0.125, window)
    gradients = torch.autograd.grad(output, tensors, upstream.to(dtype))
    return [t.detach().double() for t in (output, *gradients)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "groups", "dim"),
    [(1, 1, 1, 1, 8), (7, 7, 4, 2, 16), (5, 19, 6, 2, 32), (64, 64, 3, 3, 64), (33, 80, 9, 3, 64)],
)
def test_values_and_gradients(dtype, window, queries, keys, heads, groups, dim):
    tensors, upstream = case(queries, keys, heads, groups, dim, dtype)
    exact = evaluate(fused, tensors, upstream, window, torch.float64)
    eager = evaluate(fused, tensors, upstream, window, dtype)
    ours = evaluate(cpu_attention.attention, tensors, upstream, window, dtype)
    for a, b, c in zip(ours, exact, eager, strict=True):
        # Scores are rounded once more than in the fused kernel.
        rounding = 4 * torch.finfo(dtype).eps * b.norm()
        assert (a - b).norm() <= 2 * (c - b).norm() + rounding


def test_what_it_serves():
    query = torch.zeros(1, 2, 3, 4, dtype=torch.bfloat16)
    assert cpu_attention.serves(query, {"scaling": 1.0, "sliding_window": 4, "softcap": None})
    assert not cpu_attention.serves(query.float(), {"scaling": 1.0})
    assert not cpu_attention.serves(query, {"scaling": None})
    for name, value in (("softcap", 5.0), ("dropout", 0.1), ("s_aux", query)):
        assert not cpu_attention.serves(query, {"scaling": 1.0, name: value})


def test_a_model_in_bfloat16_takes_it(monkeypatch):
    from tests.tiny_models import make_base

    calls = []
    original = cpu_attention.attention
    monkeypatch.setattr(
        cpu_attention, "attention", lambda *args: calls.append(1) or original(*args)
    )
    model = make_base(dtype=torch.bfloat16)
    assert packed_attention.enable(model) is None
    assert len(calls) == 3 * 5  # layers, sequences of the trial
