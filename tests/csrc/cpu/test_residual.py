"""The C++ residual values, gradients and losses are float64's, by every instruction set.

Tolerances come from what plain PyTorch in float32 does to the same numbers, doubled, with a floor
of a few rounding units of the terms that are added and subtracted.
"""

import math

import pytest
import torch

from qadapter import reference
from qadapter.ops import cpp
from qadapter.outputs import ResidualValues

pytestmark = pytest.mark.usefixtures("one_thread")

if not cpp.available()[0]:
    pytest.skip(cpp.available()[1], allow_module_level=True)

INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FIELDS = ("q", "value", "base_logp", "policy_logp", "base_lse")
EPS = torch.finfo(torch.float32).eps


def policy_logits(base, q, alphas):
    alpha_0, _, center = alphas
    m = alpha_0 - center
    if m == 0:
        return q
    masked = (q == -INF) | (base == -INF)
    return (q + m * base.masked_fill(base == -INF, 0)).masked_fill(masked, -INF)


def expected(base, q, actions, alphas, dtype):
    """The formulas as they stand, in the given dtype."""
    alpha_0, alpha_tilde, center = alphas
    base, q = base.to(dtype), q.to(dtype)
    x = policy_logits(base, q, alphas)
    at = actions.clamp(min=0)[:, None]
    lse = torch.logsumexp(x / alpha_tilde, -1)
    base_lse = torch.logsumexp(base, -1)
    q_a, b_a, x_a = (t.gather(1, at)[:, 0] for t in (q, base, x))
    value = alpha_tilde * lse - (alpha_0 * base_lse if alpha_0 else 0)
    residual = (q_a - center * b_a).masked_fill(q_a == -INF, -INF) if center else q_a
    fields = (residual, value, b_a - base_lse, x_a / alpha_tilde - lse, base_lse)
    no_action = actions == -100
    return [f if i in (1, 4) else f.masked_fill(no_action, 0) for i, f in enumerate(fields)]


def size(tensor):
    """The largest finite magnitude."""
    return float(tensor.nan_to_num(0, 0, 0).abs().max()) if tensor.numel() else 0.0


def floor(base, q, alphas):
    alpha_0, alpha_tilde, center = alphas
    terms = (size(q) + abs(alpha_0 - center) * size(base)) / min(1, alpha_tilde)
    return 4 * EPS * (terms + (1 + alpha_0) * size(base) + 12)


def check_forward(base, q, actions, alphas, rows=slice(None)):
    got = cpp.residual_fwd(base, q, actions, None, None, *alphas)
    want = expected(base, q, actions, alphas, torch.float64)
    eager = expected(base, q, actions, alphas, torch.float32)
    for name, g, w, e in zip(FIELDS, got[:5], want, eager, strict=True):
        g, w, e = g[rows], w[rows], e[rows]
        assert g.dtype == torch.float32
        exact = ~w.isfinite()
        torch.testing.assert_close(g[exact].double(), w[exact], equal_nan=True, msg=name)
        error, allowed = (g - w)[~exact].abs(), (e - w)[~exact].abs()
        bound = 2 * float(allowed.max()) + floor(base, q, alphas) if error.numel() else 0
        assert (error <= bound).all(), f"{name}: {float(error.max())} > {bound}"
    return got


def check_backward(base, q, actions, alphas, shift, log_sum, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coef_p, coef_a = torch.randn(2, q.shape[0], generator=generator)
    got = cpp.residual_bwd(base, q, actions, shift, log_sum, coef_p, coef_a, *alphas)
    assert got.dtype == q.dtype
    assert got.is_contiguous()

    def grad(dtype):
        x = policy_logits(base.to(dtype), q.to(dtype), alphas)
        p = coef_p.to(dtype)[:, None] * torch.softmax(x / alphas[1], -1)
        held = torch.where(actions >= 0, coef_a, 0).to(dtype)[:, None]
        return p.scatter_add(1, actions.clamp(min=0)[:, None], held)

    want = grad(torch.float64)
    if want.numel() == 0:
        assert got.shape == want.shape
        return
    eager = (grad(torch.float32) - want).abs().max()
    finfo = torch.finfo(q.dtype)
    # one rounding: half a unit of the result's dtype, on top of what float32 arithmetic may do
    half = finfo.eps / 2 * want.abs() * (q.dtype != torch.float32)
    tiny = finfo.tiny * finfo.eps / 2 if q.dtype == torch.float16 else 2.0**-125
    conditioning = floor(base, q, alphas)
    bound = half * 1.01 + tiny + 2 * eager + conditioning * want.abs()
    error = (got.double() - want).abs()
    assert (error <= bound).all(), float((error - bound).max())


def logits(n, v, dtype, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(n, v, generator=generator) * scale
    return base.to(dtype), (base + torch.randn(n, v, generator=generator)).to(dtype)


def some_actions(n, v, seed=0):
    actions = torch.randint(0, v, (n,), generator=torch.Generator().manual_seed(seed))
    actions[2::5] = -100
    return actions


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "v"),
    [(0, 7), (1, 1), (3, 1), (3, 7), (257, 1000), (1, 32000), (3, 50257), (1, 128256), (3, 128256)],
)
def test_forward_and_backward(isa, dtype, n, v):
    base, q = logits(n, v, dtype, seed=v)
    actions = some_actions(n, v)
    small = n * v < 100_000
    for alphas in [(1, 1, 1), (0.01, 10, 1), *[(0, 1, 0), (0.01, 1, 0), (1, 0.1, 0)] * small]:
        got = check_forward(base, q, actions, alphas)
        check_backward(base, q, actions, alphas, *got[5:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alpha_0", [0, 0.01, 1])
@pytest.mark.parametrize("alpha_tilde", [0.1, 1, 10])
@pytest.mark.parametrize("center", [0, 1])
def test_large_logits(isa, dtype, alpha_0, alpha_tilde, center):
    base, q = logits(5, 999, dtype, scale=2500.0)
    q[1] = q[1].sort().values
    base[2] = base[2].sort(descending=True).values
    alphas = (alpha_0, alpha_tilde, center)
    got = check_forward(base, q, some_actions(5, 999), alphas)
    check_backward(base, q, some_actions(5, 999), alphas, *got[5:])


def test_results_below_float32(isa):
    """They are zeros here, but not in what the caller computes afterwards."""
    base, q = logits(5, 999, torch.float32)
    alphas = (1, 0.05, 1)
    got = check_forward(base, q, some_actions(5, 999), alphas)
    check_backward(base, q, some_actions(5, 999), alphas, *got[5:])
    assert (torch.full((8,), 1e-44) * 0.5 > 0).all()


@pytest.mark.parametrize("alphas", [(1, 1, 1), (0, 1, 0), (0, 1, 1), (0.5, 2, 1), (1, 0.5, 0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_tokens(isa, dtype, alphas):
    base, q = logits(8, 1203, dtype)
    q[0, ::2] = -INF
    base[1, 1:] = -INF
    q[2, :1100] = -INF  # the first finite logit comes late
    q[3, :600], base[3, 600:1202] = -INF, -INF
    base[4, 5] = q[4, 5] = -INF
    actions = torch.tensor([1, 0, 1200, 1202, 6, 7, -100, 9])
    got = check_forward(base, q, actions, alphas)
    check_backward(base, q, actions, alphas, *got[5:])
    grad = cpp.residual_bwd(base, q, actions, *got[5:], torch.ones(8), torch.zeros(8), *alphas)
    assert (grad[2, :1100] == 0).all()


@pytest.mark.parametrize("alphas", [(1, 1, 1), (0.5, 2, 1), (1, 1, 0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_poison_stays_in_its_row(isa, dtype, alphas):
    base, q = logits(9, 700, dtype)
    clean_base, clean_q = base.clone(), q.clone()
    q[1, 17] = NAN
    q[3, 699] = -NAN
    q[5] = -INF
    base[7, 300] = NAN
    q[8, 0] = INF
    actions = torch.arange(9) * 70
    got = cpp.residual_fwd(base, q, actions, None, None, *alphas)
    clean = cpp.residual_fwd(clean_base, clean_q, actions, None, None, *alphas)
    bad = torch.tensor([False, True, False, True, False, True, False, True, True])
    assert got[1].isnan().tolist() == bad.tolist()
    assert got[3][[1, 3, 5, 8]].isnan().all()
    for g, c in zip(got, clean, strict=True):
        assert torch.equal(g[~bad], c[~bad])
    grad = cpp.residual_bwd(base, q, actions, *got[5:], torch.ones(9), torch.ones(9), *alphas)
    assert grad[[1, 3, 5, 8]].isnan().all()
    assert grad[~bad].isfinite().all()


def test_action_out_of_range(isa):
    base, q = logits(3, 50, torch.float32)
    actions = torch.tensor([50, -1, 3])
    got = cpp.residual_fwd(base, q, actions, None, None, 1.0, 1.0, 1.0)
    for field in got[:4]:
        assert field.isnan().tolist() == [True, True, False]
    assert got[4].isfinite().all()
    coef = torch.ones(3)
    grad = cpp.residual_bwd(base, q, actions, *got[5:], coef, coef, 1.0, 1.0, 1.0)
    torch.testing.assert_close(grad.sum(-1), torch.tensor([1.0, 1.0, 2.0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [1, 7, 1000, 50257])
def test_equal_streams_give_exactly_zero(isa, dtype, v):
    base, _ = logits(4, v, dtype, scale=10)
    got = cpp.residual_fwd(base, base.clone(), some_actions(4, v), None, None, 1.0, 1.0, 1.0)
    assert (got[0] == 0).all()
    assert (got[1] == 0).all()
    assert torch.equal(got[2], got[3])
    cached = cpp.residual_fwd(base, base, some_actions(4, v), got[4], got[2], 1.0, 1.0, 1.0)
    assert (cached[1] == 0).all()


def test_maximum_is_exact_and_alone_gives_zero(isa):
    q = torch.full((1, 3000), -100.0)
    q[0, 2000] = 7.3
    got = cpp.residual_fwd(q, q, torch.tensor([2000]), None, None, 1.0, 0.7, 1.0)
    assert got[5].item() == q[0, 2000].item()
    assert got[6].item() == 0
    assert got[3].item() == 0
    lowest = torch.full((1, 64), torch.finfo(torch.float32).min)
    got = cpp.residual_fwd(lowest, lowest, torch.tensor([1]), None, None, 1.0, 1.0, 1.0)
    assert got[6].item() == pytest.approx(math.log(64), rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cached_base_statistics(isa, dtype):
    base, q = logits(6, 900, dtype)
    actions = some_actions(6, 900)
    for alphas in [(1.0, 1.0, 1.0), (0.01, 1.0, 0.0)]:
        full = cpp.residual_fwd(base, q, actions, None, None, *alphas)
        cached = cpp.residual_fwd(base, q, actions, full[4], full[2], *alphas)
        for f, c in zip(full, cached, strict=True):
            torch.testing.assert_close(c, f, rtol=1e-6, atol=4e-6)
    # with m == 0 nothing but z_b[a] is read of the base, and with both given not even that
    full = cpp.residual_fwd(base, q, actions, None, None, 1.0, 1.0, 1.0)
    hollow = torch.full_like(base, NAN)
    rows = torch.arange(6)[actions >= 0]
    hollow[rows, actions[rows]] = base[rows, actions[rows]]
    for other in (hollow, None):
        logp = full[2] if other is None else None
        cached = cpp.residual_fwd(other, q, actions, full[4], logp, 1.0, 1.0, 1.0)
        for f, c in zip(full, cached, strict=True):
            torch.testing.assert_close(c, f, rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_row_stride(isa, dtype):
    base, q = logits(4, 1501, dtype)
    wide = torch.full((4, 1601), NAN, dtype=dtype)
    wide[:, 33:1534] = q
    view, actions, alphas = wide[:, 33:1534], some_actions(4, 1501), (0.5, 1.0, 1.0)
    plain = cpp.residual_fwd(base, q, actions, None, None, *alphas)
    strided = cpp.residual_fwd(base, view, actions, None, None, *alphas)
    for a, b in zip(plain, strided, strict=True):
        assert torch.equal(a, b)
    coef = torch.ones(4)
    assert torch.equal(
        cpp.residual_bwd(base, q, actions, *plain[5:], coef, coef, *alphas),
        cpp.residual_bwd(base, view, actions, *plain[5:], coef, coef, *alphas),
    )
    check_forward(base[:1].expand(4, -1), view, actions, alphas)


def test_offsets_beyond_two_to_the_31(isa):
    v = 1003
    store = torch.empty(2**31 + v, dtype=torch.bfloat16)  # pages that are not touched cost nothing
    far = store.as_strided((3, v), (2**30, 1))
    base, q = logits(3, v, torch.bfloat16)
    far.copy_(q)
    actions = some_actions(3, v)
    got = check_forward(base, far, actions, (0.5, 1.0, 1.0))
    check_backward(base, far, actions, (0.5, 1.0, 1.0), *got[5:])
    check_forward(far, q, actions, (1.0, 1.0, 1.0))


@pytest.mark.parametrize("n", [1, 5, 300])
def test_threads_do_not_change_results(isa, n):
    v = 128256 if n == 1 else 20000
    base, q = logits(n, v, torch.bfloat16)
    actions, alphas, coef = some_actions(n, v), (0.5, 1.0, 1.0), torch.ones(n)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        got = cpp.residual_fwd(base, q, actions, None, None, *alphas)
        results.append((*got, cpp.residual_bwd(base, q, actions, *got[5:], coef, coef, *alphas)))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [4096, 5003])
def test_gradients_larger_than_the_cache(isa, dtype, v):
    base, q = logits(700, v, dtype)  # streaming stores, rows at every alignment
    actions, alphas = some_actions(700, v), (0.01, 1, 0)
    got = check_forward(base, q, actions, alphas)
    check_backward(base, q, actions, alphas, *got[5:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_rounding_to_nearest_even(isa, dtype):
    generator = torch.Generator().manual_seed(3)
    coef = torch.cat(
        [
            1 + torch.arange(64) / 2**11,  # ties of both half types, to even from either side
            torch.randn(200, generator=generator) * 10.0 ** torch.arange(-8, 12).repeat(10),
            torch.tensor([0.0, 65503.9, 65504.0, 65519.9, 65520.0, 3e38, 6e-8, 2.9e-8, 3.1e-8]),
        ]
    )
    q = torch.zeros(len(coef), 67, dtype=dtype)  # with these statistics exp(...) is 1 everywhere
    actions, zeros = torch.full((len(coef),), -100), torch.zeros(len(coef))
    grad = cpp.residual_bwd(None, q, actions, zeros, zeros, coef, zeros, 1.0, 1.0, 1.0)
    assert torch.equal(grad, coef.to(dtype)[:, None].expand_as(grad))
    actions.fill_(66)
    grad = cpp.residual_bwd(None, q, actions, zeros, zeros, zeros, coef, 1.0, 1.0, 1.0)
    assert torch.equal(grad[:, 66], coef.to(dtype))


def test_exponential(isa):
    """With these statistics the gradient is exp(q), nothing else."""
    q = -torch.cat([torch.linspace(0, 2, 40001), torch.linspace(2, 86, 40001)])[None]
    actions, zero, one = torch.tensor([-100]), torch.zeros(1), torch.ones(1)
    got = cpp.residual_bwd(None, q, actions, zero, zero, one, zero, 1.0, 1.0, 1.0)
    want = q.double().exp()
    error = (got / want - 1).abs()
    assert (error <= EPS * (1.5 + 1.5 * q.abs())).all()  # 1.5 units of the result, and of y
    assert got[0, 0] == 1
    q = torch.tensor([[-INF, -1e4, -3e38, 0.0]])
    got = cpp.residual_bwd(None, q, actions, zero, zero, one, zero, 1.0, 1.0, 1.0)
    assert got.tolist() == [[0, 0, 0, 1]]


def test_zero_policy_coefficient(isa):
    base, q = logits(2, 77, torch.bfloat16)
    got = cpp.residual_fwd(base, q, torch.tensor([3, -100]), None, None, 1.0, 1.0, 1.0)
    coef_p, coef_a = torch.zeros(2), torch.tensor([0.3, 5.0])
    grad = cpp.residual_bwd(
        base, q, torch.tensor([3, -100]), *got[5:], coef_p, coef_a, 1.0, 1.0, 1.0
    )
    assert grad[0, 3] == torch.tensor(0.3).bfloat16()
    grad[0, 3] = 0
    assert (grad == 0).all()


@pytest.mark.parametrize("value_next", [True, False])
@pytest.mark.parametrize("length_mean", [True, False])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("given", [False, True])
def test_preference(value_next, length_mean, index, given):
    generator = torch.Generator().manual_seed(7)
    for pairs, longest in [(0, 1), (1, 6), (4, 9), (3, 2)]:
        lengths = torch.randint(0, longest, (2 * pairs,), generator=generator)
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(index)
        n = int(cu_seqlens[-1])
        q, value = torch.randn(2, n, generator=generator)
        actions = torch.randint(0, 9, (n,), generator=generator)
        actions[torch.rand(n, generator=generator) < 0.3] = -100
        denominators = torch.tensor([7.0, 0.5]) if given else None
        got = cpp.preference_fwd(
            q, value, actions, cu_seqlens, denominators, 0.9, 0.3, 2.0, value_next, length_mean
        )
        q, value = q.double().requires_grad_(), value.double().requires_grad_()
        want = reference.preference_loss(
            ResidualValues(q, value, q, q, q),
            actions,
            cu_seqlens,
            gamma=0.9,
            reg_coef=0.3,
            bt_scale=2.0,
            value_at="next" if value_next else "same",
            length_norm="response" if length_mean else "none",
            denominators=denominators,
        )
        if n:
            grads = torch.autograd.grad(want.loss, (q, value), allow_unused=True)
            grads = [torch.zeros_like(q) if g is None else g for g in grads]
        else:
            grads = [q, value]
        for g, w in zip(got, (*want, *grads), strict=True):
            assert g.dtype == torch.float32
            torch.testing.assert_close(g.double(), w.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bounds", [[1, 2, 4], [0, 3, 2], [0, 2, 5], [0, -1, 4], [0, 9, 4]])
def test_preference_with_bounds_that_do_not_fit(bounds):
    rows, actions = torch.ones(4), torch.zeros(4, dtype=torch.int64)
    got = cpp.preference_fwd(
        rows, rows, actions, torch.tensor(bounds), None, 1.0, 0.1, 1.0, True, True
    )
    assert all(field.isnan().all() for field in got)


def test_capability_is_checked(monkeypatch):
    monkeypatch.setenv("QADAPTER_CPU_CAPABILITY", "sse9")
    with pytest.raises(ValueError, match="sse9"):
        cpp.capability()
