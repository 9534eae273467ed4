"""The C++ sampler draws the torch backend's tokens, by every instruction set.

Shapes of rows are chosen for the paths of its filters: values that the sample of columns shows, and
values that it does not (sorted rows, one cluster, a head over a bulk), ties everywhere.
"""

import math

import pytest
import torch

from qadapter import reference
from qadapter.ops import cpp, sample_torch

pytestmark = pytest.mark.usefixtures("one_thread")

if not cpp.available()[0]:
    pytest.skip(cpp.available()[1], allow_module_level=True)

INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ("flat", "peaked", "sorted", "reversed", "cluster", "ties", "equal", "masked")
FILTERS = [  # top_k, top_p, min_p
    (0, 1.0, 0.0),
    (1, 1.0, 0.0),
    (50, 1.0, 0.0),
    (1500, 1.0, 0.0),
    (0, 0.9, 0.0),
    (0, 0.3, 0.0),
    (0, 0.9999, 0.0),
    (0, 1e-9, 0.0),
    (0, 1.0, 0.03),
    (50, 0.9, 0.0),
    (3000, 0.8, 0.02),
    (0, 0.9, 0.3),
]


def logits(shape, rows, vocab, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, vocab, generator=generator)
    if shape == "peaked":
        z *= 2
        head = torch.arange(1.0, min(40, vocab) + 1).log() * -1.5
        first = math.log(vocab) + 2 + torch.linspace(-1, 4, rows)[:, None]
        z[:, : len(head)] = first + head
        z = z[:, torch.randperm(vocab, generator=generator)]
    elif shape in ("sorted", "reversed"):
        z = (z * 3).sort(-1, descending=shape == "reversed").values
    elif shape == "cluster":  # a seventh of the columns, side by side, has nearly all mass
        z[:, vocab // 3 : vocab // 3 + vocab // 7 + 1] += 9
    elif shape == "ties":
        z = (z * 2).round()
    elif shape == "equal":
        z = torch.zeros(rows, vocab)
    elif shape == "masked":
        z[:, torch.rand(vocab, generator=generator) < 0.9] = -INF
        z[:, vocab // 2] = 0.0
    return z


def arguments(base, q, filters=(0, 1.0, 0.0), *, weight=0.5, scale=1.25, greedy=False, seed=None):
    rows = q.shape[0]
    top_k, top_p, min_p = filters
    return (
        base,
        q,
        torch.full((1,), scale, dtype=torch.float64),
        torch.full((rows,), weight, dtype=torch.float64),
        torch.arange(rows) * 3 + 11 if seed is None else seed,
        torch.full((1,), 7),
        greedy,
        min(top_k, q.shape[1]),
        top_p,
        min_p,
    )


def both(*args, **kwargs):
    """The C++ result, after it was found equal to torch's."""
    args = arguments(*args, **kwargs)
    tokens, logprobs = cpp.sample(*args)
    expected_tokens, expected = sample_torch.sample(*args)
    assert tokens.dtype == torch.int64 and logprobs.dtype == torch.float32
    assert tokens.tolist() == expected_tokens.tolist()
    # Masses are float32 here: a token that ends within 1e-7 of top_p may fall on either side.
    tolerance = 2e-6 if args[8] == 1.0 else 2e-5
    torch.testing.assert_close(logprobs, expected, rtol=2e-6, atol=tolerance, equal_nan=True)
    return tokens, logprobs


def names(filters, weight, scale):
    top_k, top_p, min_p = filters
    composition = {"alpha_0": 1 + weight, "alpha_tilde": 1 / scale, "center": 1.0}
    return {**composition, "top_k": top_k, "top_p": top_p, "min_p": min_p}


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_reference(isa, shape, filters):
    for vocab in (700, 20_011):
        q = logits(shape, 4, vocab)
        base = (q + logits("flat", 4, vocab, seed=1)).nan_to_num(0, neginf=-INF) / 4
        if shape in ("ties", "equal"):
            base = base.round()
        tokens, logprobs = both(base, q, filters)
        want = reference.filtered_logprobs(
            base.double(), q.double(), **names(filters, 0.5, 1.25)
        ).gather(-1, tokens[:, None])[:, 0]
        torch.testing.assert_close(logprobs, want.float(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight", [0.0, 1.0, -0.5])
def test_types_and_vocabularies(isa, dtype, filters, weight):
    for vocab in (1, 2, 31, 33, 512, 513, 1000, 5000):
        q, base = logits("flat", 3, vocab).to(dtype), logits("peaked", 3, vocab, 1).to(dtype)
        both(base, q, filters, weight=weight, greedy=vocab % 2 == 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_vocabularies(isa, dtype):
    for vocab in (49153, 128256):
        q, base = logits("flat", 2, vocab).to(dtype), logits("peaked", 2, vocab, 1).to(dtype)
        for filters in FILTERS:
            both(base, q, filters)
        both(None, q, (50, 0.9, 0.0))


@pytest.mark.parametrize("filters", [(0, 1.0, 0.0), (40, 0.9, 0.0), (0, 0.7, 0.0)], ids=str)
def test_layouts(isa, filters):
    """Rows at any stride and alignment; columns behind a row's end are not looked at."""
    for dtype in DTYPES:
        wide = torch.full((5, 1200), NAN, dtype=dtype)
        wide[:, 7:1010] = logits("flat", 5, 1003).to(dtype)
        q, base = wide[:, 7:1010], wide.flip(0)[:, 7:1010]
        expected = both(base.contiguous(), q.contiguous(), filters)
        for got, want in zip(cpp.sample(*arguments(base, q, filters)), expected, strict=True):
            assert torch.equal(got, want)
    row = logits("flat", 1, 1003).expand(4, -1)
    tokens, _ = both(None, row, filters, seed=torch.full((4,), 5))
    assert tokens.unique().numel() == 1


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("threads", [2, 5])
def test_threads_and_batches_do_not_matter(filters, threads):
    """Bit for bit: also where a row is shared by several threads."""
    q, base = logits("flat", 9, 40_003), logits("peaked", 9, 40_003, seed=1)
    whole = cpp.sample(*arguments(base, q, filters))
    torch.set_num_threads(threads)
    again = cpp.sample(*arguments(base, q, filters))
    assert torch.equal(again[0], whole[0]) and torch.equal(again[1], whole[1])
    for rows in (slice(0, 1), slice(4, 5), slice(5, 7)):
        seed = (torch.arange(9) * 3 + 11)[rows]
        part = cpp.sample(*arguments(base[rows], q[rows], filters, seed=seed))
        assert torch.equal(part[0], whole[0][rows]) and torch.equal(part[1], whole[1][rows])


@pytest.mark.parametrize("filters", [(0, 1.0, 0.0), (7, 1.0, 0.0), (0, 0.6, 0.0)], ids=str)
def test_broken_rows(isa, filters):
    """Wherever it stands, in whichever stream; and other rows are as they were."""
    q, base = logits("flat", 8, 2000), logits("flat", 8, 2000, seed=1)
    clean, _ = both(base, q, filters)
    for column in (0, 511, 512, 1999):
        for stream, value in ((q, NAN), (base, NAN), (q, INF), (base, INF)):
            kept = stream[3].clone()
            stream[3, column] = value
            for weight in (0.5, -0.5):
                tokens, logprobs = both(base, q, filters, weight=weight)
                assert tokens[3] == -1 and logprobs[3].isnan()
            tokens, _ = both(base, q, filters)
            assert tokens[[0, 1, 2, 4, 5, 6, 7]].tolist() == clean[[0, 1, 2, 4, 5, 6, 7]].tolist()
            if stream is base:
                tokens, logprobs = both(base, q, filters, weight=0.0)
                assert tokens[3] >= 0 and logprobs[3].isfinite()
            stream[3] = kept
    q[3] = -INF
    tokens, logprobs = both(base, q, filters)
    assert tokens[3] == -1 and logprobs[3].isnan()
    q[3, 1234] = -80.0
    tokens, logprobs = both(base, q, filters)
    assert tokens[3] == 1234 and logprobs[3] == 0


def test_ties_at_every_cut(isa):
    """Of equal tokens the lowest ids stay, across blocks."""
    q = torch.full((400, 3000), -9.0)
    tied = [5, 511, 512, 700, 1024, 2999]
    q[:, tied] = 2.0
    q[:, 600] = 3.0
    q[:, 40:60] = -INF
    for filters, kept in (
        ((4, 1.0, 0.0), [600, 5, 511, 512]),
        ((0, 0.5, 0.0), [600, 5, 511]),  # e / (e + 6 + ...) = 0.31, then 0.11 each
        ((0, 1.0, 1.0), [600]),
        ((0, 1.0, 0.36), [600, *tied]),  # 1 / e = 0.368
        ((6, 0.8, 0.2), [600, 5, 511, 512, 700]),
    ):
        tokens, logprobs = both(None, q, filters, scale=1.0)
        assert sorted(set(tokens.tolist())) == sorted(kept), filters
        first = math.log(math.e / (math.e + len(kept) - 1))
        want = torch.where(tokens == 600, first, first - 1)
        torch.testing.assert_close(logprobs, want)
    q[:, 600] = 2.0
    tokens, _ = both(None, q, greedy=True)
    assert (tokens == 5).all()


def test_few_tokens_for_a_large_k(isa):
    q = torch.full((300, 5000), -INF)
    q[:, [17, 1900, 4999]] = torch.tensor([0.0, 1.0, 0.5])
    for filters in ((50, 1.0, 0.0), (2000, 1.0, 0.0), (50, 0.999, 0.0), (0, 0.999999, 0.0)):
        tokens, _ = both(None, q, filters)
        assert set(tokens.tolist()) == {17, 1900, 4999}


@pytest.mark.parametrize("filters", [(3, 1.0, 0.0), (0, 0.5, 0.0), (0, 1.0, 1.0)], ids=str)
def test_flushed_subnormals(isa, filters):
    """Cuts at 0, where the next smaller float is a subnormal."""
    q = torch.zeros(50, 1030)
    q[:, 5] = -1.0
    expected = both(None, q, filters)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU does not flush subnormals")
    try:
        tokens, logprobs = cpp.sample(*arguments(None, q, filters))
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(tokens, expected[0]) and torch.equal(logprobs, expected[1])


def test_results_below_float32(isa):
    """They are zeros here, but not in what the caller computes afterwards."""
    q = logits("flat", 20, 3000) * 60
    for filters in ((0, 1.0, 0.0), (50, 1.0, 0.0), (0, 0.9, 0.0)):
        both(None, q, filters)
    assert (torch.full((8,), 1e-44) * 0.5 > 0).all()


def test_shared_and_own_seeds(isa):
    q = logits("flat", 1, 999).expand(64, -1)
    shared, _ = both(None, q, seed=torch.tensor([-5]))
    assert shared.unique().numel() > 30
    own = torch.tensor([-(2**63), 2**63 - 1, -1, 0]).repeat(16)
    tokens, _ = both(None, q, seed=own)
    assert tokens[:4].tolist() == tokens[4:8].tolist() and tokens[:4].unique().numel() == 4


def test_no_rows():
    tokens, logprobs = both(None, torch.zeros(0, 10))
    assert tokens.shape == logprobs.shape == (0,)
