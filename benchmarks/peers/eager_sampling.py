"""Sampling as plain PyTorch can do it with some care: filters on sorted values, nothing scattered.

With top-k only k tokens are looked at after `topk`; top-p alone takes one sort. What is drawn from
is over ranks, and the rank's token id is gathered. The draw is by inverse CDF: on a CPU
`torch.multinomial` makes an exponential variate for every token, which takes several times longer.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.sampling_problem import Problem, Sampler


def ranked(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """Probabilities float32 [B, K] and the token ids [B, K] that they are of; None is all in order.

    Ties are cut as `topk` and `sort` happen to order them.
    """
    top_k, top_p, min_p = (problem.filters.get(name) for name in ("top_k", "top_p", "min_p"))
    x = problem.composed()
    if not (top_k or top_p or min_p):
        return torch.softmax(x, -1), None
    if top_k:
        x, ids = x.topk(min(top_k, x.shape[-1]), -1)
    else:
        x, ids = x.sort(-1, descending=True)
    probs = torch.softmax(x, -1)
    if top_p:
        before = probs.cumsum(-1) - probs
        probs = probs.masked_fill_(before >= top_p, 0.0)
    if min_p:
        probs = probs.masked_fill_(probs < min_p * probs[:, :1], 0.0)
    return probs / probs.sum(-1, keepdim=True), ids


def _prepare(problem: Problem) -> Callable[[], Tensor]:
    @torch.no_grad()
    def run() -> Tensor:
        probs, ids = ranked(problem)
        mass = probs.cumsum(-1)
        at = torch.rand(len(mass), 1, device=mass.device) * mass[:, -1:]
        drawn = torch.searchsorted(mass, at, right=True).clamp_(max=mass.shape[-1] - 1)
        return (drawn if ids is None else ids.gather(-1, drawn))[:, 0]

    return run


EAGER = Sampler(
    "eager",
    _prepare,
    cannot="gives no log-probability; one random stream for the whole batch, no seed per row",
)
