"""Cut Cross-Entropy: -log pi(a) of every row, one call per stream, logits in registers only.

On a GPU its Triton kernel: it takes the product with the head again in backward, one more than the
logits need, and by default skips blocks of a gradient that are small. "CCE exact" skips nothing.
On a CPU the package offers torch.compile of the logits instead.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from benchmarks.linear_problem import Peer, Problem, peer_of_logps
from benchmarks.peers import why_not


def _reason(problem: Problem) -> str:
    reason = why_not("cut_cross_entropy", "cut-cross-entropy")
    if not reason and problem.weight.is_cuda and problem.weight.dtype == torch.float32:
        return "its backward takes 16-bit hidden states only"
    return reason


def _exact_reason(problem: Problem) -> str:
    return _reason(problem) if problem.weight.is_cuda else "on a CPU the same as CCE"


def _peer(name: str, filter_eps: str | None, reason: Any) -> Peer:
    def logps(problem: Problem, hidden: Tensor) -> Tensor:
        function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
        options: dict[str, Any] = {"impl": "torch_compile"}
        if problem.weight.is_cuda:
            options = {"impl": "cce", "filter_eps": filter_eps}
        nll = function(hidden, problem.weight, problem.actions, reduction="none", **options)
        return -nll.float()

    return peer_of_logps(
        name,
        logps,
        reason=reason,
        products=lambda problem: problem.mode.products + problem.weight.is_cuda,
        cannot="gives no log-sum-exp and no value (25.1.1 has no `return_lse`), so a composition "
        "with alpha_tilde other than 1 is out of reach; takes the product with the head again in "
        "backward; on a CPU it is torch.compile of the logits",
    )


LINEAR = _peer("CCE", "high", _reason)
EXACT = _peer("CCE exact", None, _exact_reason)
