"""The strength at which a policy keeps a KL budget, found on KL that was measured per text."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = 4.0
RESAMPLES = 2000
PRECISION = 0.01


class Kept(NamedTuple):
    """A strength, and KL there: its mean and the upper end of its 95 % interval, nats a token."""

    strength: float
    kl: float
    upper: float


def mean_and_interval(sums: Tensor, counts: Tensor) -> tuple[float, float, float]:
    """Mean per token of sums [n] over ``counts`` tokens, and the lower and the upper end of its
    95 % interval by bootstrap over the n texts."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(sums), (RESAMPLES, len(sums)), generator=generator)
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    mean = float(sums.sum() / counts.sum())
    return mean, float(means.quantile(0.025)), float(means.quantile(0.975))


def mean_and_upper(sums: Tensor, counts: Tensor) -> tuple[float, float]:
    """The same without the lower end."""
    mean, _, upper = mean_and_interval(sums, counts)
    return mean, upper


def within_budget(
    kl: Callable[[float], Tensor], counts: Tensor, budget: float, largest: float = LARGEST
) -> Kept:
    """The largest strength whose KL is within ``budget`` at the upper end of its interval.

    Args:
        kl: of a strength above 0: float64 [n], summed over the states of each text.
        counts: int64 [n], how many these are.
        budget: nats a token.
        largest: no strength above this is tried.
    """

    def at(s: float) -> Kept:
        return Kept(s, *mean_and_upper(kl(s), counts))

    best, low, high = Kept(0.0, 0.0, 0.0), 0.0, largest
    tried = at(1.0)
    if tried.upper <= budget:
        best, low = tried, 1.0
        tried = at(high)
        if tried.upper <= budget:
            return tried
    else:
        high = 1.0
    while high - low > PRECISION * high:
        tried = at((low + high) / 2)
        if tried.upper <= budget:
            best, low = tried, tried.strength
        else:
            high = tried.strength
    return best
