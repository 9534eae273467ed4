"""Intervals and tests over items and seeds.

A figure is a mean, or a ratio of sums, over items (pairs, conversations, prompts) that are the same
for every seed, and over seeds. The bootstrap draws items, and seeds too where there are several, so
that an interval holds both kinds of chance. With three seeds the second kind is rough.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

DRAWS = 2000
LEVEL = 0.95

Matrix = np.ndarray[Any, Any]


def bootstrap_counts(rng: np.random.Generator, n: int, count: int = DRAWS) -> Matrix:
    """How often each of n is drawn, [count, n]."""
    return rng.multinomial(n, np.full(n, 1 / n), size=count)


def percentile_interval(values: Matrix) -> tuple[float, float]:
    """What holds `LEVEL` of them."""
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


def interval(values: Matrix, weights: Matrix | None = None) -> list[float]:
    """[mean, low, high] of sum(values) / sum(weights) over [seeds, items]; without weights of the
    mean."""
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"values: expected [seeds, items], got shape {values.shape}")
    weights = np.ones_like(values) if weights is None else weights
    if weights.shape != values.shape:
        raise ValueError(f"weights: expected {values.shape}, got {weights.shape}")
    rng = np.random.default_rng(0)
    seeds, items = values.shape
    # How often each item, and each seed, is drawn.
    columns = bootstrap_counts(rng, items)
    rows = bootstrap_counts(rng, seeds) if seeds > 1 else np.ones((DRAWS, 1))
    sums = [np.einsum("ds,si,di->d", rows, m, columns, optimize=True) for m in (values, weights)]
    ratios = sums[0] / np.maximum(sums[1], 1e-12)
    return [float(values.sum() / weights.sum()), *percentile_interval(ratios)]


def mean_interval(values: Sequence[float]) -> list[float]:
    """[mean, low, high] over items alone."""
    return interval(np.array([values], dtype=float))


def paired(first: Matrix, second: Matrix) -> dict[str, float]:
    """first - second on the same seeds and items: interval, and p of a sign-flip test of items.

    The test is of the mean over seeds, so it says how sure the difference is for these trainings.
    """
    if first.shape != second.shape:
        raise ValueError(f"second: expected {first.shape}, got {second.shape}")
    mean, low, high = interval(first - second)
    per_item = (first - second).mean(0)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(5 * DRAWS, per_item.size))
    flipped = np.abs((signs * per_item).mean(1))
    reached = int((flipped >= abs(per_item.mean()) - 1e-12).sum())
    return {"mean": mean, "low": low, "high": high, "p": (1 + reached) / (1 + len(flipped))}


def holm(p_values: Any) -> Matrix:
    """Adjusted for that several are looked at."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    scaled = np.minimum(1.0, np.arange(len(p), 0, -1) * p[order])
    adjusted[order] = np.maximum.accumulate(scaled)
    return adjusted
