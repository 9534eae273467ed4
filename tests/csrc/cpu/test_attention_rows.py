"""Rotary embedding and the causal softmax are eager PyTorch's, by every instruction set."""

import itertools

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from qadapter.ops import cpp, layer_rows

pytestmark = pytest.mark.usefixtures("one_thread")

if not cpp.available()[0]:
    pytest.skip(cpp.available()[1], allow_module_level=True)

F32, BF16 = torch.float32, torch.bfloat16
INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def fresh(isa):
    """The instruction set is looked up once."""
    forget()
    yield
    forget()


def forget():
    layer_rows._rotary.cache_clear()
    layer_rows._causal_softmax.cache_clear()


def random(*shape, dtype=F32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def eager_rotary(x, cos, sin):
    return apply_rotary_pos_emb(x, x, cos, sin)[0]


def with_gradient(function, x, cos, sin, grad):
    x = x.detach().requires_grad_()
    out = function(x, cos, sin)
    return out.detach(), torch.autograd.grad(out, x, grad)[0]


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_rotary_is_eager_s_bit_for_bit(dtype):
    for batch, heads, tokens, dim in itertools.product((1, 2), (1, 3), (1, 5), (2, 6, 64, 66, 130)):
        x = random(batch, heads, tokens, dim, dtype=dtype, scale=3)
        for angles in {1, batch}:
            cos, sin = (random(angles, tokens, dim, dtype=dtype, seed=s) for s in (1, 2))
            assert torch.equal(layer_rows.rotary(x, cos, sin), eager_rotary(x, cos, sin))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_gradient_of_rotary_is_no_worse_than_eager_s(dtype):
    x, grad = (random(2, 3, 50, 80, dtype=dtype, seed=s) for s in (0, 1))
    cos, sin = (random(2, 50, 80, dtype=dtype, seed=s) for s in (2, 3))
    doubles = [t.double() for t in (x, cos, sin, grad)]
    exact = with_gradient(eager_rotary, *doubles)[1]
    eager = with_gradient(eager_rotary, x, cos, sin, grad)[1]
    out, ours = with_gradient(layer_rows.rotary, x, cos, sin, grad)
    assert torch.equal(out, eager_rotary(x, cos, sin))
    assert ours.dtype == dtype and ours.transpose(1, 2).is_contiguous()
    assert (ours.double() - exact).norm() <= 1.01 * (eager.double() - exact).norm()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_rotary_of_views_and_of_several_threads(dtype):
    wide = random(2, 400, 5 * 64, dtype=dtype)
    cos, sin = (random(1, 400, 128, dtype=dtype, seed=s)[..., :64] for s in (1, 2))
    x = wide.view(2, 400, 5, 64).transpose(1, 2)  # as a model makes it
    exact = eager_rotary(x, cos, sin)
    for view in (x, x.contiguous(), x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert torch.equal(layer_rows.rotary(view, cos, sin), exact)
    torch.set_num_threads(3)
    assert torch.equal(layer_rows.rotary(x, cos, sin), exact)
    assert layer_rows.rotary(x[:0], cos, sin).shape == (0, 5, 400, 64)


def test_rotary_refuses():
    x, cos = random(2, 3, 4, 8), random(2, 4, 8)
    bad = [
        ((x.half(), cos, cos), "rotary: x: expected float32 or bfloat16, got float16"),
        ((x[0], cos, cos), r"rotary: x: expected \[B, H, T, D\] with D even, got \[3, 4, 8\]"),
        ((x[..., :7], cos, cos), "D even"),
        (
            (x, cos[:, :3], cos),
            r"rotary: cos: expected float32 \[1 or B, T, D\].*got .*\[2, 3, 8\]",
        ),
        ((x, cos, cos.to(BF16)), "rotary: sin: expected float32"),
        ((x, cos.expand(3, 4, 8) if len(cos) == 1 else cos[[0, 1, 1]], cos), "rotary: cos"),
        ((x, cos, random(2, 8, 4).transpose(1, 2)), "rotary: sin: .* dense rows"),
    ]
    for arguments, message in bad:
        with pytest.raises(RuntimeError, match=message):
            layer_rows.rotary(*arguments)


def seen(rows, queries, keys, window):
    """[rows, keys], True where a row's query sees a key."""
    at = torch.arange(rows)[:, None] % queries + keys - queries
    key = torch.arange(keys)
    return (key <= at) & (key > at - (window or keys))


def eager_softmax(scores, queries, window):
    mask = seen(scores.shape[1], queries, scores.shape[2], window)
    return torch.softmax(scores.masked_fill(~mask, -INF), -1)


@pytest.mark.parametrize("window", [None, 1, 3, 40])
def test_softmax_is_eager_s_up_to_a_rounding(window):
    for queries, more, heads, groups in itertools.product(
        (1, 2, 31, 70), (0, 1, 33), (1, 3), (1, 2)
    ):
        keys = queries + more
        scores = random(heads, groups * queries, keys, dtype=BF16, scale=4, seed=keys)
        got = scores.clone()
        layer_rows.causal_softmax_(got, queries, window)
        exact = eager_softmax(scores.double(), queries, window)
        assert ((got.double() - exact).abs() <= 1.01 * 2**-8 * exact + 1e-30).all()
        assert torch.equal(got == 0, exact.to(BF16) == 0)


def test_softmax_of_extreme_scores():
    scores = torch.tensor([[3e38, -3e38, -INF, 0.0], [INF, 1.0, 0.0, 2.0], [1.0, NAN, 0.0, 1.0]])
    scores = torch.cat([scores, -INF * torch.ones(1, 4)]).to(BF16).view(4, 1, 4)
    got = scores.clone()
    layer_rows.causal_softmax_(got, 1)
    expected = torch.softmax(scores.float(), -1)
    assert torch.equal(got[0].float(), expected[0])
    # what eager has no number for, this has none for either
    assert expected[1:].isnan().any(-1).all() and got[1:].isnan().any(-1).all()


def test_what_is_not_seen_is_not_looked_at():
    scores = random(2, 6, 6, dtype=BF16)
    expected = eager_softmax(scores, 6, None)
    scores[~seen(6, 6, 6, None).expand(2, 6, 6)] = NAN
    torch.set_num_threads(2)
    layer_rows.causal_softmax_(scores, 6)
    torch.testing.assert_close(scores, expected, rtol=2**-8, atol=0)


def test_softmax_refuses():
    scores = random(2, 6, 6, dtype=BF16)
    bad = [
        ((scores.float(), 6), "scores: expected a contiguous bfloat16 CPU tensor"),
        ((scores.transpose(1, 2), 6), "scores: expected a contiguous"),
        ((scores[0], 6), r"\[H, rows, keys\], got bfloat16 \[6, 6\]"),
        ((scores, 4), "queries: expected a divisor of 6, at most 6, got 4"),
        ((scores[..., :5].contiguous(), 6), "at most 5, got 6"),
        ((scores, 0), "queries: "),
        ((scores, 6, 0), "window: expected 1 or more, got 0"),
    ]
    before = scores.clone()
    for arguments, message in bad:
        with pytest.raises(RuntimeError, match=message):
            layer_rows.causal_softmax_(*arguments)
    assert torch.equal(scores, before)
