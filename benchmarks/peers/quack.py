"""QuACK's CuTe kernels: cross-entropy of logits, and a product with the head followed by it.

Both give -log pi(a) of every row; one call per stream. From logits the value is composed of that
and a gather, as no log-sum-exp with a gradient comes out. The chunked product with the head gives a
mean over rows only, so here the one that keeps the logits is called, which gives every row.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from benchmarks import logits_problem
from benchmarks.linear_problem import Peer, Problem, pair_loss, rewards_from_logps
from benchmarks.peers import eager


def _reason(tensor: Tensor) -> str:
    if tensor.device.type != "cuda":
        return "it has CUDA kernels only"
    try:
        importlib.import_module("quack.cross_entropy")
    except Exception as error:  # not installed, or for another version of something
        return f"quack-kernels cannot be imported ({type(error).__name__}: {error})"
    if torch.cuda.get_device_capability() < (9, 0):
        return "its kernels are for compute capability 9.0 and later"
    return ""


def _logps(logits: Tensor, actions: Tensor) -> Tensor:
    function: Any = importlib.import_module("quack.cross_entropy").cross_entropy
    return -function(logits, actions, reduction="none")


def _values(problem: logits_problem.Problem) -> logits_problem.Values:
    return logits_problem.values_from_logps(problem, _logps)


def _loss(problem: logits_problem.Problem) -> Tensor:
    q, value, _, _ = _values(problem)
    return eager.preference_loss(q, value, problem.pairs, **logits_problem.LOSS)


LOGITS = logits_problem.Peer(
    "QuACK",
    values=_values,
    loss=_loss,
    reason=lambda problem: _reason(problem.q),
    cannot="runs on a GPU of compute capability 9.0 or later only; gives the log-probability of "
    "the action only: the value is composed of it and a gather",
)


def _rewards(problem: Problem) -> Tensor:
    module: Any = importlib.import_module("quack.linear_cross_entropy")

    def logps(hidden: Tensor) -> Tensor:
        nll = module.linear_cross_entropy_func(
            hidden, problem.weight, None, problem.actions, reduction="none"
        )
        return -nll.float()

    return rewards_from_logps(problem, logps)


LINEAR = Peer(
    "QuACK",
    loss=lambda problem: pair_loss(_rewards(problem), problem.pairs),
    rewards=_rewards,
    reason=lambda problem: _reason(problem.weight),
    cannot="runs on a GPU of compute capability 9.0 or later only; keeps 16-bit logits where every "
    "row is wanted, as its chunked version gives their mean only",
)
