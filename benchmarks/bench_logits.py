"""Values and losses from materialised logits, against whoever has such a thing.

    python -m benchmarks.bench_logits [--n 256 --v 128256 --dtype fp32 bf16 --threads 2 --json PATH]

Bytes are those that must move: forward one read of both logits, backward a read of what x needs
and one write; what a peer moves beyond that counts against it. "Of ceiling" is the time that the
reads would take at the best read bandwidth seen, plus the writes at half the copy bandwidth, over
the median time. Inputs that would stay in the cache are driven out of it before every call.

Errors are against float64 from the same inputs: of the forward the largest of any value, of all
others the worst row's of the gradient, relative. --alphas are alpha_0, alpha_tilde and center.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import bench, harness, logits_problem, recording
from benchmarks.bench import DTYPES
from benchmarks.logits_problem import Problem, Truth
from benchmarks.peers import Peer
from benchmarks.peers.logits import OURS, PEERS
from benchmarks.tables import Row

OPS = ("forward", "backward", "forward+backward", "loss+backward")
OPTIONS: bench.Options = {
    "n": (256, 8192, 16),
    "v": (128256, 128256, 1001),
    "pairs": (4, 8, 2),
    "alphas": [1.0, 1.0, 1.0],
    "dtype": ["fp32", "bf16"],
    "op": list(OPS),
    "peers": list(PEERS),
    "backend": str,
    **bench.timing(rounds=15, seconds=60.0),
}
CHOICES = {"dtype": DTYPES, "op": OPS, "peers": PEERS}
CASE = ("dtype", "op")


def functions_of(
    op: str, peer: Peer, problem: Problem
) -> tuple[Callable[[], Any], Callable[[], None]]:
    """What to time, and what to do before it, which is not timed."""
    graph: list[tuple[torch.Tensor, ...]] = []

    def prepare() -> None:
        problem.q.grad = None
        if op == "backward":
            graph[:] = [outputs()]

    def outputs() -> tuple[torch.Tensor, ...]:
        q_a, value, _, logp = peer.values(problem)
        return q_a, value, logp

    def forward() -> Any:
        with torch.no_grad():
            return peer.values(problem)

    def backward() -> None:
        torch.autograd.backward(graph.pop(), tuple(problem.grads))

    def both() -> None:
        problem.q.grad = None
        torch.autograd.backward(outputs(), tuple(problem.grads))

    def loss() -> None:
        problem.q.grad = None
        peer.loss(problem).backward()

    return dict(zip(OPS, (forward, backward, both, loss), strict=True))[op], prepare


def traffic(op: str, tensor_bytes: int, m: float) -> tuple[int, int]:
    """(bytes read, bytes written) that the operation cannot do without."""
    back = (tensor_bytes * (1 if m == 0 else 2), tensor_bytes)
    if op == "forward":
        return 2 * tensor_bytes, 0
    if op == "backward":
        return back
    return 2 * tensor_bytes + back[0], back[1]


def errors(op: str, result: Any, problem: Problem, truth: Truth) -> dict[str, float]:
    """Of the values that a function gave, or of the gradient that it left."""
    if op == "forward":
        return logits_problem.value_errors(truth, result)
    assert problem.q.grad is not None
    right = truth.of_loss if op == "loss+backward" else truth.grad
    return {"gradient": logits_problem.gradient_error(problem.q.grad, right)}


def run_case(op: str, problem: Problem, truth: Truth, options: argparse.Namespace) -> list[Row]:
    names = list(dict.fromkeys([OURS.name, *options.peers]))  # others are compared to it
    made = {name: functions_of(op, PEERS[name], problem) for name in names}

    def first(name: str) -> Row:
        function, before = made[name]
        before()
        error = errors(op, function(), problem, truth)
        problem.q.grad = None
        before()
        with harness.peak_memory(options.device) as peak:
            function()
        problem.q.grad = None
        return {"error": error, "peak_mib": peak.mebibytes}

    known, missing = bench.first_runs(
        names, first, ours=(OURS.name,), reason=lambda name: PEERS[name].reason(problem)
    )
    reads = {f"read {k}": f for k, f in harness.read_function(problem.base).items()}
    size = problem.base.nbytes
    functions = {name: made[name][0] for name in known}
    before = {name: made[name][1] for name in known} if op == "backward" else {}
    times = bench.timed({**functions, **reads}, options, 2 * size, OURS.name, before)
    read_gb_s = size / min(times[k].best for k in reads) / 1e6
    read, written = traffic(op, size, problem.m)
    copy_gb_s = recording.ceilings(options).copy_gb_s
    floor = (read / read_gb_s + written / (copy_gb_s / 2)) / 1e6
    rows = [
        {
            "who": who,
            "ms": times[who],
            "gb_s": (read + written) / times[who].median / 1e6,
            "read_gb_s": read_gb_s,
            "share_of_ceiling": floor / times[who].median,
            **bench.against(times[who], times[OURS.name]),
            **found,
        }
        for who, found in known.items()
    ]
    return rows + missing


def run(options: argparse.Namespace) -> recording.Recording:
    n, v, alphas, pairs = options.n, options.v, options.alphas, options.pairs
    recorded = recording.Recording(
        "logits",
        options,
        CASE,
        shape={"n": n, "v": v, "alphas": alphas, "pairs": pairs},
        cannot={peer.name: peer.cannot for peer in PEERS.values() if peer.cannot},
    )
    recording.ceilings(options)
    made: dict[str, tuple[Problem, Truth]] = {}
    with bench.backend(options.backend):
        for case in recorded.todo(bench.grid(dtype=options.dtype, op=options.op)):
            dtype, op = case["dtype"], case["op"]
            if dtype not in made:
                made.clear()
                problem = logits_problem.make_problem(
                    n, v, DTYPES[dtype], options.device, alphas, pairs
                )
                made[dtype] = problem, logits_problem.solve(problem)
            recorded.put(case, run_case(op, *made[dtype], options))
    return recorded


if __name__ == "__main__":
    bench.main(sys.modules[__name__])
