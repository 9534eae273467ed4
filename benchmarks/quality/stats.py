"""Intervals and tests over items and seeds.

A figure is a mean, or a ratio of sums, over items (pairs, conversations, prompts) that are the same
for every seed, and over seeds. The bootstrap draws items, and seeds too where there are several, so
that an interval holds both kinds of chance. With three seeds the second kind is rough.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

DRAWS = 2000
LEVEL = 0.95

Matrix = np.ndarray[Any, Any]


class Interval(NamedTuple):
    mean: float
    low: float
    high: float


def bootstrap_counts(rng: np.random.Generator, n: int, count: int = DRAWS) -> Matrix:
    """How often each of n is drawn, [count, n]."""
    return rng.multinomial(n, np.full(n, 1 / n), size=count)


def percentile_interval(values: Matrix) -> tuple[float, float]:
    """What holds `LEVEL` of them."""
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


def interval(
    values: Sequence[Sequence[float]], weights: Sequence[Sequence[float]] | None = None
) -> Interval:
    """Of sum(values) / sum(weights) over [seeds, items]; without weights of the mean."""
    numerator = _matrix(values)
    denominator = np.ones_like(numerator) if weights is None else _matrix(weights)
    if denominator.shape != numerator.shape:
        raise ValueError(f"weights: expected {numerator.shape}, got {denominator.shape}")
    rng = np.random.default_rng(0)
    seeds, items = numerator.shape
    # How often each item, and each seed, is drawn.
    columns = bootstrap_counts(rng, items)
    rows = bootstrap_counts(rng, seeds) if seeds > 1 else np.ones((DRAWS, 1))
    sums = [
        np.einsum("ds,si,di->d", rows, m, columns, optimize=True) for m in (numerator, denominator)
    ]
    ratios = sums[0] / np.maximum(sums[1], 1e-12)
    return Interval(float(numerator.sum() / denominator.sum()), *percentile_interval(ratios))


def _matrix(values: Sequence[Sequence[float]]) -> Matrix:
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2 or matrix.size == 0:
        raise ValueError(f"values: expected [seeds, items], got shape {matrix.shape}")
    return matrix


class Difference(NamedTuple):
    mean: float
    low: float
    high: float
    p: float


def paired(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> Difference:
    """first - second on the same seeds and items: interval, and p of a sign-flip test of items.

    The test is of the mean over seeds, so it says how sure the difference is for these trainings.
    """
    a, b = _matrix(first), _matrix(second)
    if a.shape != b.shape:
        raise ValueError(f"second: expected {a.shape}, got {b.shape}")
    made = interval((a - b).tolist())
    per_item = (a - b).mean(0)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(5 * DRAWS, per_item.size))
    flipped = np.abs((signs * per_item).mean(1))
    reached = int((flipped >= abs(per_item.mean()) - 1e-12).sum())
    return Difference(*made, p=(1 + reached) / (1 + len(flipped)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted for that several are looked at."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted
