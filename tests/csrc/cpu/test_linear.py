"""The C++ operation on hidden states is float64's on the logits, by every instruction set.

Tolerances are what plain PyTorch does to the same numbers in float32, doubled, with a floor of a
few rounding units of the terms that are added and subtracted.
"""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch

from qadapter import reference
from qadapter.ops import cpp

pytestmark = pytest.mark.usefixtures("one_thread")

if not cpp.available()[0]:
    pytest.skip(cpp.available()[1], allow_module_level=True)

INF, NAN = float("inf"), float("nan")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
EPS = torch.finfo(F32).eps
ONES = (1.0, 1.0, 1.0)
NAMES = ("q", "value", "base_logp", "policy_logp", "base_lse", "p_action", "slope_action", "u")


def make(rows, vocab, dim, hidden=F32, weight=F32, *, spread=3.0, seed=0):
    """base_hidden, q_hidden, weight, actions: logits of about `spread`, related streams."""
    gen = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, dim, generator=gen) * spread
    q = base + 0.3 * torch.randn(rows, dim, generator=gen)
    head = torch.randn(vocab, dim, generator=gen) / math.sqrt(dim)
    actions = torch.randint(0, vocab, (rows,), generator=gen)
    if rows > 2:
        actions[1] = -100
    return base.to(hidden), q.to(hidden), head.to(weight), actions


def run(base, q, weight, actions, alphas=ONES, *, bias=None, lse=None, logp=None, **rest):
    options = {"scale": 1.0, "cap": 0.0, "chunk": 0, "need_grad": True} | rest
    out = cpp.linear_fwd(
        *(base, q, weight, actions, bias, lse, logp, *alphas),
        *(options["scale"], options["cap"], options["chunk"], options["need_grad"]),
    )
    return dict(zip(NAMES, out, strict=True))


def logits(h, weight, bias, scale, cap, dtype):
    s = h.to(dtype) @ weight.to(dtype).T
    s = scale * (s if bias is None else s + bias.to(dtype))
    if cap == 0:
        return s, torch.full_like(s, scale)
    t = torch.tanh(s / cap)
    return cap * t, scale * (1 - t * t)


def expected(base, q, weight, actions, alphas=ONES, dtype=torch.float64, **rest):
    """The specification on full logits, and u and dh's factors by their definitions."""
    options = {"bias": None, "scale": 1.0, "cap": 0.0, "lse": None, "logp": None} | rest
    how = (weight, options["bias"], options["scale"], options["cap"], dtype)
    z_q, slope = logits(q, *how)
    z_b = None if base is None else logits(base, *how)[0]
    alpha_0, alpha_tilde, center = alphas
    values = reference.residual_values(
        *(z_b, z_q, actions),
        alpha_0=alpha_0,
        alpha_tilde=alpha_tilde,
        center=center,
        base_lse=None if options["lse"] is None else options["lse"].to(dtype),
        base_logp=None if options["logp"] is None else options["logp"].to(dtype),
    )
    p = torch.softmax(reference.policy_logits(z_b, z_q, *alphas), -1)
    at = actions.clamp(min=0)[:, None]
    has_action = actions >= 0
    p_action = p.gather(1, at)[:, 0] * has_action
    slope_action = slope.gather(1, at)[:, 0] * has_action
    others = p.scatter(1, at, 0.0)
    others = torch.where(has_action[:, None], others, p)
    u = (others * slope) @ weight.to(dtype)
    fields = {name: getattr(values, name) for name in NAMES[:5]}
    return fields | {"p_action": p_action, "slope_action": slope_action, "u": u}


def worst(a, b):
    """The largest difference of finite entries; where the others are must agree."""
    a, b = a.double(), b.double()
    assert a.shape == b.shape
    assert torch.equal(a.isnan(), b.isnan())
    assert torch.equal(a.isinf() * a.sign(), b.isinf() * b.sign())
    finite = b.isfinite()
    return float((a - b)[finite].abs().max()) if finite.any() else 0.0


def check(got, inputs, alphas=ONES, *, merged=False, **rest):
    _, q, weight, actions = inputs
    want = expected(*inputs, alphas, **rest)
    eager = expected(*inputs, alphas, F32, **rest)
    alpha_0, alpha_tilde, center = alphas
    size = float(want["base_lse"].nan_to_num(0, 0, 0).abs().max()) if len(actions) else 0
    size = (size + 12) * (1 + abs(alpha_0) + abs(center)) / min(1, alpha_tilde)
    floor = 24 * EPS * size
    if merged and q.dtype != F32:  # h_q + m h_b was rounded
        floor = 4 * torch.finfo(q.dtype).eps * size if weight.dtype == q.dtype else floor
    for name in NAMES[:7]:
        limit = max(floor, 2 * worst(eager[name], want[name]))
        assert worst(got[name], want[name]) <= limit, name
    if not rest.get("need_grad", True):
        assert got["u"].shape == (0, q.shape[1])
        return
    assert got["u"].dtype == q.dtype
    scale = float(want["u"].nan_to_num(0, 0, 0).abs().max()) if len(actions) else 0
    eps = torch.finfo(q.dtype).eps if q.dtype != F32 else 0  # u is rounded to it, p may be
    limit = max(2 * eps * scale, scale * floor, 2 * worst(eager["u"], want["u"])) + 1e-30
    assert worst(got["u"], want["u"]) <= limit


SHAPES = [(7, 1000, 64), (1, 65, 17), (7, 63, 3), (31, 300, 577), (7, 1, 5), (3, 5, 1), (0, 64, 8)]
PAIRS = list(itertools.product((F32, BF16, F16), repeat=2))


@pytest.mark.parametrize("alphas", [ONES, (0.3, 1.0, 1.0), (1.5, 0.7, 0.5), (0.0, 1.0, 0.0)])
@pytest.mark.parametrize("shape", SHAPES)
def test_values(product_isa, shape, alphas):
    for hidden, weight in PAIRS if shape == SHAPES[0] else [(F32, F32), (BF16, BF16), (F16, BF16)]:
        inputs = make(*shape, hidden, weight)
        check(run(*inputs, alphas), inputs, alphas)
        check(run(*inputs, alphas, need_grad=False), inputs, alphas, need_grad=False)


def test_results_below_float32(product_isa):
    """They are zeros here, but not in what the caller computes afterwards."""
    alphas = (1.0, 0.05, 1.0)
    for dtype in (F32, BF16):
        inputs = make(9, 300, 64, dtype, dtype)
        check(run(*inputs, alphas), inputs, alphas)
    assert (torch.full((8,), 1e-44) * 0.5 > 0).all()


@pytest.mark.parametrize("vocab", [2, 5, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300, 511, 513])
def test_vocabulary_sizes(product_isa, vocab):
    for dtype in (F32, BF16):
        inputs = make(5, vocab, 33, dtype, dtype)
        inputs[3][0] = vocab - 1
        check(run(*inputs, (0.3, 1.0, 1.0)), inputs, (0.3, 1.0, 1.0))


@pytest.mark.parametrize("dim", [1, 2, 15, 16, 17, 31, 32, 33, 65, 4100])
def test_dimensions(product_isa, dim):
    """The last one is summed in more than one panel."""
    for dtype in (F32, BF16):
        inputs = make(4, 70, dim, dtype, dtype)
        check(run(*inputs), inputs)


@pytest.mark.parametrize("rows", [2, 14, 15, 16, 17, 31, 32, 33, 48, 49, 257, 385])
def test_row_counts(product_isa, rows):
    """Blocks of registers, of tiles and of a thread, full and not: bitwise as among other rows."""
    for dtype in (F32, BF16):
        base, q, head, actions = make(400, 300, 97, dtype, dtype)
        whole = run(base, q, head, actions, (0.3, 1.0, 1.0))
        inputs = (base[:rows], q[:rows], head, actions[:rows])
        got = run(*inputs, (0.3, 1.0, 1.0))
        check(got, inputs, (0.3, 1.0, 1.0))
        for name in NAMES:
            assert torch.equal(got[name], whole[name][:rows]), name


@pytest.mark.parametrize("cap", [0.0, 5.0, 0.05])
@pytest.mark.parametrize("alphas", [ONES, (0.3, 1.0, 1.0), (1.5, 0.7, 0.5)])
def test_bias_scale_and_cap(product_isa, alphas, cap):
    """A cap of 0.05 lies far below most logits."""
    gen = torch.Generator().manual_seed(1)
    for dtype in (F32, BF16):
        inputs = make(9, 300, 40, dtype, dtype)
        for bias in (None, torch.randn(300, generator=gen), torch.randn(300).bfloat16()):
            rest = {"bias": bias, "scale": 0.7, "cap": cap}
            check(run(*inputs, alphas, **rest), inputs, alphas, **rest)


@pytest.mark.parametrize("alphas", [ONES, (0.3, 1.0, 1.0), (0.0, 1.0, 1.0), (0.0, 1.0, 2.5)])
def test_masked_tokens(product_isa, alphas):
    for dtype in (F32, BF16):
        inputs = make(6, 300, 40, dtype, dtype)
        bias = torch.randn(300, generator=torch.Generator().manual_seed(1))
        bias[::3] = -INF
        inputs[3].copy_(torch.tensor([1, -100, 4, 5, 299, 298]))
        got = run(*inputs, alphas, bias=bias)
        check(got, inputs, alphas, bias=bias)
        lse = got["base_lse"]
        got = run(*inputs, alphas, bias=bias, lse=lse)
        check(got, inputs, alphas, bias=bias, lse=lse, merged=True)
        inputs[3][0] = 3  # masked
        got = run(*inputs, alphas, bias=bias)
        assert got["q"][0] == -INF and got["policy_logp"][0] == -INF and got["p_action"][0] == 0
        everything = run(*inputs, alphas, bias=torch.full((300,), -INF))
        for name in ("q", "value", "policy_logp"):
            assert everything[name][0].isnan(), name


@pytest.mark.parametrize("cap", [0.0, 5.0])
@pytest.mark.parametrize("alphas", [ONES, (0.3, 1.0, 1.0), (1.5, 0.7, 0.5), (0.0, 1.0, 0.0)])
def test_cached_statistics(product_isa, alphas, cap):
    for hidden, weight in [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16)]:
        inputs = make(17, 300, 40, hidden, weight)
        bias = torch.randn(300, generator=torch.Generator().manual_seed(1))
        rest = {"bias": bias, "cap": cap}
        full = run(*inputs, alphas, **rest)
        lse, logp = full["base_lse"], full["base_logp"]
        for given in ({"lse": lse}, {"lse": lse, "logp": logp}, {"logp": logp}):
            got = run(*inputs, alphas, **rest, **given)
            check(got, inputs, alphas, merged="lse" in given, **rest, **given)
            assert torch.equal(got["base_lse"], full["base_lse"])
            if "lse" in given and alphas[0] != alphas[2] and cap == 0.0 and hidden == F32:
                # From the merged product, whose rounding is in value too; logits are of size 10.
                torch.testing.assert_close(got["q"], full["q"], rtol=0, atol=1e-5)
            else:  # the same arithmetic, whichever way
                assert torch.equal(got["q"], full["q"])
            if "logp" in given:
                assert torch.equal(got["base_logp"], logp)
        if alphas[0] == alphas[2]:
            got = run(None, *inputs[1:], alphas, **rest, lse=lse, logp=logp)
            check(got, (None, *inputs[1:]), alphas, **rest, lse=lse, logp=logp)


def test_a_missing_base_needs_its_statistics():
    _, q, weight, actions = make(3, 20, 8)
    with pytest.raises(RuntimeError, match="base_hidden"):
        run(None, q, weight, actions)
    with pytest.raises(RuntimeError, match="base_hidden"):
        run(None, q, weight, actions, (0.3, 1.0, 1.0), lse=torch.ones(3), logp=torch.ones(3))


@pytest.mark.parametrize("cap", [0.0, 5.0])
def test_equal_streams_cancel_exactly(product_isa, cap):
    for hidden, weight in PAIRS:
        base, _, head, actions = make(19, 1000, 65, hidden, weight)
        bias = torch.randn(1000, generator=torch.Generator().manual_seed(1))
        for rest in ({}, {"bias": bias, "scale": 0.7}):
            for need_grad in (True, False):
                got = run(base, base.clone(), head, actions, cap=cap, need_grad=need_grad, **rest)
                again = run(
                    *(base, base.clone(), head, actions),
                    **(rest | {"cap": cap, "need_grad": need_grad, "lse": got["base_lse"]}),
                )
                for result in (got, again):
                    assert torch.count_nonzero(result["q"]) == 0
                    assert torch.count_nonzero(result["value"]) == 0


def test_bad_actions(product_isa):
    for dtype in (F32, BF16):
        inputs = make(6, 90, 12, dtype, dtype)
        inputs[3].copy_(torch.tensor([90, 3, -1, 89, -101, -100]))
        for rest in ({}, {"lse": torch.ones(6)}):
            for alphas in (ONES, (0.3, 1.0, 1.0)):
                got = run(*inputs, alphas, **rest)
                for name in ("q", "value", "base_logp", "policy_logp", "p_action"):
                    assert got[name].isnan().tolist() == [True, False, True, False, True, False]
                for name in ("q", "base_logp", "policy_logp", "p_action", "slope_action"):
                    assert got[name][5] == 0


@pytest.mark.parametrize("poison", [NAN, INF])
def test_a_bad_row_poisons_only_itself(product_isa, poison):
    for dtype in (F32, BF16, F16):
        for alphas in (ONES, (0.3, 1.0, 1.0)):
            base, q, weight, actions = make(18, 300, 40, dtype, dtype)
            clean = run(base, q, weight, actions, alphas)
            q[4, 7] = poison
            got = run(base, q, weight, actions, alphas)
            others = torch.arange(18) != 4
            for name in NAMES:
                assert torch.equal(got[name][others], clean[name][others]), name
            for name in ("q", "value", "policy_logp", "u"):
                assert got[name][4].isnan().all(), name


def test_rows_do_not_depend_on_each_other(product_isa):
    """Bitwise: nor on the blocks, the number of threads, or the strides of the inputs."""
    for hidden, weight in [(F32, F32), (BF16, BF16), (F16, F32)]:
        base, q, head, actions = make(61, 700, 40, hidden, weight)
        wide = torch.full((61, 50), NAN, dtype=hidden)
        wide[:, 3:43] = q
        wide_head = torch.full((700, 47), NAN, dtype=weight)
        wide_head[:, :40] = head
        for alphas in (ONES, (0.3, 1.0, 1.0)):
            for lse in (None, torch.linspace(1, 2, 61)):
                whole = run(base, q, head, actions, alphas, lse=lse)
                blocks = run(base, q, head, actions, alphas, lse=lse, chunk=7)
                strided = run(base, wide[:, 3:43], wide_head[:, :40], actions, alphas, lse=lse)
                torch.set_num_threads(2)
                threads = run(base, q, head, actions, alphas, lse=lse, chunk=1)
                torch.set_num_threads(1)
                keep = slice(23, 40)
                some = run(
                    *(base[keep], q[keep], head, actions[keep], alphas),
                    lse=None if lse is None else lse[keep].clone(),
                )
                for name in NAMES:
                    assert torch.equal(blocks[name], whole[name]), name
                    assert torch.equal(strided[name], whole[name]), name
                    assert torch.equal(threads[name], whole[name]), name
                    assert torch.equal(some[name], whole[name][keep]), name


@pytest.mark.parametrize("order", ["ascending", "descending", "large"])
def test_growing_maximum_and_large_logits(product_isa, order):
    """Ascending columns make the maximum grow in every tile; u and the sums are rescaled."""
    for dtype in (F32, BF16):
        base, q, weight, actions = make(4, 900, 20, dtype, dtype, spread=2.0)
        if order == "large":
            base, q = base * 300, q * 300
        else:
            steps = torch.linspace(-30, 30, 900)
            weight[:, 0] = (steps if order == "ascending" else -steps).to(dtype)
            base[:, 0] = q[:, 0] = 1.0
        inputs = (base, q, weight, actions)
        check(run(*inputs, (0.3, 1.0, 1.0)), inputs, (0.3, 1.0, 1.0))


def grad(out, actions, weight, grad_value):
    """dh_q for dL/dvalue = grad_value and dL/dq = -grad_value."""
    u, p_action, slope = (out[name].double() for name in ("u", "p_action", "slope_action"))
    at_action = (grad_value * p_action - grad_value) * slope
    return grad_value[:, None] * u + at_action[:, None] * weight[actions].double()


def test_gradient_is_never_worse_than_rounding_the_softmax():
    """Rows by the probability of their action: q - value cancels as it nears 1."""
    gen = torch.Generator().manual_seed(3)
    rows, vocab, dim = 200, 2000, 64
    base, q, weight, actions = make(rows, vocab, dim, BF16, BF16, spread=1.0)
    actions = torch.randint(0, vocab, (rows,), generator=gen)
    lift = torch.linspace(2, 15, rows)[:, None]
    unit = weight[actions].float()
    q = (q.float() + lift * unit / unit.square().sum(1, keepdim=True)).bfloat16()
    grad_value = torch.randn(rows, generator=gen, dtype=torch.float64)

    exact = expected(base, q, weight, actions)
    truth = grad(exact, actions, weight, grad_value)
    ours = grad(run(base, q, weight, actions), actions, weight, grad_value)

    # Exact products, rounded as bfloat16 rounds them: the best that eager does on any machine.
    p = torch.softmax((q.double() @ weight.double().T).bfloat16().float(), -1)
    d_logits = (grad_value[:, None] * p).scatter_add(1, actions[:, None], -grad_value[:, None])
    eager = (d_logits.bfloat16().double() @ weight.double()).bfloat16().double()

    def error(dh):
        return (dh - truth).norm(dim=1) / truth.norm(dim=1)

    p_action = exact["p_action"]
    for low, high in ((0, 0.9), (0.9, 0.99), (0.99, 1.0)):
        band = (p_action > low) & (p_action <= high)
        assert band.sum() > 3
        assert error(ours)[band].mean() <= error(eager)[band].mean()
        assert error(ours)[band].max() <= 0.01


def test_memory_is_bounded():
    """More rows need no more memory than their outputs; measured in a process of its own."""
    code = """
import resource, torch
from qadapter.ops import cpp
torch.set_num_threads(2)
def call(rows):
    h, w = torch.ones(rows, 16), torch.zeros(64, 16)
    a = torch.zeros(rows, dtype=torch.int64)
    cpp.linear_fwd(h, h, w, a, None, None, None, 1., 1., 1., 1., 0., 0, True)
call(2000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
call(200_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    out = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    per_row = 2 * 16 * 4 + 8 + 7 * 4 + 64  # h, u, actions, outputs, statistics
    assert int(out.stdout) * 1024 < 200_000 * per_row + (32 << 20)
