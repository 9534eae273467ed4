"""transformers' own logits processors, softmax and torch.multinomial; and the same compiled."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from benchmarks.sampling_problem import Problem, Sampler


def warpers(
    top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, temperature: float = 1.0
) -> LogitsProcessorList:
    """In the order in which `generate` applies them."""
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
    """float32 [B, V], what is drawn from."""
    ids = torch.empty(problem.q.shape[0], 0, dtype=torch.int64, device=problem.q.device)
    return torch.softmax(warpers(**problem.filters)(ids, problem.composed()), -1)


def _prepare(problem: Problem) -> Callable[[], Tensor]:
    @torch.no_grad()
    def run() -> Tensor:
        return torch.multinomial(probabilities(problem), num_samples=1)[:, 0]

    return run


def _prepare_compiled(problem: Problem) -> Callable[[], Tensor]:
    chain = list(warpers(**problem.filters))
    alpha, scale = problem.composition.base_weight, problem.composition.scale

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


_CANNOT = "gives no log-probability; one random stream for the whole batch, no seed per row"
HF = Sampler("transformers", _prepare, cannot=_CANNOT)
COMPILED = Sampler("compile", _prepare_compiled, cannot=_CANNOT)
