"""Runs C++ kernels on fixed inputs, one thread, for a tool that counts instructions around it.

python -m benchmarks.instruction_driver "residual_fwd fp32" ...
"""

import sys
from collections.abc import Callable
from typing import Any

import torch

import qadapter
from qadapter import functional as QF
from qadapter.ops import few_rows, low_rank

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
N, V, D = 32, 16384, 256  # of the logits; the head's vocabulary is a quarter of V
PAIRS = 4


def _logits(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    base = torch.randn(N, V).mul_(3)
    q = base + torch.randn(N, V).mul_(0.3)
    return base.to(dtype), q.to(dtype).requires_grad_(), torch.randint(0, V, (N,))


def residual_fwd(dtype: torch.dtype) -> Callable[[], Any]:
    base, q, actions = _logits(dtype)
    return lambda: QF.residual_values(base, q.detach(), actions)


def residual_bwd(dtype: torch.dtype) -> Callable[[], Any]:
    base, q, actions = _logits(dtype)
    return lambda: QF.residual_values(base, q, actions).value.sum().backward()


def linear_fwd(dtype: torch.dtype) -> Callable[[], Any]:
    base, q = torch.randn(2, N, D).to(dtype)
    weight = torch.randn(V // 4, D).div_(D**0.5).to(dtype)
    actions = torch.randint(0, V // 4, (N,))
    hidden = q.requires_grad_()
    return lambda: QF.linear_residual_values(base, hidden, weight, actions)


def rows_linear(dtype: torch.dtype) -> Callable[[], Any]:
    x, weight = torch.randn(4, D).to(dtype), torch.randn(V // 4, D).to(dtype)
    return lambda: few_rows.rows_linear(x, weight)


def lora_add_(dtype: torch.dtype) -> Callable[[], Any]:
    out, x = torch.zeros(8, 4 * D).to(dtype), torch.randn(8, 4 * D).to(dtype)
    a, b = torch.randn(8, 4 * D).to(dtype), torch.randn(4 * D, 8).to(dtype)
    return lambda: low_rank.lora_add_(out, x, a, b, 2.0, 0, 4)


def sample(dtype: torch.dtype) -> Callable[[], Any]:
    base, q, _ = _logits(dtype)
    seed, filters = torch.arange(N), {"top_k": 50, "top_p": 0.9}
    arguments = {"alpha_0": 0.5, "alpha_tilde": 1.5, "center": 0.0, "position": seed, **filters}
    return lambda: QF.sample(base, q.detach(), seed=seed, **arguments)


def preference_fwd(_: torch.dtype) -> Callable[[], Any]:
    rows = 128 * PAIRS
    columns = [torch.randn(rows) for _ in range(5)]
    values = qadapter.outputs.ResidualValues(*columns)
    actions = torch.randint(0, V, (rows,))
    ends = torch.arange(2 * PAIRS + 1, dtype=torch.int32) * (rows // (2 * PAIRS))
    return lambda: QF.preference_loss(values, actions, ends)


# Kernel -> what a count is given per: how many, and of what
ELEMENTS: dict[Callable[[torch.dtype], Callable[[], Any]], tuple[int, str]] = {
    residual_fwd: (N * V, "column"),
    residual_bwd: (N * V, "column"),
    linear_fwd: (2 * N * D * (V // 4), "multiplication"),
    rows_linear: (4 * D * (V // 4), "multiplication"),
    lora_add_: (2 * 4 * 8 * 4 * D, "multiplication"),
    sample: (N * V, "column"),
    preference_fwd: (128 * PAIRS, "row"),  # of float32, whatever the dtype
}
CASES = {
    f"{kernel.__name__} {dtype}": (kernel, dtype)
    for kernel in ELEMENTS
    for dtype in (["fp32"] if kernel is preference_fwd else DTYPES)
}


def run(cases: list[str], repeat: int = 2) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with qadapter.use_backend("cpp"):
        for case in cases:
            kernel, dtype = CASES[case]
            function = kernel(DTYPES[dtype])
            for _ in range(repeat):
                function()


if __name__ == "__main__":
    run(sys.argv[1:])
