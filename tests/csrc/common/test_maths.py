"""csrc/common, the maths that host and GPU share, is float64's and torch's own conversions."""

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from qadapter.ops.philox import row_keys, uniform
from tests.made_once import made_once

ROOT = Path(__file__).resolve().parents[3]
LOG2E = math.log2(math.e)
INF, NAN = float("inf"), float("nan")


def build(library):
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    source = Path(__file__).with_name("maths.cpp")
    command = ["c++", *flags, "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", source, "-o", library]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def maths(tmp_path_factory):
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    library = made_once(tmp_path_factory, "maths.so", build)
    loaded = ctypes.CDLL(str(library))
    loaded.mix.restype = loaded.value_of.restype = ctypes.c_float
    for name in ("draw", "share", "least", "deepest"):
        getattr(loaded, name).restype = ctypes.c_int64
    return loaded


def at(tensor):
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def f32(value):
    return ctypes.c_float(value)


def f64(value):
    return ctypes.c_double(value)


def i64(value):
    return ctypes.c_int64(value)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_every_16_bit_number_widens_as_in_torch(maths, name, dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    out = torch.empty(2**16)
    getattr(maths, f"widen_{name}")(at(bits), at(out), 2**16)
    expected = bits.view(dtype).float()
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out[~out.isnan()], expected[~out.isnan()])


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_narrowing_rounds_to_nearest_even_as_in_torch(maths, name, dtype):
    generator = torch.Generator().manual_seed(0)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    every = every[every.isfinite()].sort().values
    middles = (every[1:].double() + every[:-1].double()).div(2).float()  # ties, exact in float32
    wide = torch.randn(200_000, generator=generator) * torch.logspace(-12, 6, 200_000)
    edges = torch.tensor([0.0, -0.0, INF, -INF, 65504.0, 65519.9, 65520.0, 3.4e38, 2.9e-8, 1e-40])
    x = torch.cat([every, middles, middles.nextafter(every[1:]), wide, edges])
    out = torch.empty(x.numel(), dtype=torch.int16)
    getattr(maths, f"narrow_{name}")(at(x), at(out), x.numel())
    assert torch.equal(out, x.to(dtype).view(torch.int16))
    nan = torch.tensor([NAN])
    getattr(maths, f"narrow_{name}")(at(nan), at(out), 1)
    assert out[:1].view(dtype).isnan().all()


def row_pair(maths, x, scale, lanes=32, blocks=1):
    out = torch.empty(2)
    maths.row_pair(at(x), x.numel(), f32(scale), lanes, blocks, at(out), at(out[1:]))
    return out


@pytest.mark.parametrize("order", ["random", "up", "down"])
@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
@pytest.mark.parametrize(("lanes", "blocks"), [(1, 1), (32, 1), (256, 1), (256, 7)])
def test_statistics_of_a_row(maths, lanes, blocks, alpha, order):
    generator = torch.Generator().manual_seed(1)
    for size, spread in ((5, 3.0), (50257, 3.0), (50257, 1e4)):
        x = torch.randn(size, generator=generator) * spread
        if order != "random":
            x = x.sort(descending=order == "down").values
        maximum, total = row_pair(maths, x, LOG2E / alpha, lanes, blocks)
        exact = ((x.double() - x.double().max()) / alpha).exp().sum()
        assert maximum == x.max()
        # Relative, so it is the absolute error of the log-sum-exp. An exponent is off by a rounding
        # of itself and counts up to 25 units before its term does not.
        bound = 2.0**-23 * (25 + size / lanes / blocks) ** 0.5 * 8
        assert abs(total.double() / exact - 1) < bound, (size, spread)


def test_nothing_and_poison_in_a_row(maths):
    empty = row_pair(maths, torch.full((100,), -INF), 1.0)
    assert empty.tolist() == [-INF, 0.0]
    masked = torch.full((101,), -INF)
    masked[77] = -5.0
    assert row_pair(maths, masked, 1.0, 32, 3).tolist() == [-5.0, 1.0]
    for poison in (NAN, INF):
        for blocks in (1, 3):
            x = torch.zeros(101)
            x[50] = poison
            assert row_pair(maths, x, 1.0, 32, blocks)[1].isnan()
    assert row_pair(maths, torch.full((9,), NAN), 1.0)[1].isnan()


def test_merging_is_symmetric_to_the_bit(maths):
    generator = torch.Generator().manual_seed(2)
    pairs = torch.randn(2000, 2, 2, generator=generator) * 5
    pairs[..., 1] = pairs[..., 1].exp()
    pairs[:5, 0] = torch.tensor([-INF, 0.0])
    out = torch.empty(2, 2)
    for a, b in pairs:
        maths.merge(at(a), at(b), f32(1.3), at(out[0]))
        maths.merge(at(b), at(a), f32(1.3), at(out[1]))
        assert torch.equal(out[0], out[1])


def test_mixing_masks_and_poisons(maths):
    def mix(kind, z_q, z_b, m):
        return maths.mix(kind, f32(z_q), f32(z_b), f32(m))

    assert mix(0, 2.0, NAN, 0.0) == 2.0
    assert mix(1, 2.0, 3.0, 0.5) == mix(2, 2.0, -3.0, -0.5) == 3.5
    for kind, m in ((1, 0.5), (2, -0.5)):
        assert mix(kind, -INF, 1.0, m) == mix(kind, 1.0, -INF, m) == -INF
        assert mix(kind, -INF, -INF, m) == -INF
        assert math.isnan(mix(kind, 1.0, NAN, m))
    assert mix(1, 1.0, INF, 0.5) == INF
    assert math.isnan(mix(2, 1.0, INF, -0.5)), "it must not pass for a mask"


def finish(maths, x, base, logits, action, vocab, composition, lse=None, logp=None, known=True):
    numbers = torch.tensor([*x, *base, *logits, lse or 0.0, logp or 0.0])
    out = torch.empty(7)
    alphas = torch.tensor(composition, dtype=torch.float64)
    maths.finish(
        at(numbers),
        int(known),
        int(lse is not None),
        int(logp is not None),
        ctypes.c_int64(action),
        ctypes.c_int64(vocab),
        at(alphas),
        at(out),
    )
    return out.tolist()


def test_finishing_a_row(maths):
    alpha_0, alpha_tilde, _ = composition = (0.25, 0.5, 1.0)
    x, base, logits = (1e4, 7.5), (9990.0, 3.25), (9999.0, 9989.0, 9998.5)
    q, value, base_logp, policy_logp, base_lse, shift, log_sum = finish(
        maths, x, base, logits, 3, 10, composition
    )
    lse_b = 9990.0 + math.log(3.25)
    exact = 1e4 + alpha_tilde * math.log(7.5) - alpha_0 * lse_b
    assert q == 10.0
    assert abs(value - exact) < 2.0**-24 * exact * 1.01, "one rounding"
    assert base_logp == pytest.approx(9989.0 - lse_b, abs=1e-6)
    assert policy_logp == pytest.approx((9998.5 - 1e4) / alpha_tilde - math.log(7.5), abs=1e-6)
    assert base_lse == pytest.approx(lse_b, rel=1e-7)
    assert (shift, log_sum) == (1e4, pytest.approx(math.log(7.5)))

    without = finish(maths, x, base, logits, -100, 10, composition)
    assert without[0] == without[2] == without[3] == 0 and without[1] == value
    for action in (-1, 10):
        wrong = finish(maths, x, base, logits, action, 10, composition)
        assert all(math.isnan(number) for number in wrong[:4]) and wrong[4] == base_lse
    masked = finish(maths, x, base, (-INF, -INF, -INF), 3, 10, composition)
    assert masked[0] == masked[3] == -INF
    cached = finish(maths, x, base, logits, 3, 10, composition, lse=9991.0, logp=-2.0)
    assert cached[2] == -2.0 and cached[4] == 9991.0 and cached[0] == 10.0
    alone = finish(maths, x, base, (9999.0, 0.0, 9998.5), 3, 10, composition, 9991.0, -2.0, False)
    assert alone[0] == 9999.0 - 9989.0
    for sum_x in (0.0, NAN):
        nothing = finish(maths, (-INF, sum_x), base, logits, 3, 10, composition)
        assert all(math.isnan(nothing[i]) for i in (0, 1, 3, 6)) and nothing[4] == base_lse


def test_equal_streams_finish_at_zero(maths):
    for total in (1.0, 1.37, 12345.678):
        pair, ones = (123.456, total), (1.0, 1.0, 1.0)
        assert finish(maths, pair, pair, (5.0, 5.0, 5.0), 3, 10, ones)[:2] == [0.0, 0.0]


def test_uniforms_are_those_of_the_torch_backend(maths):
    generator = torch.Generator().manual_seed(3)
    keys, counters = torch.randint(-(2**63), 2**63 - 1, (2, 500), generator=generator)
    out = torch.empty(500, dtype=torch.float64)
    maths.uniforms(at(keys), at(counters), at(out), 500)
    assert torch.equal(out, uniform(keys, counters))
    assert ((out >= 0) & (out < 1)).all()
    for seed in (0, -1, 2**62 + 5):
        rows = torch.empty(70, dtype=torch.int64)
        maths.row_keys(i64(seed), at(rows), 70)
        assert torch.equal(rows, row_keys(torch.tensor([seed]), 70))


def test_keys_are_in_the_order_of_their_numbers(maths):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(5000, generator=generator) * torch.logspace(-40, 38, 5000)
    edges = torch.tensor([INF, -INF, 0.0, -0.0, 1e-45, -1e-45, 3.4028235e38, -3.4028235e38])
    x = torch.cat([x, edges])
    keys, back = torch.empty(len(x), dtype=torch.int64), torch.empty_like(x)
    maths.keys(at(x), at(keys), at(back), len(x))
    order = x.argsort(stable=True)
    assert ((x[order][1:] > x[order][:-1]) == (keys[order][1:] > keys[order][:-1])).all()
    assert (back == x).all()
    assert keys[x == -3.4028235e38].item() == 0x00800000 > keys[x == -INF].item()


def test_composing_rounds_twice_and_masks(maths):
    generator = torch.Generator().manual_seed(5)
    z_q, z_b = torch.randn(2, 1000, generator=generator)
    z_q[:3], z_b[1:4] = -INF, torch.tensor([-INF, INF, -INF])
    z_b[4], z_q[5], z_b[6] = INF, NAN, NAN
    out = torch.empty(1000)
    for weight in (0.3, -0.7):
        maths.composed(at(z_q), at(z_b), f32(weight), at(out), 1000)
        assert (out[:4] == -INF).all() and out[4:7].isnan().all()
        assert torch.equal(out[7:], z_q[7:] + torch.tensor(weight) * z_b[7:])


@pytest.mark.parametrize("scale", [1e-6, 0.3, 1.0, 40.0])
def test_masses_of_tokens(maths, scale):
    x = torch.linspace(-30, 2, 1001)
    x[0] = -INF
    out = torch.empty(1001, dtype=torch.int64)
    maths.token_masses(at(x), f32(2.0), f64(scale), at(out), 1001)
    exact = ((x.double() - 2.0) * scale).exp() * 2**40
    assert out[-1] == 2**40 and out[0] == 0 and (out[1:] >= out[:-1]).all()
    # the exponent's rounding, that of its scale, one of the exponential, and the cut to an integer
    bound = exact * (3 + 3 * (x.double() - 2.0).abs().nan_to_num(0, 0, 0) * scale) * 2.0**-24 + 1
    assert ((out - exact).abs() <= bound).all()


def test_thresholds_of_draws_and_shares(maths):
    def draw(u, total):
        return maths.draw(f64(u), i64(total))

    assert [draw(u, 4) for u in (0.0, 0.24, 0.25, 0.5, 0.99)] == [0, 0, 1, 2, 3]
    for total in (1, 2**40, 2**62 - 1):
        assert draw(1 - 2.0**-53, total) == total - 1 or total > 2**53
        assert 0 <= draw(1 - 2.0**-53, total) < total
    assert [maths.share(f64(p), i64(10)) for p in (0.05, 0.1, 0.11, 0.9, 1.0)] == [1, 1, 2, 9, 10]

    def ties(target, above, mass):
        return maths.ties(i64(target), i64(above), i64(mass))

    assert [ties(t, 10, 4) for t in (5, 10, 11, 14, 15)] == [1, 1, 1, 1, 2]
    assert ties(11, 10, 0) == 2**30, "ties without mass all stay"


def test_bounds_of_the_filters(maths):
    def value(key):
        return maths.value_of(i64(key))

    for maximum, scale, min_p in ((3.0, 1.0, 0.1), (1e4, 0.5, 0.03), (-7.0, 20.0, 0.9)):
        least = value(maths.least(f32(maximum), f64(scale), f64(math.log(min_p))))
        below = torch.tensor(least).nextafter(torch.tensor(-INF)).item()
        assert (least - maximum) * scale >= math.log(min_p) > (below - maximum) * scale
    assert value(maths.least(f32(2.5), f64(1.0), f64(0.0))) == 2.5

    for maximum, scale, top_p, total, vocab in (
        (3.0, 1.0, 0.9, 1.5, 1000),
        (0.0, 9.0, 0.999, 7, 9),
    ):
        deepest = value(maths.deepest(f32(maximum), f64(scale), f64(top_p), f64(total), vocab))
        all_of_it = vocab * math.exp((deepest - maximum) * scale)
        assert 0.4 * (1 - top_p) * total < all_of_it < 0.6 * (1 - top_p) * total


def test_soft_cap_and_its_slope(maths):
    generator = torch.Generator().manual_seed(6)
    for cap in (5.0, 30.0):
        s = torch.randn(20000, generator=generator) * torch.logspace(-6, 3, 20000)
        s[:4] = torch.tensor([INF, -INF, 0.0, 0.25 * cap])
        z, slope = torch.empty_like(s), torch.empty_like(s)
        maths.capped(at(s), f32(cap), at(z), at(slope), len(s))
        tanh = torch.tanh(s.double() / cap)
        # cosh^-2 in place of 1 - tanh^2, which cancels in float64, too
        exact = torch.cosh((s.double() / cap).clamp(-300, 300)).pow(-2)
        assert ((z - cap * tanh).abs() <= 6e-7 * (cap * tanh).abs()).all()
        size = 1 + (s.double() / cap).abs().clamp(max=60)
        assert ((slope - exact).abs() <= 4e-7 * size * exact + 1e-37).all()
