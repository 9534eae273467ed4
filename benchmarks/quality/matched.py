"""Methods at the same forgetting: what each has gained where its KL is the same.

Trained policies stand at different places of their frontiers, so that one has both a larger gain
and a larger KL says nothing. Every method's LoRA is scored at several strengths; between these its
figures are read off at a given KL, seed by seed. The bootstrap draws prompts, conversations and
seeds, and finds the place of that KL in every draw anew, so that the intervals hold its chance too.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.quality import stats
from benchmarks.quality.stats import Matrix

KLS = (0.01, 0.03, 0.1)  # nats a token
# What a method is compared with: field of a row, method.
REFERENCES = {"reference_less": "qadapter", "dpo_less": "dpo_own"}
# The untouched base's; of accuracy, which has none, that of the least strength is taken.
AT_ZERO = {"gain": 0.0, "accuracy": None, "nll_change": 0.0}


def read_off(kl: float, kls: Matrix, figures: Matrix, at_zero: float | None) -> Matrix:
    """figures [..., points] at `kl`, between points whose KL are kls [..., points].

    Linear in the root of KL: a small strength s moves the gain by s and KL by s^2. `at_zero` is
    the untouched base's figure; None: that of the least strength.
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


def rows(items: pd.DataFrame, kls: Sequence[float] = KLS) -> list[dict[str, Any]]:
    """A row a variant, noise and KL: figures there, and those of each of `REFERENCES` less them,
    with as much noise, on the common seeds. ``items`` is `summary.frame`'s.

    None where a seed does not come to that KL at the largest strength. p is of the bootstrap: twice
    the share of draws on the other side of zero.
    """
    items = items[items["metric"].isin(["kl", *AT_ZERO]) & ~items["label"].str.match("step|KL")]
    drawn = _drawn(items)
    groups = dict(list(items.groupby(["variant", "noise"], sort=False)))
    curves = {
        key: {name: _means(part, drawn[name]) for name, part in group.groupby("metric")}
        for key, group in groups.items()
    }
    seeds = {key: sorted(group["seed"].unique().tolist()) for key, group in groups.items()}
    made = []
    for (variant, noise), group in groups.items():
        about = group[["variant", "method", "changes", "noise"]].to_dict("records")[0]
        own = (variant, noise)
        for kl in kls:
            figures = _at(kl, curves[own])
            shown = figures and {name: _interval(drawn)[:3] for name, drawn in figures.items()}
            row = {**about, "kl": kl, "seeds": seeds[own], "figures": shown}
            for field, reference in REFERENCES.items():
                other, row[field] = (reference, noise), None
                common = [seed for seed in seeds.get(other, []) if seed in seeds[own]]
                theirs = _at(kl, curves[other]) if common and variant != reference else None
                if figures and theirs:
                    at, at_theirs = ([seeds[key].index(s) for s in common] for key in (own, other))
                    row[field] = {
                        name: _interval(theirs[name][:, at_theirs] - figures[name][:, at])
                        for name in AT_ZERO
                    }
            made.append(row)
    return made


def _drawn(items: pd.DataFrame) -> dict[str, Matrix]:
    """How often each item of a metric is drawn, [draws, n]; draw 0 is the data itself.

    The items are the same in all runs: pairs, and conversations.
    """
    rng = np.random.default_rng(0)
    groups = dict(items.groupby("metric")["groups"].first())
    pairs, conversations = (
        np.concatenate([np.ones((1, len(of))), stats.bootstrap_counts(rng, len(of), groups=of)])
        for of in (groups["gain"], groups["kl"])
    )
    return {name: conversations if name in ("kl", "nll_change") else pairs for name in groups}


def _means(part: pd.DataFrame, drawn: Matrix) -> Matrix:
    """A metric of a variant, [draws, seeds, points]; sums over drawn items are products."""
    values = np.stack([np.stack(list(seed)) for _, seed in part.groupby("seed")["values"]])
    weights = drawn @ part["weights"].iloc[0]
    return np.einsum("spi,di->dsp", values, drawn) / weights[:, None, None]


def _at(kl: float, curve: dict[str, Matrix]) -> dict[str, Matrix] | None:
    """The figures [draws, seeds]; None where a seed does not come to that KL."""
    if not (curve["kl"][0].max(-1) >= kl).all():
        return None
    return {name: read_off(kl, curve["kl"], curve[name], zero) for name, zero in AT_ZERO.items()}


def _interval(drawn: Matrix) -> list[float]:
    """[mean, low, high, p] of [draws, seeds], the data itself first; seeds are drawn here."""
    seeds = drawn.shape[1]
    counts = stats.bootstrap_counts(np.random.default_rng(1), seeds, len(drawn) - 1)
    means = (drawn[1:] * counts).sum(1) / seeds
    below = min((means <= 0).sum(), (means >= 0).sum())
    p = min(1.0, 2 * (1 + int(below)) / (1 + len(means)))
    return [float(drawn[0].mean()), *stats.percentile_interval(means), p]
