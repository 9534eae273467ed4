"""Values and losses from materialised logits, against whoever has such a thing.

    python -m benchmarks.bench_logits [--n 256 --v 128256 --dtype fp32 bf16 --threads 2 --json PATH]

Bytes are those that must move: forward one read of both logits, backward a read of what x needs
and one write; what a peer moves beyond that counts against it. "Of ceiling" is the time that the
reads would take at the best read bandwidth seen, plus the writes at half the copy bandwidth, over
the median time. Inputs that would stay in the cache are driven out of it before every call.

Errors are against float64 from the same inputs: of the forward the largest of any value, of all
others the worst row's of the gradient, relative.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import bench, harness, logits_problem, recording
from benchmarks.bench import DTYPES
from benchmarks.logits_problem import Peer, Problem, Truth
from benchmarks.peers import eager, ours, quack, trl_chunked
from benchmarks.tables import Row

DEFAULTS = {
    "cpu": {"n": 256, "v": 128256, "pairs": 4},
    "cuda": {"n": 4096, "v": 128256, "pairs": 8},
    "quick": {"n": 16, "v": 1001, "pairs": 2},
}
OURS = ours.LOGITS
PEERS = {
    peer.name: peer
    for peer in (OURS, eager.COMPILED_LOGITS, eager.LOGITS, trl_chunked.LOGITS, quack.LOGITS)
}
OPS = ("forward", "backward", "forward+backward", "loss+backward")
CASE = ("dtype", "op")


def function_of(op: str, peer: Peer, problem: Problem) -> Callable[[], Any]:
    leaf = problem.q
    graph: list[tuple[torch.Tensor, ...]] = []

    def outputs() -> tuple[torch.Tensor, ...]:
        q_a, value, _, logp = peer.values(problem)
        return q_a, value, logp

    def forward() -> Any:
        with torch.no_grad():
            return peer.values(problem)

    def prepare() -> None:
        graph[:] = [outputs()]
        leaf.grad = None

    def backward() -> None:
        torch.autograd.backward(graph.pop(), tuple(problem.grads))

    def both() -> None:
        leaf.grad = None
        torch.autograd.backward(outputs(), tuple(problem.grads))

    def loss() -> None:
        leaf.grad = None
        peer.loss(problem).backward()

    functions = (forward, harness.Prepared(prepare, backward), both, loss)
    return dict(zip(OPS, functions, strict=True))[op]


def traffic(op: str, tensor_bytes: int, m: float) -> tuple[int, int]:
    """(bytes read, bytes written) that the operation cannot do without."""
    back = (tensor_bytes * (1 if m == 0 else 2), tensor_bytes)
    if op == "forward":
        return 2 * tensor_bytes, 0
    if op == "backward":
        return back
    return 2 * tensor_bytes + back[0], back[1]


def first_run(op: str, function: Callable[[], Any], problem: Problem, truth: Truth) -> Row:
    """Errors and memory."""
    harness.prepare(function)
    result = function()
    if op == "forward":
        error = logits_problem.value_errors(truth, result)
    else:
        assert problem.q.grad is not None
        right = truth.of_loss if op == "loss+backward" else truth.grad
        error = {"gradient": logits_problem.gradient_error(problem.q.grad, right)}
    problem.q.grad = result = None
    harness.prepare(function)
    with harness.peak_memory(problem.q.device.type) as peak:
        result = function()
    problem.q.grad = result = None
    return {"error": error, "peak_mib": peak.mebibytes}


def run_case(
    op: str,
    problem: Problem,
    truth: Truth,
    peaks: harness.Ceilings,
    options: argparse.Namespace,
) -> list[Row]:
    functions = {name: function_of(op, PEERS[name], problem) for name in options.peers}
    known, missing = bench.first_runs(
        options.peers,
        lambda name: first_run(op, functions[name], problem, truth),
        ours=(OURS.name,),
        reason=lambda name: PEERS[name].reason(problem),
    )
    reads = {f"read {k}": f for k, f in harness.read_function(problem.base).items()}
    size = problem.base.nbytes
    times = bench.timed({**{who: functions[who] for who in known}, **reads}, options, 2 * size)
    read_gb_s = size / min(times[k].best for k in reads) / 1e6
    read, written = traffic(op, size, problem.m)
    floor = (read / read_gb_s + written / (peaks.copy_gb_s / 2)) / 1e6
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
    alphas = (options.alpha_0, options.alpha_tilde, options.center)
    recorded = recording.Recording(
        "logits",
        options,
        CASE,
        shape={"n": options.n, "v": options.v, "alphas": alphas, "pairs": options.pairs},
        cannot={peer.name: peer.cannot for peer in PEERS.values() if peer.cannot},
    )
    peaks = recording.ceilings(options)
    made: dict[str, tuple[Problem, Truth]] = {}
    with bench.backend(options.backend):
        for case in recorded.todo(bench.grid(dtype=options.dtype, op=options.op)):
            dtype, op = case["dtype"], case["op"]
            if dtype not in made:
                made.clear()
                problem = logits_problem.make_problem(
                    options.n, options.v, DTYPES[dtype], options.device, alphas, options.pairs
                )
                made[dtype] = problem, logits_problem.solve(problem)
            rows = run_case(op, *made[dtype], peaks, options)
            recorded.put(case, rows, bench.show(rows))
    return recorded


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = bench.parser("logits", __doc__)
    parser.add_argument("--n", type=int, help="rows, a multiple of 2 * pairs")
    parser.add_argument("--v", type=int, help="vocabulary")
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--alpha-0", type=float, default=1.0)
    parser.add_argument("--alpha-tilde", type=float, default=1.0)
    parser.add_argument("--center", type=float, default=1.0)
    bench.peer_options(parser, PEERS)
    bench.timing_options(parser, rounds=15, seconds=60.0)
    return bench.parse(parser, arguments, DEFAULTS, OURS.name)


if __name__ == "__main__":
    bench.main(parse, run)
