"""Cut Cross-Entropy: -log pi(a) of every row, one call per stream, logits in registers only.

On a GPU its Triton kernel: it takes the product with the head again in backward, one more than the
logits need, and by default skips blocks of a gradient that are small. "CCE exact" skips nothing.
On a CPU the package offers torch.compile of the logits instead.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.linear_problem import Peer, Problem, pair_loss, rewards_from_logps


def _reason(problem: Problem) -> str:
    try:
        importlib.import_module("cut_cross_entropy")
    except Exception as error:  # not installed, or for another version of something
        return f"cut-cross-entropy cannot be imported ({type(error).__name__}: {error})"
    if problem.weight.device.type == "cpu":
        return ""
    if problem.weight.dtype == torch.float32:
        return "its backward takes 16-bit hidden states only"
    return ""


def _rewards(filter_eps: str | None) -> Callable[[Problem], Tensor]:
    def rewards(problem: Problem) -> Tensor:
        function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
        triton = problem.weight.device.type == "cuda"
        options: dict[str, Any] = {"impl": "torch_compile"}
        if triton:
            options = {"impl": "cce", "filter_eps": filter_eps}

        def logps(hidden: Tensor) -> Tensor:
            nll = function(hidden, problem.weight, problem.actions, reduction="none", **options)
            return -nll.float()

        return rewards_from_logps(problem, logps)

    return rewards


def _exact_reason(problem: Problem) -> str:
    if problem.weight.device.type == "cpu":
        return "on a CPU the same as CCE"
    return _reason(problem)


def _peer(name: str, filter_eps: str | None, reason: Callable[[Problem], str]) -> Peer:
    rewards = _rewards(filter_eps)
    return Peer(
        name,
        loss=lambda problem: pair_loss(rewards(problem), problem.pairs),
        rewards=rewards,
        reason=reason,
        products=lambda problem: problem.mode.products + (problem.weight.device.type == "cuda"),
        cannot="gives no log-sum-exp and no value (25.1.1 has no `return_lse`), so a composition "
        "with alpha_tilde other than 1 is out of reach; takes the product with the head again in "
        "backward; on a CPU it is torch.compile of the logits",
    )


LINEAR = _peer("CCE", "high", _reason)
EXACT = _peer("CCE exact", None, _exact_reason)
