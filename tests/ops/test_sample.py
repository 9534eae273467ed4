"""QF.sample draws from the filtered policy on every CPU backend, reproducibly, edges included."""

import math

import pytest
import torch
from torch.library import opcheck
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qadapter import functional as QF
from qadapter import reference, use_backend
from qadapter.ops import cpp
from qadapter.ops.philox import philox_4x32

pytestmark = pytest.mark.usefixtures("one_thread")

INF, NAN = float("inf"), float("nan")
BACKENDS = ["torch", *(["cpp"] if cpp.available()[0] else [])]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use_backend(request.param):
        yield request.param


def streams(batch=4, vocab=13, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(batch, vocab, generator=generator) * 2
    return base, base + torch.randn(batch, vocab, generator=generator)


def test_philox_known_answers():
    """Random123's test vectors for philox4x32-10, those whose upper counter half is 0."""
    zero = torch.zeros(1, dtype=torch.int64)
    words = [int(w) for w in philox_4x32(zero, zero)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


FILTERS = [
    {},
    {"temperature": 0.6},
    {"top_k": 3},
    {"top_p": 0.7},
    {"min_p": 0.15},
    {"temperature": 1.7, "top_k": 8, "top_p": 0.9, "min_p": 0.05},
]
COMPOSITIONS = [(1.0, 1.0, 1.0), (0.5, 0.8, 1.0), (0.01, 1.0, 0.0)]


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_filters_are_those_of_transformers(filters, composition):
    base, adapter = streams()
    names = dict(zip(("alpha_0", "alpha_tilde", "center"), composition, strict=True))
    scores = reference.policy_logits(base, adapter, *composition)
    scores = TemperatureLogitsWarper(filters.get("temperature", 1.0))(None, scores)
    if "top_k" in filters:
        scores = TopKLogitsWarper(filters["top_k"])(None, scores)
    if "top_p" in filters:
        scores = TopPLogitsWarper(filters["top_p"])(None, scores)
    if "min_p" in filters:
        scores = MinPLogitsWarper(filters["min_p"])(None, scores)
    expected = torch.log_softmax(scores, -1)
    ours = reference.filtered_logprobs(base, adapter, **names, **filters)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def shapes():
    """Rows of 24 logits: flat, peaked, Zipf's law shuffled, two modes with ties in both."""
    generator = torch.Generator().manual_seed(4)
    order = torch.randperm(24, generator=generator)
    peaked = torch.randn(24, generator=generator)
    peaked[[3, 17]] += torch.tensor([7.0, 5.5])
    return {
        "flat": torch.randn(24, generator=generator) * 0.1,
        "peaked": peaked,
        "zipf": (-1.2 * torch.arange(1.0, 25).log())[order],
        "ties": torch.tensor([2.0] * 5 + [-1.0] * 14 + [2.25] * 5)[order],
    }


def assert_drawn_from(tokens, logp):
    """Chi-square and total variation, each below what a correct sampler exceeds once in 10^6."""
    draws, expected = len(tokens), logp.exp() * len(tokens)
    counts = torch.bincount(tokens, minlength=len(logp)).double()
    assert (counts[expected == 0] == 0).all()
    rare = expected < 10  # together one cell
    cells, seen = expected[~rare], counts[~rare]
    if expected[rare].sum() >= 10:
        cells = torch.cat([cells, expected[rare].sum()[None]])
        seen = torch.cat([seen, counts[rare].sum()[None]])
    statistic, degrees = float(((seen - cells).square() / cells).sum()), len(cells) - 1
    # Laurent and Massart's bound; McDiarmid's, as one draw moves the variation by 1 / draws
    assert statistic <= degrees + 2 * (degrees * 13.8) ** 0.5 + 2 * 13.8
    variation = float((counts / draws - logp.exp()).abs().sum() / 2)
    spread = float((logp.exp() * (1 - logp.exp()) / draws).sqrt().sum() / 2)
    assert variation <= spread + (13.8 / (2 * draws)) ** 0.5


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("shape", ["flat", "peaked", "zipf", "ties"])
def test_draws_follow_the_distribution(backend, shape, filters):
    """A million draws for every filter and backend, over the four shapes."""
    draws = 250_000
    q = shapes()[shape][None]
    base = q.flip(1) * 0.25
    sample = QF.sample(
        base.expand(draws, -1),
        q.expand(draws, -1),
        seed=torch.arange(draws),
        alpha_0=1.5,
        **filters,
    )
    logp = reference.filtered_logprobs(base.double(), q.double(), alpha_0=1.5, **filters)[0]
    assert_drawn_from(sample.tokens, logp)
    torch.testing.assert_close(sample.logprobs, logp[sample.tokens].float(), rtol=1e-6, atol=1e-6)


def test_positions_give_independent_draws(backend):
    """One stream: every position its own draw, and pairs of neighbours as independent ones."""
    q, draws = shapes()["zipf"][None, :6], 200_000
    tokens = QF.sample(
        None,
        q.expand(draws, -1),
        seed=torch.full((draws,), 3),
        position=torch.arange(draws),
    ).tokens
    logp = torch.log_softmax(q[0].double(), -1)
    assert_drawn_from(tokens, logp)
    pairs = (logp[:, None] + logp[None, :]).flatten()
    assert_drawn_from(tokens[::2] * 6 + tokens[1::2], pairs)


@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_logprobs_are_those_of_transformers(backend, filters, composition):
    """Drawn often enough that every kept token of a small row appears."""
    base, adapter = streams(batch=1, seed=5)
    names = dict(zip(("alpha_0", "alpha_tilde", "center"), composition, strict=True))
    scores = reference.policy_logits(base, adapter, *composition)
    scores = TemperatureLogitsWarper(filters.get("temperature", 1.0))(None, scores)
    if "top_k" in filters:
        scores = TopKLogitsWarper(filters["top_k"])(None, scores)
    if "top_p" in filters:
        scores = TopPLogitsWarper(filters["top_p"])(None, scores)
    if "min_p" in filters:
        scores = MinPLogitsWarper(filters["min_p"])(None, scores)
    expected = torch.log_softmax(scores, -1)[0]
    sample = QF.sample(
        base.expand(20_000, -1), adapter.expand(20_000, -1), seed=1, **names, **filters
    )
    torch.testing.assert_close(sample.logprobs, expected[sample.tokens], rtol=1e-5, atol=1e-5)
    likely = (expected > math.log(2e-3)).nonzero()[:, 0].tolist()
    assert set(likely) <= set(sample.tokens.tolist())


def test_values_per_row(backend):
    """alpha_0 and alpha_tilde as tensors: every row as if it were alone with its numbers."""
    base, adapter = streams(batch=5)
    base[2, 3] = NAN  # of no account where its weight is 0
    alpha_0 = torch.tensor([1.0, 0.5, 1.0, 2.0, -1.0])
    alpha_tilde = torch.tensor([1.0, 0.5, 0.25, 2.0, 1.5])
    whole = QF.sample(
        base, adapter, alpha_0=alpha_0, alpha_tilde=alpha_tilde, seed=torch.arange(5), top_p=0.8
    )
    for row in range(5):
        alone = QF.sample(
            base[row : row + 1],
            adapter[row : row + 1],
            alpha_0=float(alpha_0[row]),
            alpha_tilde=float(alpha_tilde[row]),
            seed=torch.tensor([row]),
            top_p=0.8,
        )
        assert torch.equal(alone.tokens, whole.tokens[row : row + 1])
        assert torch.equal(alone.logprobs, whole.logprobs[row : row + 1])


@pytest.mark.parametrize("filters", [{}, {"top_k": 20, "top_p": 0.8}, {"top_p": 0.9}], ids=str)
@pytest.mark.parametrize("vocab", [13, 5003])
def test_a_row_does_not_depend_on_its_batch(backend, vocab, filters):
    base, adapter = streams(batch=64, vocab=vocab)
    seeds, positions = torch.arange(64) * 7, torch.arange(64) % 5
    whole = QF.sample(base, adapter, seed=seeds, position=positions, center=0.0, **filters)
    for rows in (slice(3, 4), slice(10, 30), slice(None, None, 9)):
        part = QF.sample(
            base[rows],
            adapter[rows],
            seed=seeds[rows],
            position=positions[rows],
            center=0.0,
            **filters,
        )
        assert torch.equal(part.tokens, whole.tokens[rows])
        assert torch.equal(part.logprobs, whole.logprobs[rows])


def test_an_int_seeds_each_row_by_its_index(backend):
    base, adapter = streams(batch=8)
    whole = QF.sample(base, adapter, seed=-(2**63), alpha_0=0.5)
    part = QF.sample(base[:1], adapter[:1], seed=-(2**63), alpha_0=0.5)
    assert part.tokens[0] == whole.tokens[0] and part.logprobs[0] == whole.logprobs[0]
    part = QF.sample(base[:3], adapter[:3], seed=-(2**63), alpha_0=0.5)
    assert torch.equal(part.tokens, whole.tokens[:3])


def test_seeds(backend):
    base, adapter = (x[:1].expand(2000, -1) for x in streams())
    first = QF.sample(base, adapter, seed=5)
    assert torch.equal(first.tokens, QF.sample(base, adapter, seed=5).tokens)
    assert not torch.equal(first.tokens, QF.sample(base, adapter, seed=6).tokens)
    assert not torch.equal(first.tokens, QF.sample(base, adapter, seed=5, position=1).tokens)
    assert first.tokens.unique().numel() > 3  # rows of one batch do not share their noise
    torch.manual_seed(0)
    one = QF.sample(base, adapter).tokens
    two = QF.sample(base, adapter).tokens
    torch.manual_seed(0)
    assert torch.equal(one, QF.sample(base, adapter).tokens)
    assert not torch.equal(one, two)


def test_greedy_takes_the_lowest_of_equals(backend):
    base = torch.zeros(2, 6)
    adapter = torch.tensor([[0.0, 3, 1, 3, 2, 3], [5, 5, 0, 0, 0, 5]])
    sample = QF.sample(base, adapter, temperature=0)
    assert sample.tokens.tolist() == [1, 0]
    torch.testing.assert_close(
        sample.logprobs, torch.log_softmax(adapter, -1)[[0, 1], sample.tokens]
    )
    filtered = QF.sample(base, adapter, temperature=0, top_k=2)
    assert filtered.tokens.tolist() == [1, 0]
    torch.testing.assert_close(filtered.logprobs, torch.full((2,), math.log(0.5)))
    for seed in range(30):
        sample = QF.sample(base, adapter, top_k=2, seed=seed)
        assert sample.tokens[0] in (1, 3) and sample.tokens[1] in (0, 1)
        assert QF.sample(base, adapter, top_p=0.2, seed=seed).tokens.tolist() == [1, 0]
        sample = QF.sample(base, adapter, min_p=1.0, seed=seed)
        assert sample.tokens[0] in (1, 3, 5) and sample.tokens[1] in (0, 1, 5)
    top_k = reference.filtered_logprobs(base, adapter, top_k=2)
    assert top_k.isfinite().tolist() == [
        [False, True, False, True, False, False],
        [True, True, False, False, False, False],
    ]


def test_masked_tokens_are_never_drawn(backend):
    base, adapter = (x[:1].expand(5000, -1).clone() for x in streams())
    adapter[:, [0, 3, 12]] = float("-inf")
    tokens = QF.sample(base, adapter, seed=1, alpha_0=0.4).tokens
    assert not set(tokens.tolist()) & {0, 3, 12}


def test_rows_without_a_token_are_marked(backend):
    base, adapter = streams(batch=3)
    adapter[1] = float("-inf")
    adapter[2, 4] = float("nan")
    sample = QF.sample(base, adapter, seed=0)
    assert sample.tokens[1:].tolist() == [-1, -1] and sample.tokens[0] >= 0
    assert sample.logprobs[1:].isnan().all()


def test_half_precision_and_no_base(backend):
    base, adapter = streams()
    for dtype in (torch.bfloat16, torch.float16):
        sample = QF.sample(None, adapter.to(dtype), seed=0)
        assert sample.tokens.dtype == torch.int64 and sample.logprobs.dtype == torch.float32
    assert QF.sample(base[:0], adapter[:0]).tokens.shape == (0,)


SPECIAL = (0.5, -INF, INF, NAN)


@pytest.mark.parametrize("weight", [0.0, 2.0, -2.0])
def test_special_values(backend, weight):
    """A mask in a stream that counts masks, whatever is in the other; +inf else is like NaN."""
    for q in SPECIAL:
        for base in SPECIAL:
            q_logits = torch.tensor([[0.0, 1.0, 0.5]]).repeat(200, 1)
            base_logits = torch.zeros_like(q_logits)
            q_logits[:, 1], base_logits[:, 1] = q, base
            sample = QF.sample(base_logits, q_logits, seed=0, alpha_0=1 + weight)
            masked = q == -INF or (weight != 0 and base == -INF)
            if masked:
                assert set(sample.tokens.tolist()) == {0, 2}
            elif q == 0.5 and (weight == 0 or base == 0.5):
                assert set(sample.tokens.tolist()) == {0, 1, 2}
            else:
                assert (sample.tokens == -1).all() and sample.logprobs.isnan().all()


def test_extremes(backend):
    """Large logits, finite masks, tiny and huge temperatures: nothing overflows."""
    q = torch.tensor([[1e4, 1e4 - 1, 0.0, -3.4e38], [-3.4e38, -3.4e38, -INF, -3.4e38]])
    sample = QF.sample(None, q, seed=0)
    assert sample.tokens[0] in (0, 1) and sample.tokens[1] in (0, 1, 3)
    torch.testing.assert_close(
        sample.logprobs, torch.log_softmax(q, -1)[[0, 1], sample.tokens], rtol=1e-5, atol=1e-6
    )
    for temperature in (1e-30, 1e-300):
        cold = QF.sample(None, q, seed=0, temperature=temperature)
        assert cold.tokens[0] == 0 and cold.logprobs[0] == 0
        assert cold.tokens[1] in (0, 1, 3)
    for filters in ({}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 1.0}):
        hot = QF.sample(None, q, seed=0, temperature=1e308, **filters)
        assert (hot.tokens >= 0).all() and hot.logprobs.isfinite().all()
    for filters in ({"top_p": 1e-300}, {"top_k": 1}, {"min_p": 1.0, "top_p": 1e-9}):
        first = QF.sample(None, q, seed=0, **filters)
        assert first.tokens.tolist() == [0, 0] and (first.logprobs == 0).all()
    assert (QF.sample(None, q, seed=0, top_p=1 - 1e-16, top_k=10**9).tokens >= 0).all()


def test_no_gradient_and_no_change(backend):
    base, adapter = streams()
    adapter.requires_grad_()
    before = adapter.detach().clone()
    sample = QF.sample(base, adapter, seed=0, alpha_0=0.3, top_k=4)
    assert not sample.logprobs.requires_grad
    assert torch.equal(before, adapter.detach())


def test_registration(backend):
    base, adapter = streams(batch=3)
    one, rows = torch.ones(1, dtype=torch.float64), torch.full((3,), 0.5, dtype=torch.float64)
    seed, position = torch.arange(3), torch.zeros(1, dtype=torch.int64)
    op = torch.ops.qadapter.sample.default
    opcheck(op, (base, adapter, rows, one, seed, position, False, 3, 0.9, 0.0))
    opcheck(op, (None, adapter, one, rows, seed, position, True, 0, 1.0, 0.1))


def test_double_precision_runs_on_torch():
    base, adapter = (x.double() for x in streams())
    sample = QF.sample(base, adapter, seed=0, alpha_0=0.5, top_p=0.9)
    logp = reference.filtered_logprobs(base, adapter, alpha_0=0.5, top_p=0.9)
    torch.testing.assert_close(
        sample.logprobs, logp.gather(-1, sample.tokens[:, None])[:, 0].float()
    )


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 2.0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"alpha_tilde": 0.0}, "alpha_tilde"),
        ({"seed": "a"}, "seed"),
        ({"seed": torch.zeros(3, dtype=torch.int64)}, "seed"),
        ({"seed": True}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"position": torch.zeros(4)}, "position"),
        ({"temperature": NAN}, "temperature"),
        ({"alpha_tilde": torch.ones(3)}, "alpha_tilde"),
        ({"alpha_tilde": torch.tensor([1.0, 1, 0, 1])}, r"scale\[2\].*alpha_tilde"),
        ({"alpha_tilde": torch.tensor([1.0, -1, 1, 1])}, r"scale\[1\].*alpha_tilde"),
        ({"alpha_tilde": torch.tensor([1.0, 1, 1, INF])}, r"scale\[3\].*alpha_tilde"),
        ({"alpha_tilde": torch.ones(4, dtype=torch.int64)}, "alpha_tilde"),
        ({"alpha_0": torch.tensor([1.0, 1, NAN, 1])}, r"base_weight\[2\].*alpha_0"),
        ({"alpha_0": torch.ones(4, 1)}, "alpha_0"),
        ({"center": "1"}, "center"),
    ],
)
def test_refuses(kwargs, message):
    base, adapter = streams()
    with pytest.raises(ValueError, match=message):
        QF.sample(base, adapter, **kwargs)
    with pytest.raises(ValueError, match="base_logits"):
        QF.sample(None, adapter, alpha_0=0.5)
    with pytest.raises(ValueError, match="base_logits"):
        QF.sample(base[:2], adapter)
    with pytest.raises(ValueError, match="base_logits"):
        QF.sample(base.half(), adapter)
    with pytest.raises(ValueError, match="base_logits"):
        QF.sample(None, adapter, alpha_0=torch.ones(4))
    with pytest.raises(ValueError, match="q_logits"):
        QF.sample(base, adapter[0])
    with pytest.raises(ValueError, match="q_logits"):
        QF.sample(base[:, :0], adapter[:, :0])
