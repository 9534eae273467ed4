"""What samplers are compared on: logits, how they are composed, and which filters are on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HEAD = 40  # tokens that stand out of a peaked row


STREAMS = {
    # alpha_tilde keeps the blend about as peaked as each of its streams
    "two": {"alpha_0": 0.5, "alpha_tilde": 1.5, "center": 0.0},
    "one": {"alpha_0": 1.0, "alpha_tilde": 1.0, "center": 1.0},  # the base cancels
}
FILTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "top-k": {"top_k": 50},
    "top-p": {"top_p": 0.9},
    "top-k, top-p": {"top_k": 50, "top_p": 0.9},
    "top-k, top-p, min-p": {"top_k": 50, "top_p": 0.9, "min_p": 0.05},
}


@dataclass(frozen=True)
class Problem:
    """base [B, V] or None, q [B, V], seeds and positions int64 [B].

    What is drawn from is scale * (q + base_weight * base), filtered.
    """

    base: Tensor | None
    q: Tensor
    composition: dict[str, float]
    filters: dict[str, Any]
    seed: Tensor
    position: Tensor

    @property
    def scale(self) -> float:
        return 1 / self.composition["alpha_tilde"]

    @property
    def base_weight(self) -> float:
        return self.composition["alpha_0"] - self.composition["center"]

    @property
    def arguments(self) -> dict[str, Any]:
        """Of `QF.sample`, the logits apart."""
        return {**self.composition, **self.filters, "seed": self.seed, "position": self.position}

    def composed(self) -> Tensor:
        """float32 [B, V], as cheap as plain PyTorch has it."""
        x = self.q.float()
        if self.base is not None:
            x = torch.add(x, self.base.float(), alpha=self.base_weight)
        return x if self.scale == 1 else x * self.scale


@dataclass(frozen=True)
class Sampler:
    """A competitor. ``prepare`` gives the function to time, which returns token ids [B]."""

    name: str
    prepare: Callable[[Problem], Callable[[], Tensor]]
    reason: Callable[[Problem], str] = lambda _: ""  # why it cannot run this; empty: it can
    cannot: str = ""


def peaked(batch: int, vocab: int, generator: torch.Generator, device: str) -> Tensor:
    """Rows as language models give them: a head that falls off over a normal bulk.

    The bulk has a standard deviation of 2. The head's tokens lie anywhere; that of rank r is
    -1.5 log(r) below the first, and the first is so high that the head holds between about a half
    and nearly all of the mass, by the row (some rows are sure, others are not).
    """
    z = torch.randn(batch, vocab, device=device, generator=generator).mul_(2)
    head = min(HEAD, vocab)
    at = torch.rand(batch, vocab, device=device, generator=generator).topk(head).indices
    bulk = torch.tensor(float(vocab)).log().item() + 2  # log of the sum of exp over the bulk
    first = bulk + torch.linspace(-1, 4, batch, device=device)[:, None]
    ranks = torch.arange(1, head + 1, device=device, dtype=torch.float32)
    return z.scatter_(1, at, first - 1.5 * ranks.log())


def flat(batch: int, vocab: int, generator: torch.Generator, device: str) -> Tensor:
    """Standard normal rows: the smallest set with mass 0.9 is most of the vocabulary."""
    return torch.randn(batch, vocab, device=device, generator=generator)


LOGITS = {"peaked": peaked, "flat": flat}


def make_problem(
    batch: int,
    vocab: int,
    dtype: torch.dtype,
    device: str,
    streams: str,
    logits: str,
    filters: str = "plain",
) -> Problem:
    generator = torch.Generator(device=device).manual_seed(0)
    base = LOGITS[logits](batch, vocab, generator, device)
    q = base + torch.randn(batch, vocab, device=device, generator=generator).mul_(0.3)
    return Problem(
        base=base.to(dtype) if streams == "two" else None,
        q=q.to(dtype),
        composition=STREAMS[streams],
        filters=FILTERS[filters],
        seed=torch.arange(batch, device=device),
        position=torch.full((batch,), 7, device=device),
    )
