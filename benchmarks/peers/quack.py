"""QuACK's CuTe kernels: cross-entropy of logits, and a product with the head followed by it.

Both give -log pi(a) of every row; one call per stream. From logits the value is composed of that
and a gather, as no log-sum-exp with a gradient comes out. The chunked product with the head gives a
mean over rows only, so here the one that keeps the logits is called, which gives every row.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from benchmarks import linear_problem, logits_problem
from benchmarks.peers import why_not


def _reason(tensor: Tensor) -> str:
    if not tensor.is_cuda:
        return "it has CUDA kernels only"
    reason = why_not("quack.cross_entropy", "quack-kernels")
    if not reason and torch.cuda.get_device_capability() < (9, 0):
        return "its kernels are for compute capability 9.0 and later"
    return reason


def _logps(logits: Tensor, actions: Tensor) -> Tensor:
    function: Any = importlib.import_module("quack.cross_entropy").cross_entropy
    return -function(logits, actions, reduction="none")


def _linear_logps(problem: linear_problem.Problem, hidden: Tensor) -> Tensor:
    module: Any = importlib.import_module("quack.linear_cross_entropy")
    weight, actions = problem.weight, problem.actions
    nll = module.linear_cross_entropy_func(hidden, weight, None, actions, reduction="none")
    return -nll.float()


LOGITS = logits_problem.peer_of_logps(
    "QuACK",
    _logps,
    reason=lambda problem: _reason(problem.q),
    cannot="runs on a GPU of compute capability 9.0 or later only; gives the log-probability of "
    "the action only: the value is composed of it and a gather",
)
LINEAR = linear_problem.peer_of_logps(
    "QuACK",
    _linear_logps,
    reason=lambda problem: _reason(problem.weight),
    cannot="runs on a GPU of compute capability 9.0 or later only; keeps 16-bit logits where every "
    "row is wanted, as its chunked version gives their mean only",
)
