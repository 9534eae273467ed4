"""Who draws a token per row (`sampling_problem`), apart from this package."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from benchmarks.peers import why_not
from benchmarks.sampling_problem import Problem, Sampler

_CANNOT = "gives no log-probability; one random stream for the whole batch, no seed per row"


def ranked(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """Probabilities float32 [B, K] and the token ids [B, K] that they are of; None is all in order.

    As plain PyTorch can do it with some care: filters on sorted values, nothing scattered. With
    top-k only k tokens are looked at after `topk`; top-p alone takes one sort. Ties are cut as
    `topk` and `sort` happen to order them.
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


def _eager(problem: Problem) -> Callable[[], Tensor]:
    """By inverse CDF: on a CPU `torch.multinomial` makes an exponential variate for every token,
    which takes several times longer."""

    @torch.no_grad()
    def run() -> Tensor:
        probs, ids = ranked(problem)
        mass = probs.cumsum(-1)
        at = torch.rand(len(mass), 1, device=mass.device) * mass[:, -1:]
        drawn = torch.searchsorted(mass, at, right=True).clamp_(max=mass.shape[-1] - 1)
        return (drawn if ids is None else ids.gather(-1, drawn))[:, 0]

    return run


EAGER = Sampler("eager", _eager, cannot=_CANNOT)


def warpers(
    top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, temperature: float = 1.0
) -> LogitsProcessorList:
    """transformers' own logits processors, in the order in which `generate` applies them."""
    chain = LogitsProcessorList()
    if temperature != 1:
        chain.append(TemperatureLogitsWarper(temperature))
    if top_k > 0:
        chain.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        chain.append(TopPLogitsWarper(top_p))
    if min_p > 0:
        chain.append(MinPLogitsWarper(min_p))
    return chain


def probabilities(problem: Problem) -> Tensor:
    """float32 [B, V], what transformers draws from."""
    ids = torch.empty(problem.q.shape[0], 0, dtype=torch.int64, device=problem.q.device)
    return torch.softmax(warpers(**problem.filters)(ids, problem.composed()), -1)


def _transformers(problem: Problem) -> Callable[[], Tensor]:
    @torch.no_grad()
    def run() -> Tensor:
        return torch.multinomial(probabilities(problem), num_samples=1)[:, 0]

    return run


def _compiled(problem: Problem) -> Callable[[], Tensor]:
    chain = list(warpers(**problem.filters))
    alpha, scale = problem.base_weight, problem.scale

    def draw(base: Tensor | None, q: Tensor) -> Tensor:
        x = q.float()
        if base is not None:
            x = x + alpha * base.float()
        scores = x * scale
        for warper in chain:
            scores = warper(None, scores)
        return torch.multinomial(torch.softmax(scores, -1), num_samples=1)[:, 0]

    compiled = torch.compile(draw, dynamic=False)

    def run() -> Tensor:
        with torch.no_grad():
            return compiled(problem.base, problem.q)

    return run


HF = Sampler("transformers", _transformers, cannot=_CANNOT)
COMPILED = Sampler("compile", _compiled, cannot=_CANNOT)


def _flashinfer(problem: Problem) -> Callable[[], Tensor]:
    """By rejection, without sorting. It takes one tensor, so composing two comes first; where a
    filter needs probabilities, so does the softmax."""
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


def _flashinfer_reason(problem: Problem) -> str:
    if not problem.q.is_cuda:
        return "it has CUDA kernels only"
    return why_not("flashinfer.sampling", "flashinfer")


FLASHINFER = Sampler(
    "FlashInfer",
    _flashinfer,
    _flashinfer_reason,
    cannot="CUDA only; gives no log-probability; cannot compose two tensors; takes probabilities "
    "where filters other than top-k with top-p are on, so a softmax comes first",
)

PEERS = {peer.name: peer for peer in (EAGER, HF, COMPILED, FLASHINFER)}
