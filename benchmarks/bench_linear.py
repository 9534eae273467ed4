"""The loss from hidden states, whose logits need not exist, against everyone who has such a thing.

    python -m benchmarks.bench_linear [--device cpu|cuda] [--quick] [--json PATH]

One case is a dtype, a size of hidden state and vocabulary, and a mode (`linear_problem.MODES`). In
a case all competitors take turns in one process, forward and backward of the same loss, on --n rows
of 2 * --pairs sequences. Beside them runs the yardstick, "products": the two or three matrix
products of this mode and nothing else, bare torch.mm of all rows at once into memory that is there
already (on a GPU with float32 logits).
GFLOP/s counts 2 N D V for each of those products, whatever a competitor does beyond them; "of
ceiling" is that over the GEMM ceiling of the run. Memory is what a step adds at its peak, the
gradient of the hidden states included.

Errors are against float64 from the same inputs, without any merging: of the gradient relative per
row, of r = q - value and value absolute, per token and on sums of 512 tokens.

The peers that are not installed, or cannot do a case, are listed with the reason. To have them all:
pip install --no-deps liger-kernel cut-cross-entropy trl quack-kernels
"""

import argparse
import gc
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import bench, harness, linear_problem, recording
from benchmarks.bench import DTYPES
from benchmarks.linear_problem import MODES, Problem, Truth
from benchmarks.peers import Peer
from benchmarks.peers.linear import CANNOT, OURS, PEERS
from benchmarks.tables import Row
from qadapter.ops import backends

SIZES = ["576x49152", "576x128256", "2048x49152", "2048x128256"]
OPTIONS: bench.Options = {
    "n": (1024, 8192, 64),
    "pairs": (4, 8, 2),
    "size": (SIZES, [*SIZES, "4096x128256"], ["64x1000", "96x2051"]),
    "dtype": (["fp32", "bf16"], ["bf16"], ["fp32", "bf16"]),
    "mode": list(MODES),
    "peers": list(PEERS),
    "backend": str,
    **bench.timing(rounds=11, seconds=40.0),
}
CHOICES = {"dtype": DTYPES, "mode": MODES, "peers": PEERS}
CASE = ("dtype", "d", "v", "mode")
YARDSTICK = "products"
SETTLE_MS = 500.0  # a function that takes longer is not run once untimed before every sample


def bare_products(problem: Problem) -> Callable[[], Any]:
    """The matrix products of the mode and nothing else."""
    weight, hidden = problem.weight, problem.q_hidden.detach()
    shape = (hidden.shape[0], weight.shape[0])
    wide = weight.device.type == "cuda" and weight.dtype != torch.float32
    logits = torch.empty(shape, dtype=torch.float32 if wide else weight.dtype, device=weight.device)
    p = torch.rand(shape, dtype=weight.dtype, device=weight.device)
    u = torch.empty_like(hidden)
    streams = (hidden,) if problem.mode.cached else (problem.base_hidden, hidden)

    def run() -> None:
        for stream in streams:
            if wide:
                torch.ops.aten.mm.dtype_out(stream, weight.T, torch.float32, out=logits)
            else:
                torch.mm(stream, weight.T, out=logits)
        torch.mm(p, weight, out=u)

    return run


def step(peer: Peer, problem: Problem) -> Callable[[], Any]:
    def run() -> None:
        problem.q_hidden.grad = None
        peer.loss(problem).backward()

    return run


def accuracy(peer: Peer, problem: Problem, truth: Truth) -> dict[str, Any]:
    """Errors of the gradient that a step has just left, and of the values."""
    assert problem.q_hidden.grad is not None
    with torch.no_grad():
        values = peer.values(problem) if peer.values else ()
    return linear_problem.errors(truth, problem.q_hidden.grad, *values)


def _clear(problem: Problem) -> None:
    problem.q_hidden.grad = None
    gc.collect()
    if problem.weight.device.type == "cuda":
        torch.cuda.empty_cache()


def run_case(
    names: list[str], problem: Problem, truth: Truth | None, options: argparse.Namespace
) -> list[Row]:
    torch._dynamo.reset()
    names = list(dict.fromkeys([OURS.name, *names]))  # others are compared to it
    steps = {name: step(PEERS[name], problem) for name in names}

    def first(name: str) -> Row:
        try:
            steps[name]()
            return {"error": accuracy(PEERS[name], problem, truth)} if truth else {}
        finally:
            _clear(problem)

    known, missing = bench.first_runs(
        names, first, ours=(OURS.name,), reason=lambda name: PEERS[name].reason(problem)
    )
    for name, row in known.items():
        _clear(problem)
        with harness.peak_memory(options.device) as memory:  # with the gradient that is left
            steps[name]()
        row["peak_mib"] = memory.mebibytes
    functions = {**{name: steps[name] for name in known}, YARDSTICK: bare_products(problem)}
    size, own = problem.weight.nbytes, OURS.name
    times = bench.timed(functions, options, size, own, warmup=0, settle_ms=SETTLE_MS)
    dtype = str(problem.weight.dtype).removeprefix("torch.")
    ceiling = recording.ceilings(options).gemm_tflop_s.get(dtype)
    n, d, v = *problem.q_hidden.shape, problem.weight.shape[0]
    rows = []
    for name, timing in times.items():
        gflop_s = 2 * n * d * v * problem.mode.products / timing.median / 1e6
        rows.append(
            {
                "who": name,
                "ms": timing,
                "gflop_s": gflop_s,
                **({"share_of_ceiling": gflop_s / 1e3 / ceiling} if ceiling else {}),
                **bench.against(timing, times[YARDSTICK], "products"),
                **bench.against(timing, times[OURS.name]),
                **known.get(name, {}),
            }
        )
    return rows + missing


def backend_of(options: argparse.Namespace) -> str:
    """Which of ours runs."""
    like = torch.empty(0, dtype=DTYPES[options.dtype[0]], device=options.device)
    return backends.serving(like)


def run(options: argparse.Namespace) -> recording.Recording:
    with bench.backend(options.backend):
        recorded = recording.Recording(
            "linear",
            options,
            CASE,
            shape={"n": options.n, "pairs": options.pairs},
            modes=MODES,
            backend=backend_of(options),
            cannot=CANNOT,
        )
        recording.ceilings(options)
        sizes = [tuple(map(int, size.split("x"))) for size in options.size]
        cases = [
            {"dtype": dtype, "d": d, "v": v, "mode": mode}
            for dtype in options.dtype
            for d, v in sizes
            for mode in options.mode
        ]
        solved: dict[tuple[Any, ...], Truth] = {}
        for case in recorded.todo(cases):
            dtype, d, v, mode = case["dtype"], case["d"], case["v"], MODES[case["mode"]]
            problem = linear_problem.make_problem(
                options.n, d, v, DTYPES[dtype], options.device, mode, options.pairs
            )
            # The modes of one size share what their compositions have in common.
            key = (dtype, d, v, *mode.composition.values())
            solved = {k: truth for k, truth in solved.items() if k[:3] == key[:3]}
            if key not in solved:
                solved[key] = linear_problem.solve(problem)
            problem = linear_problem.with_cache(problem, solved[key])
            recorded.put(case, run_case(options.peers, problem, solved[key], options))
            del problem
    return recorded


if __name__ == "__main__":
    bench.main(sys.modules[__name__])
