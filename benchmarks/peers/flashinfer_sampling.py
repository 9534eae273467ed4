"""FlashInfer's sort-free samplers on the composed logits (CUDA only).

They draw by rejection and give no log-probability. They take one tensor, so composing two comes
first; where a filter needs probabilities, so does the softmax.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import why_not
from benchmarks.sampling_problem import Problem, Sampler


def _reason(problem: Problem) -> str:
    if not problem.q.is_cuda:
        return "it has CUDA kernels only"
    return why_not("flashinfer.sampling", "flashinfer")


def _prepare(problem: Problem) -> Callable[[], Tensor]:
    fi: Any = importlib.import_module("flashinfer.sampling")
    top_k, top_p, min_p = (problem.filters.get(name) for name in ("top_k", "top_p", "min_p"))

    def run() -> Tensor:
        x = problem.composed()
        if min_p:
            masked = fi.top_k_mask_logits(x, top_k) if top_k else x
            probs = torch.softmax(masked, -1)
            probs = fi.top_p_renorm_probs(probs, top_p) if top_p else probs
            return fi.min_p_sampling_from_probs(probs, min_p)
        if top_k and top_p:
            return fi.top_k_top_p_sampling_from_logits(
                x, top_k, top_p, filter_apply_order="top_k_first"
            )
        if top_k:
            return fi.top_k_sampling_from_probs(torch.softmax(x, -1), top_k)
        if top_p:
            return fi.top_p_sampling_from_probs(torch.softmax(x, -1), top_p)
        return fi.sampling_from_logits(x)

    return run


FLASHINFER = Sampler(
    "FlashInfer",
    _prepare,
    _reason,
    cannot="CUDA only; gives no log-probability; cannot compose two tensors; takes probabilities "
    "where filters other than top-k with top-p are on, so a softmax comes first",
)
