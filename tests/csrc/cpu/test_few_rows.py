"""The C++ product of few rows is float64's, by every instruction set.

Each element may be off by its own rounding and by a few float32 rounding units of the terms that
are summed: the sums are float32 in every dtype.
"""

import itertools

import pytest
import torch
from torch.nn.functional import linear

from qadapter.ops import cpp, few_rows

pytestmark = pytest.mark.usefixtures("one_thread")

if not cpp.available()[0]:
    pytest.skip(cpp.available()[1], allow_module_level=True)

INF, NAN = float("inf"), float("nan")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
EPS = torch.finfo(F32).eps


@pytest.fixture(autouse=True)
def fresh(product_isa):
    """The instruction set is looked up once."""
    forget()
    yield
    forget()


def forget():
    few_rows._operation.cache_clear()
    few_rows.rows_linear_limit.cache_clear()


def random(*shape, dtype=F32, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=gen).to(dtype)


def problem(rows, out, dim, dtype, *, bias=True):
    return (
        random(rows, dim, dtype=dtype),
        random(out, dim, dtype=dtype, seed=1),
        random(out, dtype=dtype, seed=2) if bias else None,
    )


def check_linear(x, weight, bias=None):
    """rows_linear of these; its errors are bounded element by element."""
    got = few_rows.rows_linear(x, weight, bias)
    exact = linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert got.dtype == x.dtype and got.shape == exact.shape and got.is_contiguous()
    rounding = torch.finfo(x.dtype).eps / 2
    terms = linear(x.double().abs(), weight.double().abs()) + exact.abs()
    sums = EPS * (8 + x.shape[-1] ** 0.5) * terms
    assert ((got.double() - exact).abs() <= 1.01 * rounding * exact.abs() + sums).all()
    return got


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_linear_matches_float64(dtype):
    for rows, out, dim in itertools.product((1, 2, 3, 4, 5, 16, 33), (1, 3, 16, 67), (1, 31, 96)):
        check_linear(*problem(rows, out, dim, dtype))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("dim", [2, 15, 16, 17, 32, 33, 63, 64, 65, 576, 1000])
def test_linear_of_every_rest(dtype, dim):
    for rows in (1, 6):
        check_linear(*problem(rows, 9, dim, dtype, bias=False))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_linear_is_better_than_a_sum_in_order(dtype):
    """Against what any machine computes alike: float32 sums of one term after another.

    Their n roundings are of partial sums that grow, so the error grows as n; over k partial sums it
    is 1 / sqrt(k) of that, and no vector has fewer than 4 (0.5). In bfloat16 the last rounding is
    nearly all of it, the same for both.
    """
    x, weight, bias = problem(8, 300, 1536, dtype)
    exact = linear(x.double(), weight.double(), bias.double())
    in_order = bias.float().repeat(8, 1)
    for k in range(1536):
        in_order += x[:, k, None].float() * weight[:, k].float()

    def error(result):
        return (result.double() - exact).norm()

    allowed = 0.75 if dtype == F32 else 1.001
    assert error(few_rows.rows_linear(x, weight, bias)) <= allowed * error(in_order.to(dtype))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_row_does_not_depend_on_the_others(dtype):
    x, weight, bias = problem(37, 131, 577, dtype)
    alone = torch.cat([few_rows.rows_linear(x[i : i + 1], weight, bias) for i in range(len(x))])
    for rows in range(1, 38):
        if rows == 5 and dtype == BF16 and cpp.capability() == "amx":  # adds up in another order
            alone = torch.cat(
                [few_rows.rows_linear(x[i : i + 5], weight, bias)[:1] for i in range(33)]
                + [few_rows.rows_linear(x[-5:], weight, bias)[1:]]
            )
        assert torch.equal(few_rows.rows_linear(x[:rows], weight, bias), alone[:rows])
        assert torch.equal(few_rows.rows_linear(x[-rows:], weight, bias), alone[-rows:])
    with_nan = x.clone()
    with_nan[1] = NAN
    got = few_rows.rows_linear(with_nan, weight, bias)
    assert got[1].isnan().all()
    assert torch.equal(got[2:], alone[2:]) and torch.equal(got[0], alone[0])


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_an_output_does_not_depend_on_the_threads_or_its_place(dtype):
    x, weight, bias = problem(5, 1003, 320, dtype)
    one = few_rows.rows_linear(x, weight, bias)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(few_rows.rows_linear(x, weight, bias), one)
    assert torch.equal(few_rows.rows_linear(x, weight[5:], bias[5:]), one[:, 5:])


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_strides(dtype):
    wide = random(6, 5, 200, dtype=dtype)
    weight = random(50, 300, dtype=dtype, seed=1)[:, 7:107]
    bias = random(50, dtype=dtype, seed=2)
    views = [
        wide[..., 3:103],
        wide[:, -1:, :100],
        wide[::2, ::2, 1:101],
        wide.transpose(0, 1)[..., :100],
        wide[0, 0, :100],
        wide[:1, :1, :100].expand(3, 2, 100),
        wide[..., ::2],  # no dense rows: copied
        wide.view(2, 3, 5, 200)[:, ::2, ::2, :100],  # three strides: copied
    ]
    for x in views:
        assert torch.equal(
            check_linear(x, weight, bias), few_rows.rows_linear(x.contiguous(), weight, bias)
        )


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_nothing_to_do(dtype):
    weight, bias = random(5, 8, dtype=dtype), random(5, dtype=dtype)
    assert few_rows.rows_linear(weight[:0], weight).shape == (0, 5)
    assert few_rows.rows_linear(weight, weight[:0]).shape == (5, 0)
    assert torch.equal(few_rows.rows_linear(weight[:, :0], weight[:, :0], bias), bias.repeat(5, 1))


def test_extreme_values():
    for dtype in (F32, BF16):
        big = torch.finfo(dtype).max
        x = torch.tensor([[big, 1.0, 0.0], [INF, 0.0, 0.0], [-0.0, NAN, 0.0], [1e-30, 1.0, 0.0]])
        weight = torch.tensor([[1.0, 0.0, 3.0], [2.0, 0.0, 1.0], [-INF, 1.0, 0.0], [0.0, 1e-30, 0]])
        x, weight = x.to(dtype).repeat(1, 40), weight.to(dtype).repeat(1, 40)
        x[:, 3:], weight[:, 3:] = 0, 0
        for times in (1, 2, 5):
            x, weight = x.repeat(times, 1), weight.repeat(times, 1)
            assert torch.equal(
                few_rows.rows_linear(x, weight).float().nan_to_num(12345.0),
                linear(x.double(), weight.double()).to(dtype).float().nan_to_num(12345.0),
            )


def test_bfloat16_is_rounded_to_nearest_even():
    # 1 + 2^-8 lies halfway, 1 + 2^-8 + 2^-20 does not; half a unit above the largest is infinity
    weight = torch.tensor([[1.0, 2**-8, 0.0], [1.0, 2**-8, 2**-20], [1.0, 3 * 2**-8, 0.0]])
    got = few_rows.rows_linear(torch.ones(1, 3, dtype=BF16), weight.to(BF16))
    assert got.tolist() == [[1.0, 1.0078125, 1.015625]]
    big = torch.finfo(BF16).max
    pair = torch.tensor([[big, 2.0**119]], dtype=BF16)
    assert few_rows.rows_linear(torch.ones(1, 2, dtype=BF16), pair).item() == INF


def test_linear_refuses():
    x, weight, bias = problem(2, 5, 8, F32)
    bad = [
        ((x.to(F16), weight.to(F16), None), "x: expected float32 or bfloat16, got float16"),
        ((x.to(BF16), weight, None), "weight: expected bfloat16 like x, got float32"),
        ((x[:, :7], weight, None), r"got \[2, 7\] and \[5, 8\]"),
        ((x, weight[0], None), r"weight \[O, K\]"),
        ((torch.tensor(1.0), weight, None), r"x \[.., K\]"),
        ((x[:, :5], weight.T[:5, :5], None), "weight: expected dense rows, got stride 8"),
        ((x, weight, bias[:4]), r"bias: expected a contiguous float32 \[5\].*got float32 \[4\]"),
        ((x, weight, bias.to(BF16)), "bias: .* got bfloat16"),
        ((x, weight, random(10)[::2]), "bias: expected a contiguous"),
    ]
    for arguments, message in bad:
        with pytest.raises(RuntimeError, match=message):
            few_rows.rows_linear(*arguments)


def test_limits(monkeypatch):
    for dtype in (F32, BF16, F16, torch.float64):
        assert few_rows.rows_linear_limit(dtype) in (*range(257), 4096)
    if cpp.capability() in ("avx2", "avx512"):  # where PyTorch has no product for prompts, either
        assert few_rows.rows_linear_limit(BF16) == 4096
    assert few_rows.rows_linear_limit(F16) == few_rows.rows_linear_limit(torch.float64) == 0
    monkeypatch.setattr(cpp, "why_not_loaded", lambda: "no extension")
    few_rows.rows_linear_limit.cache_clear()
    assert few_rows.rows_linear_limit(BF16) == 0
