"""QF.sample: the distribution, the filters, the generator, the edges."""

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qadapter import functional as QF
from qadapter import reference
from qadapter.sampling import philox_4x32


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


@pytest.mark.parametrize("filters", FILTERS)
def test_draws_follow_the_distribution(filters):
    """Chi-square over 200,000 draws of one row: below the 1e-6 quantile of a correct sampler."""
    draws = 200_000
    base, adapter = (x[:1] for x in streams(seed=2))
    seeds = torch.arange(draws)
    sample = QF.sample(
        base.expand(draws, -1), adapter.expand(draws, -1), seed=seeds, alpha_0=0.5, **filters
    )
    logp = reference.filtered_logprobs(base.double(), adapter.double(), alpha_0=0.5, **filters)[0]
    counts = torch.bincount(sample.tokens, minlength=13).double()
    expected = logp.exp() * draws
    kept = expected > 0
    assert (counts[~kept] == 0).all()
    statistic = float(((counts - expected)[kept].square() / expected[kept]).sum())
    degrees = int(kept.sum()) - 1
    limit = degrees + 2 * (degrees * 13.8) ** 0.5 + 2 * 13.8  # Laurent-Massart bound for 1e-6
    assert statistic < limit
    torch.testing.assert_close(sample.logprobs, logp[sample.tokens].float(), rtol=1e-4, atol=1e-5)


def test_a_row_does_not_depend_on_its_batch():
    base, adapter = streams(batch=64)
    seeds, positions = torch.arange(64) * 7, torch.arange(64) % 5
    whole = QF.sample(base, adapter, seed=seeds, position=positions, center=0.0)
    for rows in (slice(3, 4), slice(10, 30)):
        part = QF.sample(
            base[rows], adapter[rows], seed=seeds[rows], position=positions[rows], center=0.0
        )
        assert torch.equal(part.tokens, whole.tokens[rows])


def test_seeds():
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


def test_greedy_takes_the_lowest_of_equals():
    base = torch.zeros(2, 6)
    adapter = torch.tensor([[0.0, 3, 1, 3, 2, 3], [5, 5, 0, 0, 0, 5]])
    sample = QF.sample(base, adapter, temperature=0)
    assert sample.tokens.tolist() == [1, 0]
    top_k = reference.filtered_logprobs(base, adapter, top_k=2)
    assert top_k.isfinite().tolist() == [
        [False, True, False, True, False, False],
        [True, True, False, False, False, False],
    ]


def test_masked_tokens_are_never_drawn():
    base, adapter = (x[:1].expand(5000, -1).clone() for x in streams())
    adapter[:, [0, 3, 12]] = float("-inf")
    tokens = QF.sample(base, adapter, seed=1, alpha_0=0.4).tokens
    assert not set(tokens.tolist()) & {0, 3, 12}


def test_rows_without_a_token_are_marked():
    base, adapter = streams(batch=3)
    adapter[1] = float("-inf")
    adapter[2, 4] = float("nan")
    sample = QF.sample(base, adapter, seed=0)
    assert sample.tokens[1:].tolist() == [-1, -1] and sample.tokens[0] >= 0
    assert sample.logprobs[1:].isnan().all()


def test_half_precision_and_no_base():
    base, adapter = streams()
    for dtype in (torch.bfloat16, torch.float16):
        sample = QF.sample(None, adapter.to(dtype), seed=0)
        assert sample.tokens.dtype == torch.int64 and sample.logprobs.dtype == torch.float32
    assert QF.sample(base[:0], adapter[:0]).tokens.shape == (0,)


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
        ({"position": torch.zeros(4)}, "position"),
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
