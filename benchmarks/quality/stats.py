"""Intervals and tests over items and seeds.

A figure is a mean, or a ratio of sums, over items (pairs, conversations, prompts) that are the same
for every seed, and over seeds. The bootstrap draws items, and seeds too where there are several, so
that an interval holds both kinds of chance. With three seeds the second kind is rough. Items of one
prompt are no independent ones: they make a group, which is drawn as a whole.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np

DRAWS = 2000
LEVEL = 0.95

Matrix = np.ndarray[Any, Any]


def groups_of(keys: Iterable[Hashable]) -> Matrix:
    """The number of each key's group, from 0 on: equal keys are of one group."""
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(key, len(known)) for key in keys], dtype=int)


def bootstrap_counts(
    rng: np.random.Generator, n: int, count: int = DRAWS, groups: Matrix | None = None
) -> Matrix:
    """How often each of n is drawn, [count, n]; ``groups`` (`groups_of`, [n]) are drawn whole."""
    if groups is None:
        return rng.multinomial(n, np.full(n, 1 / n), size=count)
    if groups.shape != (n,):
        raise ValueError(f"groups: expected {n}, got shape {groups.shape}")
    of_group: Matrix = bootstrap_counts(rng, int(groups.max()) + 1, count)
    return of_group[:, groups]


def percentile_interval(values: Matrix) -> tuple[float, float]:
    """What holds `LEVEL` of them."""
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


def interval(
    values: Matrix, weights: Matrix | None = None, groups: Matrix | None = None
) -> list[float]:
    """[mean, low, high] of sum(values) / sum(weights) over [seeds, items]; without weights of the
    mean. ``groups`` are of the items."""
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"values: expected [seeds, items], got shape {values.shape}")
    weights = np.ones_like(values) if weights is None else weights
    if weights.shape != values.shape:
        raise ValueError(f"weights: expected {values.shape}, got {weights.shape}")
    rng = np.random.default_rng(0)
    seeds, items = values.shape
    # How often each item, and each seed, is drawn.
    columns = bootstrap_counts(rng, items, groups=groups)
    rows = bootstrap_counts(rng, seeds) if seeds > 1 else np.ones((DRAWS, 1))
    sums = [np.einsum("ds,si,di->d", rows, m, columns, optimize=True) for m in (values, weights)]
    ratios = sums[0] / np.maximum(sums[1], 1e-12)
    return [float(values.sum() / weights.sum()), *percentile_interval(ratios)]


def mean_interval(values: Sequence[float], groups: Matrix | None = None) -> list[float]:
    """[mean, low, high] over items alone."""
    return interval(np.array([values], dtype=float), groups=groups)


def paired(first: Matrix, second: Matrix, groups: Matrix | None = None) -> dict[str, float]:
    """first - second on the same seeds and items: interval, and p of a sign-flip test of items, or
    of their groups.

    The test is of the mean over seeds, so it says how sure the difference is for these trainings.
    """
    if first.shape != second.shape:
        raise ValueError(f"second: expected {first.shape}, got {second.shape}")
    mean, low, high = interval(first - second, groups=groups)
    per_item = (first - second).mean(0)
    sums = per_item if groups is None else np.bincount(groups, per_item)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(5 * DRAWS, sums.size))
    flipped = np.abs(signs @ sums) / per_item.size
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
