"""Runs C++ kernels on fixed inputs, one thread, for a tool that counts instructions around it.

python -m benchmarks.instruction_driver [--case "residual_fwd fp32"] [--repeat 2]
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch

import qadapter
from qadapter import functional as QF
from qadapter.ops import cpp, few_rows

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
    return lambda: few_rows.lora_add_(out, x, a, b, 2.0, 0, 4)


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


KERNELS = (residual_fwd, residual_bwd, linear_fwd, rows_linear, lora_add_, sample)
CASES: dict[str, tuple[Callable[[torch.dtype], Callable[[], Any]], str]] = {
    **{f"{k.__name__} {name}": (k, name) for k in KERNELS for name in DTYPES},
    "preference_fwd fp32": (preference_fwd, "fp32"),
}


def elements(case: str) -> tuple[int, str]:
    """What a count is given per."""
    head = {"linear_fwd": 2 * N * D * (V // 4), "rows_linear": 4 * D * (V // 4)}
    kernel = case.split()[0]
    if kernel in head:
        return head[kernel], "multiplication"
    if kernel == "lora_add_":
        return 2 * 4 * 8 * 4 * D, "multiplication"
    if kernel == "preference_fwd":
        return 128 * PAIRS, "row"
    return N * V, "column"


def run(cases: list[str], repeat: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for case in cases:
        kernel, dtype = CASES[case]
        function = kernel(DTYPES[dtype])
        for _ in range(repeat):
            function()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeat", type=int, default=2)
    options = parser.parse_args()
    if not cpp.available()[0]:
        raise SystemExit(cpp.available()[1])
    with qadapter.use_backend("cpp"):
        run(options.case, options.repeat)
    print(f"capability {cpp.capability()}", flush=True)


if __name__ == "__main__":
    main()
