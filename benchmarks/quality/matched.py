"""Methods at the same forgetting: what each has gained where its KL is the same.

Trained policies stand at different places of their frontiers, so that one has both a larger gain
and a larger KL says nothing. Every method's LoRA is scored at several strengths; between these its
figures are read off at a given KL, seed by seed. The bootstrap draws pairs, conversations and
seeds, and finds the place of that KL in every draw anew, so that the intervals hold its chance too.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.quality import stats
from benchmarks.quality.stats import Matrix

KLS = (0.03, 0.1)  # nats a token
FIGURES = ("gain", "accuracy", "nll_change")


def read_off(kl: float, kls: Matrix, figures: Matrix, at_zero: float | None) -> Matrix:
    """figures [..., points] at `kl`, between points whose KL are kls [..., points].

    Linear in the root of KL: a small strength s moves the gain by s and KL by s^2. `at_zero` is
    the untouched base's figure; None: that of the least strength, as for accuracy.
    """
    x = np.sqrt(np.maximum(kls, 0.0))
    order = np.argsort(x, axis=-1)
    x, y = np.take_along_axis(x, order, -1), np.take_along_axis(figures, order, -1)
    zero = y[..., :1] if at_zero is None else np.full_like(y[..., :1], at_zero)
    x, y = np.concatenate([np.zeros_like(zero), x], -1), np.concatenate([zero, y], -1)
    # The interval that holds the root of kl; the outermost where none does.
    right = np.clip((x < kl**0.5).sum(-1, keepdims=True), 1, x.shape[-1] - 1)
    x0, x1 = (np.take_along_axis(x, at, -1) for at in (right - 1, right))
    y0, y1 = (np.take_along_axis(y, at, -1) for at in (right - 1, right))
    share = np.clip((kl**0.5 - x0) / np.maximum(x1 - x0, 1e-12), 0.0, 1.0)
    made: Matrix = (y0 + (y1 - y0) * share)[..., 0]
    return made


class Curve:
    """A variant's points, seed by seed: sums over drawn items are products with counts."""

    def __init__(self, results: list[dict[str, Any]]) -> None:
        results = sorted(results, key=lambda result: result["seed"])
        self.about = {n: results[0][n] for n in ("variant", "method", "changes", "noise")}
        self.seeds = [result["seed"] for result in results]
        points = [[p for p in r["points"] if not p["label"].startswith("step")] for r in results]

        def items(of: str, name: str) -> Matrix:
            return np.array([[point[of][name] for point in seed] for seed in points])

        self.gain = items("pairs", "gain")
        self.kl, self.nll_change = items("unrelated", "kl"), items("unrelated", "nll_change")
        self.tokens = np.array(points[0][0]["unrelated"]["tokens"], dtype=float)

    def at(self, kl: float, pairs: Matrix, conversations: Matrix) -> dict[str, Matrix]:
        """The figures [draws, seeds]; nothing where a seed does not come to that KL.

        ``pairs``, ``conversations``: how often each was drawn, [draws, n].
        """
        if not (self.kl.sum(-1).max(-1) / self.tokens.sum() >= kl).all():
            return {}
        tokens = (conversations @ self.tokens)[:, None, None]
        kls = np.einsum("spi,di->dsp", self.kl, conversations) / tokens
        changes = np.einsum("spi,di->dsp", self.nll_change, conversations) / tokens
        right = np.where(self.gain == 0, 0.5, self.gain > 0)
        gains, accuracies = (
            np.einsum("spi,di->dsp", each, pairs) / pairs.sum(-1)[:, None, None]
            for each in (self.gain, right)
        )
        return {
            "gain": read_off(kl, kls, gains, 0.0),
            "accuracy": read_off(kl, kls, accuracies, None),
            "nll_change": read_off(kl, kls, changes, 0.0),
        }


def rows(
    results: list[dict[str, Any]],
    kls: Sequence[float] = KLS,
    reference: str = "qadapter",
) -> list[dict[str, Any]]:
    """A row a variant, noise and KL: figures there, and the reference's less them, with as much
    noise, on the common seeds.

    None where a seed does not come to that KL at the largest strength. p is of the bootstrap: twice
    the share of draws on the other side of zero.
    """
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["variant"], result["noise"]), []).append(result)
    curves = {key: Curve(group) for key, group in groups.items()}
    rng = np.random.default_rng(0)
    drawn = [
        _counts(rng, each.shape[-1])
        for curve in list(curves.values())[:1]  # the items are the same in all
        for each in (curve.gain, curve.kl)
    ]
    made = []
    for (variant, noise), curve in curves.items():
        other = None if variant == reference else curves.get((reference, noise))
        common = [seed for seed in other.seeds if seed in curve.seeds] if other else []
        for kl in kls:
            figures, less = curve.at(kl, *drawn), {}
            if figures and common and (theirs := other.at(kl, *drawn)):
                at, at_theirs = ([c.seeds.index(s) for s in common] for c in (curve, other))
                less = {
                    name: _interval(theirs[name][:, at_theirs] - figures[name][:, at])
                    for name in FIGURES
                }
            own = {name: _interval(values)[:3] for name, values in figures.items()}
            row = {**curve.about, "kl": kl, "seeds": curve.seeds}
            made.append(row | {"figures": own or None, "reference_less": less or None})
    return made


def _counts(rng: np.random.Generator, n: int) -> Matrix:
    """How often each of n is drawn, [draws, n]; draw 0 is the data itself."""
    return np.concatenate([np.ones((1, n)), stats.bootstrap_counts(rng, n)])


def _interval(drawn: Matrix) -> list[float]:
    """[mean, low, high, p] of [draws, seeds], the data itself first; seeds are drawn here."""
    seeds = drawn.shape[1]
    counts = stats.bootstrap_counts(np.random.default_rng(1), seeds, len(drawn) - 1)
    means = (drawn[1:] * counts).sum(1) / seeds
    below = min((means <= 0).sum(), (means >= 0).sum())
    p = min(1.0, 2 * (1 + int(below)) / (1 + len(means)))
    return [float(drawn[0].mean()), *stats.percentile_interval(means), p]
