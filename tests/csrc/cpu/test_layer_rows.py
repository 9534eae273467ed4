"""The C++ row kernels of a layer against float64: no further off than eager PyTorch is.

Tolerances are eager's own error on the same inputs in the same dtype; forward values are also
compared with eager's one by one.
"""

import itertools

import pytest
import torch
from torch.nn.functional import silu

from qadapter.ops import cpp, layer_rows

pytestmark = pytest.mark.usefixtures("one_thread")

if not cpp.available()[0]:
    pytest.skip(cpp.available()[1], allow_module_level=True)

INF, NAN = float("inf"), float("nan")
F32, BF16 = torch.float32, torch.bfloat16
EPS = 1e-5


@pytest.fixture(autouse=True)
def fresh(isa):
    """layer_rows looks the instruction set up once."""
    layer_rows._operations.cache_clear()
    yield
    layer_rows._operations.cache_clear()


def random(*shape, dtype=F32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).to(dtype)


def eager_norm(x, weight, eps=EPS):
    """LlamaRMSNorm; in float64 without its casts."""
    hidden = x if x.dtype == torch.float64 else x.float()
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps)
    return weight * hidden.to(x.dtype)


def eager_gate(gate, up):
    return silu(gate) * up


def norm(x, weight):
    return layer_rows.rms_norm(x, weight, EPS)


def results(function, inputs, fixed, grad):
    """The output and the gradients of ``inputs``."""
    inputs = [one.detach().requires_grad_() for one in inputs]
    out = function(*inputs, *fixed)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def check(ours, eager, inputs, fixed=(), allowed=1.05):
    """Of output and gradients: the error's norm is not above eager's, up to ``allowed``.

    Single elements may be luckier in eager. 5 % is for float32 alone: vectors without a fused
    multiply-add round more often.
    """
    grad = random(*inputs[0].shape, dtype=inputs[0].dtype, seed=9)
    doubles = [[one.double() for one in some] for some in (inputs, fixed, [grad])]
    exact = results(eager, doubles[0], doubles[1], doubles[2][0])
    theirs = results(eager, inputs, fixed, grad)
    got = results(ours, inputs, fixed, grad)
    for a, b, c in zip(got, theirs, exact, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.is_contiguous()
        error, eagers = (a.double() - c).norm(), (b.double() - c).norm()
        assert error <= allowed * eagers + 2e-8 * c.norm(), (error, eagers)
    with torch.no_grad():
        assert torch.equal(ours(*inputs, *fixed), got[0])
    return got[0], theirs[0]


def units_apart(a, b):
    """By how many units in the last place, at most."""
    a, b = a.double(), b.double()
    unit = torch.finfo(F32).eps * b.abs().clamp_min(1e-28)
    return ((a - b).abs() / unit).max().item()


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("dim", [48, 576, 577, 1000, 1025, 4096])
def test_norm_is_no_worse_than_eager(dtype, dim):
    x, weight = random(64, dim, dtype=dtype), random(dim, dtype=dtype, seed=1)
    scales = torch.tensor([1e-4, 1.0, 1e3, 1e6], dtype=dtype).repeat(16)[:, None]
    for one in (x, x * scales):
        got, eager = check(norm, eager_norm, [one], [weight])
        if dtype == BF16:
            assert (got != eager).float().mean() < 1e-3
        else:
            assert units_apart(got, eager) <= 4


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_norm_of_every_rest(dtype):
    for rows, dim in itertools.product((1, 3), (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65)):
        x, weight = random(rows, dim, dtype=dtype, seed=dim), random(dim, dtype=dtype, seed=1)
        grad = random(rows, dim, dtype=dtype, seed=2)
        got = results(norm, [x], [weight], grad)
        exact = results(eager_norm, [x.double()], [weight.double()], grad.double())
        rounding = torch.finfo(dtype).eps
        assert ((got[0].double() - exact[0]).abs() <= 2 * rounding * exact[0].abs()).all()
        # a gradient is a difference: of r g w and x r^3 mean(x g w), where mean(x^2) r^2 <= 1
        root = torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPS)
        terms = root * (1 + dim**0.5) * (grad.double() * weight.double()).abs().amax()
        assert ((got[1].double() - exact[1]).abs() <= 2 * rounding * terms).all()


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0, 30.0])
def test_gate_is_no_worse_than_eager(dtype, scale):
    gate = random(16, 1539, dtype=dtype, scale=scale)
    up = random(16, 1539, dtype=dtype, seed=1)
    got, eager = check(layer_rows.silu_mul, eager_gate, [gate, up])
    if dtype == BF16:
        assert (got != eager).float().mean() < 1e-3
    else:
        assert units_apart(got, eager) <= 4


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gate_of_every_rest(dtype):
    for count in (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 16383, 16385):
        gate, up = random(count, dtype=dtype), random(count, dtype=dtype, seed=1)
        grad = random(count, dtype=dtype, seed=2)
        got = results(layer_rows.silu_mul, [gate, up], [], grad)
        exact = results(eager_gate, [gate.double(), up.double()], [], grad.double())
        bound = 4 * torch.finfo(dtype).eps * (1 + grad.double().abs()) * (1 + up.double().abs())
        for a, b in zip(got, exact, strict=True):
            assert ((a.double() - b).abs() <= bound * (1 + gate.double().abs())).all()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_one_gradient_of_two(dtype):
    gate, up = random(5, 70, dtype=dtype), random(5, 70, dtype=dtype, seed=1)
    both = results(layer_rows.silu_mul, [gate, up], [], torch.ones_like(up))
    for which in (0, 1):
        inputs = [gate.clone(), up.clone()]
        inputs[which].requires_grad_()
        layer_rows.silu_mul(*inputs).sum().backward()
        assert torch.equal(inputs[which].grad, both[1 + which]) and inputs[1 - which].grad is None


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_strides(dtype):
    wide = random(6, 5, 200, dtype=dtype)
    weight = random(100, dtype=dtype, seed=1)
    views = [
        wide[..., 3:103],
        wide[::2, ::2, 1:101],
        wide.transpose(0, 1)[..., :100],
        wide[0, 0, :100],
        wide[:1, :1, :100].expand(3, 2, 100),
        wide[..., ::2],  # no dense rows: copied
        wide.view(2, 3, 5, 200)[:, ::2, ::2, :100],  # three strides: copied
    ]
    for x in views:
        dense, grad = x.contiguous(), random(*x.shape, dtype=dtype, seed=3)
        shared = grad[..., :1].expand(x.shape)  # as the gradient of a sum is
        for g in (grad, shared):
            pairs = zip(
                results(norm, [x], [weight], g) + results(layer_rows.silu_mul, [x, x], [], g),
                results(norm, [dense], [weight], g.contiguous())
                + results(layer_rows.silu_mul, [dense, dense], [], g.contiguous()),
                strict=True,
            )
            assert all(torch.equal(a, b) and a.is_contiguous() for a, b in pairs)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_row_depends_neither_on_the_others_nor_on_the_threads(dtype):
    x, weight = random(97, 577, dtype=dtype), random(577, dtype=dtype, seed=1)
    grad = random(97, 577, dtype=dtype, seed=2)
    whole = results(norm, [x], [weight], grad)
    gates = results(layer_rows.silu_mul, [x, grad], [], x)
    for i in (0, 41, 96):
        one = results(norm, [x[i : i + 1]], [weight], grad[i : i + 1])
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(whole, one, strict=True))
    torch.set_num_threads(3)
    again = results(norm, [x], [weight], grad) + results(layer_rows.silu_mul, [x, grad], [], x)
    assert all(torch.equal(a, b) for a, b in zip(whole + gates, again, strict=True))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_nothing_to_do(dtype):
    for shape in ((0, 8), (3, 0), (0,), (2, 0, 8)):
        x = torch.zeros(shape, dtype=dtype)
        for out in results(norm, [x], [torch.zeros(shape[-1], dtype=dtype)], x):
            assert out.shape == shape
        for out in results(layer_rows.silu_mul, [x, x], [], x):
            assert out.shape == shape


def equal_or_nan(a, b, tolerance):
    return torch.allclose(a.double(), b.double(), rtol=tolerance, atol=1e-35, equal_nan=True)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_norm_of_extreme_values(dtype):
    """NaN, infinity and an overflowing square are what they are to eager PyTorch."""
    x, weight, grad = (random(12, 40, dtype=dtype, seed=i) for i in range(3))
    weight = weight[0].contiguous()
    x[1, 3], x[2, 5], x[3, 7] = NAN, INF, -INF
    x[4], x[5, 0], x[6] = 0.0, 1e20, 1e20  # squares overflow
    x[7], x[8] = torch.finfo(dtype).max, 1e-25  # squares underflow
    grad[9, 2], grad[10, 39], grad[11, 0] = NAN, INF, -INF
    ours = results(norm, [x], [weight], grad)
    eager = results(eager_norm, [x], [weight], grad)
    tolerance = 4 * torch.finfo(dtype).eps
    assert equal_or_nan(ours[0], eager[0], tolerance)
    assert torch.equal(ours[1].isnan().any(-1), eager[1].isnan().any(-1))
    plain = [0, 4, 5, 6, 8]
    scale = eager[1][plain].double().abs().amax(-1, keepdim=True)
    error = (ours[1][plain].double() - eager[1][plain].double()).abs()
    assert (error <= 4 * tolerance * scale).all()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gate_of_extreme_values(dtype):
    big = torch.finfo(dtype).max
    values = [0.0, -0.0, 1e-30, 87.0, -87.0, -88.0, -90.0, -128.0, -200.0, 200.0, 1e20, -1e20]
    values += [big, -big, INF, -INF, NAN]
    gate, up = (
        one.flatten().contiguous()
        for one in torch.meshgrid(*[torch.tensor(values, dtype=dtype)] * 2, indexing="ij")
    )
    for grad in (torch.ones_like(gate), torch.full_like(gate, -1e-3)):
        ours = results(layer_rows.silu_mul, [gate, up], [], grad)
        eager = results(eager_gate, [gate, up], [], grad)
        # where eager's steps overflow (g * up), or underflow against an up of 1e20, ours need not
        usual = (up.float().abs() <= 200) | ~up.isfinite()
        assert equal_or_nan(ours[0][usual], eager[0][usual], 8 * torch.finfo(dtype).eps)
        for a, b in zip(ours[1:], eager[1:], strict=True):
            usual = up.float().abs() <= 200
            assert equal_or_nan(a[usual], b[usual], 8 * torch.finfo(dtype).eps)


def test_every_bfloat16():
    """Also every NaN, of which rounding must not make a number."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(BF16)
    ones = torch.ones_like(x)
    got = layer_rows.silu_mul(x, ones)
    assert torch.equal(got.isnan(), silu(x).isnan())
    assert equal_or_nan(got, silu(x), torch.finfo(BF16).eps)
    assert torch.equal(layer_rows.silu_mul(ones, x).isnan(), x.isnan())
    alone = layer_rows.rms_norm(x[:, None].expand(-1, 3), ones[:3], EPS)
    eager = eager_norm(x[:, None].expand(-1, 3), ones[:3])
    assert torch.equal(alone.isnan(), eager.isnan())
    assert equal_or_nan(alone, eager, torch.finfo(BF16).eps)


def test_refuses():
    x, weight = random(2, 8), random(8)
    bad = [
        (norm, (x.half(), weight.half()), "x: expected float32 or bfloat16, got float16"),
        (norm, (x, weight.to(BF16)), "weight: expected a contiguous float32 .* got bfloat16"),
        (norm, (x, weight[:7]), r"x \[.., D\] and weight \[D\], got \[2, 8\] and \[7\]"),
        (norm, (x, x), r"got \[2, 8\] and \[2, 8\]"),
        (norm, (x, random(16)[::2]), "weight: expected a contiguous"),
        (layer_rows.silu_mul, (x.double(), x.double()), "gate: expected .*, got float64"),
        (layer_rows.silu_mul, (x, x.to(BF16)), "up: expected a float32 .* got bfloat16"),
        (layer_rows.silu_mul, (x, x[:1]), r"up: expected \[2, 8\] like gate, got \[1, 8\]"),
        (layer_rows.silu_mul, (x[0, 0], x[0, 0]), "gate: .*, got a scalar"),
    ]
    for function, arguments, message in bad:
        with pytest.raises(RuntimeError, match=message):
            function(*arguments)


def test_serves():
    x = random(2, 8)
    assert layer_rows.serves(x, x) and layer_rows.serves(x.to(BF16), x.to(BF16))
    assert layer_rows.serves(x, torch.nn.Parameter(x))
    assert not layer_rows.serves(x, x.to(BF16))
    assert not layer_rows.serves(x.half(), x.half()) and not layer_rows.serves(x.double(), x)
    assert not layer_rows.serves(x.to("meta"), x.to("meta"))
    assert not layer_rows.serves(torch.nn.Parameter(x), x)
