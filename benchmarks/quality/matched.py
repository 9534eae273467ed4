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

    def __init__(self, by_seed: dict[int, list[dict[str, Any]]]) -> None:
        self.seeds = sorted(by_seed)
        points = [by_seed[seed] for seed in self.seeds]
        self.gain = np.array([[p["pairs"]["gain"] for p in seed] for seed in points])
        self.kl = np.array([[p["unrelated"]["kl"] for p in seed] for seed in points])
        self.nll_change = np.array(
            [[p["unrelated"]["nll_change"] for p in seed] for seed in points]
        )
        self.tokens = np.array(points[0][0]["unrelated"]["tokens"], dtype=float)

    def reaches(self, kl: float) -> bool:
        means = self.kl.sum(-1) / self.tokens.sum()
        return bool((means.max(-1) >= kl).all())

    def at(self, kl: float, figure: str, pairs: Matrix, talks: Matrix) -> Matrix:
        """[draws, seeds] of the figure; `pairs`, `talks`: how often each was drawn, [draws, n]."""
        tokens = (talks @ self.tokens)[:, None, None]
        kls = np.einsum("spi,di->dsp", self.kl, talks) / tokens
        if figure == "nll_change":
            values = np.einsum("spi,di->dsp", self.nll_change, talks) / tokens
        else:
            right = np.where(self.gain == 0, 0.5, self.gain > 0)
            each = self.gain if figure == "gain" else right
            values = np.einsum("spi,di->dsp", each, pairs) / pairs.sum(-1)[:, None, None]
        return read_off(kl, kls, values, None if figure == "accuracy" else 0.0)


def _curves(
    results: list[dict[str, Any]],
) -> dict[tuple[str, float], tuple[dict[str, Any], Curve]]:
    """(variant, noise) -> (its first result, its curve)."""
    found: dict[tuple[str, float], dict[int, dict[str, Any]]] = {}
    for result in results:
        found.setdefault((result["variant"], result["noise"]), {})[result["seed"]] = result
    made = {}
    for key, by_seed in found.items():
        points = {
            seed: [p for p in result["points"] if not p["label"].startswith("step")]
            for seed, result in by_seed.items()
        }
        made[key] = (next(iter(by_seed.values())), Curve(points))
    return made


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
    curves = _curves(results)
    rng = np.random.default_rng(0)
    made: list[dict[str, Any]] = []
    if not curves:
        return made
    any_curve = next(iter(curves.values()))[1]
    pairs, talks = (
        np.concatenate(
            [np.ones((1, n)), rng.multinomial(n, np.full(n, 1 / n), size=stats.DRAWS)]
        )  # draw 0 is the data itself
        for n in (any_curve.gain.shape[-1], any_curve.kl.shape[-1])
    )
    for (variant, noise), (result, curve) in curves.items():
        for kl in kls:
            row: dict[str, Any] = {
                "variant": variant,
                "method": result["method"],
                "changes": result["changes"],
                "noise": noise,
                "kl": kl,
                "seeds": curve.seeds,
                "figures": None,
                "reference_less": None,
            }
            made.append(row)
            if not curve.reaches(kl):
                continue
            drawn = {name: curve.at(kl, name, pairs, talks) for name in FIGURES}
            row["figures"] = {name: _interval(values)[:3] for name, values in drawn.items()}
            if variant == reference or (reference, noise) not in curves:
                continue
            own = curves[reference, noise][1]
            common = [seed for seed in own.seeds if seed in curve.seeds]
            if not common or not own.reaches(kl):
                continue
            row["reference_less"] = {
                name: _interval(
                    own.at(kl, name, pairs, talks)[:, [own.seeds.index(s) for s in common]]
                    - values[:, [curve.seeds.index(s) for s in common]]
                )
                for name, values in drawn.items()
            }
    return made


def _interval(drawn: Matrix) -> list[float]:
    """[mean, low, high, p] of [draws, seeds], the data itself first; seeds are drawn here."""
    seeds = drawn.shape[1]
    rng = np.random.default_rng(1)
    counts = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=len(drawn) - 1)
    means = (drawn[1:] * counts).sum(1) / seeds
    tail = 50 * (1 - stats.LEVEL)
    low, high = np.percentile(means, [tail, 100 - tail])
    below = min((means <= 0).sum(), (means >= 0).sum())
    p = min(1.0, 2 * (1 + int(below)) / (1 + len(means)))
    return [float(drawn[0].mean()), float(low), float(high), p]
