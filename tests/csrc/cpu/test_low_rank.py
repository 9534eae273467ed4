"""The C++ products of a low-rank adapter are float64's, by every instruction set.

Each element may be off by its own rounding and by a few float32 rounding units of the terms that
are summed: the sums are float32 in every dtype.
"""

import itertools

import pytest
import torch

from qadapter.ops import cpp, low_rank

pytestmark = pytest.mark.usefixtures("one_thread")

if not cpp.available()[0]:
    pytest.skip(cpp.available()[1], allow_module_level=True)

INF, NAN = float("inf"), float("nan")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
EPS = torch.finfo(F32).eps


@pytest.fixture(autouse=True)
def fresh(product_isa):
    """The instruction set is looked up once."""
    low_rank._operations.cache_clear()
    yield
    low_rank._operations.cache_clear()


def random(*shape, dtype=F32, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=gen).to(dtype)


def lora_problem(rows, out, dim, rank, dtype, low_rank):
    return (
        random(rows, out, dtype=dtype, seed=3),
        random(rows, dim, dtype=dtype, seed=4),
        random(rank, dim, dtype=low_rank, seed=5),
        random(out, rank, dtype=low_rank, seed=6),
    )


def check_lora(out, x, a, b, scaling, start, stop):
    before = out.clone()
    exact = before.double()
    part = x[start:stop].double()
    exact[start:stop] += scaling * (part @ a.double().T @ b.double().T)
    terms = before.double().abs()
    terms[start:stop] += abs(scaling) * (part.abs() @ a.double().abs().T @ b.double().abs().T)
    low_rank.lora_add_(out, x, a, b, scaling, start, stop)
    rounding = torch.finfo(x.dtype).eps / 2
    sums = EPS * (8 + x.shape[-1] ** 0.5 + a.shape[0] ** 0.5)
    assert ((out.double() - exact).abs() <= 1.01 * rounding * exact.abs() + sums * terms).all()
    assert torch.equal(out[:start], before[:start]) and torch.equal(out[stop:], before[stop:])


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("low_rank", [F32, BF16])
def test_lora_matches_float64(dtype, low_rank):
    sizes = itertools.product((1, 3, 17, 40), (1, 16, 37), (1, 33, 64), (1, 3, 8, 16, 21))
    for rows, out, dim, rank in sizes:
        check_lora(*lora_problem(rows, out, dim, rank, dtype, low_rank), -0.7, 0, rows)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_lora_of_some_rows(dtype):
    out, x, a, b = lora_problem(9, 40, 50, 8, dtype, F32)
    for start, stop in ((0, 9), (3, 6), (8, 9), (4, 4), (0, 0), (9, 9)):
        check_lora(out.clone(), x, a, b, 2.0, start, stop)
    # [rows, T, .]: all T of a row; views with gaps
    out, x = random(4, 6, 90, dtype=dtype), random(4, 7, 60, dtype=dtype)
    check_lora(out[:, :5, 7:47], x[:, 2:, 9:59], a, b, 0.5, 1, 3)
    check_lora(out[:, ::6, 50:], x[:, -1:, :50], a, b, 0.5, 2, 4)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_lora_takes_strided_factors(dtype):
    out, x, a, b = lora_problem(3, 37, 50, 8, dtype, F32)
    wide_a, wide_b = torch.full((8, 64), NAN), torch.full((37, 20), NAN)
    wide_a[:, 5:55], wide_b[:, 3:11] = a, b
    expected = out.clone()
    check_lora(expected, x, a, b, 1.0, 0, 3)
    low_rank.lora_add_(out, x, wide_a[:, 5:55], wide_b[:, 3:11], 1.0, 0, 3)
    assert torch.equal(out, expected)


def by_tiles(out, x, a, b, scaling):
    """Each row beside 31 others."""
    made = torch.empty_like(out)
    for i in range(len(out)):
        padded = out[i].repeat(33, 1)
        low_rank.lora_add_(padded, x[i].repeat(33, 1), a, b, scaling, 0, 33)
        made[i] = padded[-1]
    return made


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_lora_row_does_not_depend_on_the_others(dtype):
    out, x, a, b = lora_problem(37, 45, 70, 8, dtype, F32)
    alone = out.clone()
    for i in range(37):
        low_rank.lora_add_(alone, x, a, b, 0.3, i, i + 1)
    for start, stop in ((5, 22), (1, 3), (0, 37), (2, 36)):
        if stop - start > 31 and dtype == BF16 and cpp.capability() == "amx":
            alone = by_tiles(out, x, a, b, 0.3)  # adds up in another order
        got = out.clone()
        low_rank.lora_add_(got, x, a, b, 0.3, start, stop)
        assert torch.equal(got[start:stop], alone[start:stop])
    torch.set_num_threads(3)
    low_rank.lora_add_(out, x, a, b, 0.3, 0, 37)
    assert torch.equal(out, alone)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_what_is_not_finite_stays_so(dtype):
    out, x, a, b = lora_problem(40, 77, 30, 8, dtype, F32)
    strange = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(F32)  # NaNs, all
    b[3, :3], x[20, 1], out[30, 76] = strange, INF, -INF
    expected = out.double() + x.double() @ a.double().T @ b.double().T
    low_rank.lora_add_(out, x, a, b, 1.0, 0, 40)
    assert out[:, 3].isnan().all() and out[20].isnan().eq(expected[20].isnan()).all()
    assert torch.equal(out[20].isinf(), expected[20].isinf()) and out[30, 76] == -INF
    others = torch.arange(40) != 20
    assert out[others][:, 4:76].isfinite().all()


def test_lora_refuses():
    out, x, a, b = lora_problem(4, 5, 8, 2, F32, F32)
    bad = [
        ((out, x.to(F16), a, b, 1.0, 0, 4), "x: expected float32 or bfloat16, got float16"),
        ((out, x, a.double(), b, 1.0, 0, 4), "lora_a: expected .*, got float64"),
        ((out.to(BF16), x, a, b, 1.0, 0, 4), "out: expected float32 like x, got bfloat16"),
        ((out, x, a, b.to(BF16), 1.0, 0, 4), "lora_b: expected float32 like lora_a"),
        ((out, x, a[:, :7], b, 1.0, 0, 4), r"got \[4, 5\], \[4, 8\], \[2, 7\] and \[5, 2\]"),
        ((out, x, a, b[:, :1], 1.0, 0, 4), r"\[5, 1\]"),
        ((out[:3], x, a, b, 1.0, 0, 3), r"expected out \[rows"),
        ((out, x, a, b, 1.0, 0, 5), "start <= stop <= 4, got 0 and 5"),
        ((out, x, a, b, 1.0, 3, 2), "got 3 and 2"),
        ((out, x, a, b, 1.0, -1, 2), "got -1 and 2"),
        ((random(5, 4).T, x, a, b, 1.0, 0, 4), "out: expected dense rows, got stride 4"),
        ((out, x, random(8, 2).T, b, 1.0, 0, 4), "lora_a, lora_b: expected dense rows"),
    ]
    before = out.clone()
    for arguments, message in bad:
        with pytest.raises(RuntimeError, match=message):
            low_rank.lora_add_(*arguments)
    assert torch.equal(out, before)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_low_product_comes_with_it(dtype):
    for rank, dim, out in ((1, 5, 3), (8, 64, 40), (21, 33, 0)):
        y, x, a, b = lora_problem(37, out, dim, rank, dtype, F32)
        low = torch.full((17, rank), NAN)
        low_rank.lora_add_(y, x, a, b, 0.5, 3, 20, low)
        exact = x[3:20].double() @ a.double().T
        torch.testing.assert_close(low.double(), exact, rtol=1e-5, atol=1e-4)
    for bad in (torch.zeros(37, 21).double(), torch.zeros(36, 21), torch.zeros(21, 37).t()):
        with pytest.raises(RuntimeError, match="low: expected a contiguous float32 \\[37, 21\\]"):
            low_rank.lora_add_(y, x, a, b, 0.5, 0, 37, bad)


def outer_error(low, x, scaling):
    """In units of the error that float32 sums of so many terms may have."""
    got = low_rank.lora_outer(low, x, scaling)
    exact = scaling * (low.double().T @ x.double())
    terms = abs(scaling) * (low.double().abs().T @ x.double().abs())
    assert got.dtype == F32 and got.shape == exact.shape and got.is_contiguous()
    allowed = EPS * (4 + len(low) ** 0.5) * terms + torch.finfo(F32).tiny
    return ((got.double() - exact).abs() / allowed).max().item() if got.numel() else 0.0


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_outer_matches_float64(dtype):
    for rows, dim, rank in itertools.product((0, 1, 7, 300), (1, 16, 37, 96), (1, 4, 8, 21)):
        low, x = random(rows, rank, seed=1), random(rows, dim, dtype=dtype, seed=2)
        assert outer_error(low, x, -0.7) <= 1
    wide = random(50, 2, 90, dtype=dtype, seed=3)
    assert outer_error(random(50, 8), wide[:, 1, 7:60], 2.0) <= 1
    assert outer_error(random(50, 8), wide[:1, 1, :].expand(50, 90), 2.0) <= 1
    assert outer_error(random(50, 8), wide[:, 1, ::2], 2.0) <= 1
    assert outer_error(random(90, 8), wide[:, 0].T, 2.0) <= 1


def test_outer_does_not_depend_on_threads():
    low, x = random(500, 8), random(500, 333, dtype=BF16, seed=1)
    one = low_rank.lora_outer(low, x, 1.0)
    torch.set_num_threads(3)
    assert torch.equal(low_rank.lora_outer(low, x, 1.0), one)


def test_outer_refuses():
    low, x = random(4, 2), random(4, 5)
    for arguments in ((low.double(), x), (low[:3], x), (low.T.contiguous().T, x), (low, x[0])):
        with pytest.raises(RuntimeError, match="lora_outer: expected contiguous float32 low"):
            low_rank.lora_outer(*arguments, 1.0)
    with pytest.raises(RuntimeError, match="lora_outer: x: expected float32 or bfloat16"):
        low_rank.lora_outer(low, x.to(F16), 1.0)
