"""Attention of a pack in one call, against each sequence by itself in float64."""

import pytest
import torch
import torch.nn.functional as F

from qadapter.ops import cpp, varlen_attention

SETS = cpp.CAPABILITIES[: cpp.isa() + 1] if cpp.available()[0] else ()
CODE = [name for name in ("avx512_bf16", "amx") if name in SETS]

pytestmark = [
    pytest.mark.skipif(not CODE, reason="needs a CPU with AVX512_BF16 or AMX"),
    pytest.mark.usefixtures("vector_code"),
]


CACHES = (varlen_attention._operations, varlen_attention._has_kernel)


@pytest.fixture(params=CODE)
def vector_code(request, monkeypatch):
    """Everything by each instruction set that has code for it."""
    monkeypatch.setenv("QADAPTER_CPU_CAPABILITY", request.param)
    for cache in CACHES:
        cache.cache_clear()
    yield
    for cache in CACHES:
        cache.cache_clear()


PACKS = [
    [(0, 1)],
    [(0, 33), (0, 5)],
    [(0, 40), (13, 50), (13, 1), (0, 64), (32, 32)],
    [(0, 200), (70, 131), (0, 7), (7, 0), (7, 3)],
]


def case(pack, heads, key_heads, dim):
    generator = torch.Generator().manual_seed(dim + len(pack))
    tokens = sum(own for _, own in pack)
    # As a model makes them: heads behind tokens in memory.
    q, k, v, upstream = (
        torch.randn(tokens, h, dim, generator=generator).mul(1.5).bfloat16().transpose(0, 1)
        for h in (heads, key_heads, key_heads, heads)
    )
    return (q, k, v), upstream


def each_by_itself(q, k, v, pack, scaling, window):
    repeat = q.shape[0] // k.shape[0]
    k, v = (x.repeat_interleave(repeat, 0) for x in (k, v))
    outputs, start = [], 0
    for shared, own in pack:
        group = start if shared == 0 else group  # noqa: F821
        where = [*range(group, group + shared), *range(start, start + own)]
        mask = torch.ones(own, shared + own, dtype=torch.bool).tril(shared)
        if window is not None:
            mask &= torch.ones_like(mask).triu(shared - window + 1)
        sequence = (q[:, start : start + own], k[:, where], v[:, where])
        outputs.append(F.scaled_dot_product_attention(*sequence, attn_mask=mask, scale=scaling))
        start += own
    return torch.cat(outputs, 1)


def ours(q, k, v, pack, scaling, window):
    return varlen_attention.varlen_attention(q, k, v, torch.tensor(pack), scaling, window)


def evaluate(function, tensors, upstream, pack, window, dtype=torch.bfloat16):
    tensors = [t.detach().to(dtype).requires_grad_() for t in tensors]
    output = function(*tensors, pack, 0.125, window)
    gradients = torch.autograd.grad(output, tensors, upstream.to(dtype))
    return [t.detach().double() for t in (output, *gradients)]


@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize(("heads", "key_heads", "dim"), [(2, 2, 32), (9, 3, 64), (4, 1, 96)])
@pytest.mark.parametrize("pack", PACKS, ids=["one token", "plain", "shared", "long"])
def test_values_and_gradients(pack, heads, key_heads, dim, window):
    tensors, upstream = case(pack, heads, key_heads, dim)
    exact = evaluate(each_by_itself, tensors, upstream, pack, window, torch.float64)
    eager = evaluate(each_by_itself, tensors, upstream, pack, window)
    found = evaluate(ours, tensors, upstream, pack, window)
    for a, b, c in zip(found, exact, eager, strict=True):
        # p is that of float32 scores: of a single key nearly, not exactly, 1.
        rounding = torch.finfo(torch.bfloat16).eps * b.norm() + 1e-5 * upstream.norm()
        assert (a - b).norm() <= 1.2 * (c - b).norm() + 0.5 * rounding


def test_a_sequence_depends_on_no_other_and_not_on_threads():
    pack = PACKS[3]
    tensors, upstream = case(pack, 6, 2, 64)
    first = evaluate(ours, tensors, upstream, pack, None)
    changed = [t.clone() for t in tensors]
    for t in changed:
        t[:, 331:] += 1.0
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        again = evaluate(ours, changed, upstream, pack, None)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a[:, :331], b[:, :331])
        assert not torch.equal(a[:, 331:], b[:, 331:])


def test_large_scores():
    (q, k, v), upstream = case([(0, 70)], 2, 2, 32)
    results = evaluate(ours, (q * 100, k * 100, v), upstream, [(0, 70)], None)
    assert all(r.isfinite().all() for r in results)
    exact = evaluate(each_by_itself, (q * 100, k * 100, v), upstream, [(0, 70)], None)
    assert (results[0] - exact[0]).norm() <= 2e-2 * exact[0].norm()


def test_errors():
    (q, k, v), _ = case([(0, 10)], 2, 2, 32)
    wrong = {
        "sequences": ((q, k, v, torch.tensor([[0, 9]])), {}),
        "do not fit": ((q, k, v, torch.tensor([[3, 10]])), {}),
        "number 1": ((q, k, v, torch.tensor([[0, 4], [5, 6]])), {}),
        "window": ((q, k, v, torch.tensor([[0, 10]])), {"window": 0}),
        "D: expected": ((q[..., :16], k[..., :16], v, torch.tensor([[0, 10]])), {}),
        "H a multiple": ((q[:1], k, v, torch.tensor([[0, 10]])), {}),
        "v: expected": ((q, k, v[:1], torch.tensor([[0, 10]])), {}),
    }
    for text, (arguments, keywords) in wrong.items():
        with pytest.raises(RuntimeError, match=text):
            varlen_attention.varlen_attention(*arguments, scaling=1.0, **keywords)


def test_what_it_serves(monkeypatch):
    query = torch.zeros(1, 2, 3, 64, dtype=torch.bfloat16)
    assert varlen_attention.serves(query, query)
    assert not varlen_attention.serves(query.float(), query.float())
    assert not varlen_attention.serves(query[..., :48], query[..., :48])
    assert not varlen_attention.serves(query, query[..., :32])
    monkeypatch.setattr(varlen_attention, "_has_kernel", lambda: False)
    assert not varlen_attention.serves(query, query)
