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
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

import qadapter
from benchmarks import harness, recording
from benchmarks.logits_problem import (
    Peer,
    Problem,
    Truth,
    gradient_error,
    make_problem,
    solve,
    value_errors,
)
from benchmarks.peers import compiled, eager, ours, quack, trl_chunked

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEFAULTS = {  # rows, vocabulary, pairs
    "cpu": (256, 128256, 4),
    "cuda": (4096, 128256, 8),
    "quick": (16, 1001, 2),
}
OURS = ours.LOGITS
PEERS = {
    peer.name: peer
    for peer in (OURS, compiled.LOGITS, eager.LOGITS, trl_chunked.LOGITS, quack.LOGITS)
}
OPS = ("forward", "backward", "forward+backward", "loss+backward")
CASE = ("dtype", "op")


def function_of(op: str, peer: Peer, problem: Problem) -> Callable[[], Any]:
    leaf = problem.q

    def outputs() -> tuple[torch.Tensor, ...]:
        q_a, value, _, logp = peer.values(problem)
        return q_a, value, logp

    if op == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return peer.values(problem)

        return forward
    if op == "backward":
        graph: list[tuple[torch.Tensor, ...]] = []

        def prepare() -> None:
            graph[:] = [outputs()]
            leaf.grad = None

        def backward() -> None:
            torch.autograd.backward(graph.pop(), tuple(problem.grads))

        return harness.Prepared(prepare, backward)
    if op == "forward+backward":

        def both() -> None:
            leaf.grad = None
            torch.autograd.backward(outputs(), tuple(problem.grads))

        return both

    def loss() -> None:
        leaf.grad = None
        peer.loss(problem).backward()

    return loss


def traffic(op: str, tensor_bytes: int, m: float) -> tuple[int, int]:
    """(bytes read, bytes written) that the operation cannot do without."""
    back = (tensor_bytes * (1 if m == 0 else 2), tensor_bytes)
    if op == "forward":
        return 2 * tensor_bytes, 0
    if op == "backward":
        return back
    return 2 * tensor_bytes + back[0], back[1]


def first_runs(
    names: list[str], op: str, problem: Problem, truth: Truth
) -> tuple[dict[str, Callable[[], Any]], dict[str, dict[str, Any]], dict[str, str]]:
    """Each runs once: the functions, errors and memory of those that could, why others do not."""
    functions: dict[str, Callable[[], Any]] = {}
    known: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    device = problem.q.device.type
    for name in names:
        peer = PEERS[name]
        reason = peer.reason(problem)
        function = function_of(op, peer, problem)
        if not reason:
            try:
                harness.prepare(function)
                result = function()
            except Exception as error:  # a peer that fails must not end the comparison
                if peer is OURS:
                    raise
                reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        if reason:
            missing[name] = reason
            continue
        if op == "forward":
            error = value_errors(truth, result)
        else:
            assert problem.q.grad is not None
            right = truth.of_loss if op == "loss+backward" else truth.grad
            error = {"gradient": gradient_error(problem.q.grad, right)}
        problem.q.grad = result = None
        harness.prepare(function)
        with harness.peak_memory(device) as peak:
            result = function()
        problem.q.grad = result = None
        functions[name] = function
        known[name] = {"error": error, "peak_mib": peak.mebibytes}
    return functions, known, missing


def run_case(
    op: str,
    problem: Problem,
    truth: Truth,
    peaks: harness.Ceilings,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    functions, known, missing = first_runs(options.peers, op, problem, truth)
    reads = {f"read {k}": f for k, f in harness.read_function(problem.base).items()}
    size = problem.base.nbytes
    times = harness.interleaved(
        {**functions, **reads},
        device=options.device,
        rounds=options.rounds,
        seconds=options.seconds,
        least=options.least,
        clock=options.clock,
        cold=2 * size < harness.COLD * harness.cache_bytes(),
    )
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
            "times_ours": times[who].median / times[OURS.name].median,
            "times_ours_best": times[who].best / times[OURS.name].best,
            **known[who],
        }
        for who in functions
    ]
    return rows + [{"who": who, "missing": reason} for who, reason in missing.items()]


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
    backend = options.backend
    made: dict[str, tuple[Problem, Truth]] = {}
    cases = [{"dtype": d, "op": op} for d, op in itertools.product(options.dtype, options.op)]
    with qadapter.use_backend(backend) if backend else nullcontext():
        for case in recorded.todo(cases):
            dtype, op = case["dtype"], case["op"]
            if dtype not in made:
                made.clear()
                problem = make_problem(
                    options.n, options.v, DTYPES[dtype], options.device, alphas, options.pairs
                )
                made[dtype] = problem, solve(problem)
            rows = run_case(op, *made[dtype], peaks, options)
            recorded.put(case, rows, show(rows))
    return recorded


def show(rows: list[dict[str, Any]]) -> str:
    header = ["who", "median (p20-p80) ms", "best", "GB/s", "of ceiling", "x ours: median", "best"]
    header += ["MiB", "error"]
    lines = [
        [
            row["who"],
            f"{row['ms'].median:.2f} ({row['ms'].p20:.2f}-{row['ms'].p80:.2f})",
            f"{row['ms'].best:.2f}",
            f"{row['gb_s']:.1f}",
            f"{row['share_of_ceiling']:.0%}",
            f"{row['times_ours']:.2f}",
            f"{row['times_ours_best']:.2f}",
            f"{row['peak_mib']:.0f}",
            ", ".join(f"{name} {value:.1e}" for name, value in row["error"].items()),
        ]
        for row in rows
        if "missing" not in row
    ]
    missing = [f"{row['who']}: {row['missing']}" for row in rows if "missing" in row]
    return "\n".join([harness.table(header, lines), *missing])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, help="rows, a multiple of 2 * pairs")
    parser.add_argument("--v", type=int, help="vocabulary")
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--backend", help="of ours; default: what is picked by itself")
    parser.add_argument("--alpha-0", type=float, default=1.0)
    parser.add_argument("--alpha-tilde", type=float, default=1.0)
    parser.add_argument("--center", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=15, help="samples at most")
    parser.add_argument("--least", type=int, default=3, help="samples at least")
    parser.add_argument("--seconds", type=float, default=60.0, help="per case, past --least")
    parser.add_argument("--clock", choices=harness.CLOCKS, default="wall")
    recording.shared_options(parser, "logits")
    options = parser.parse_args(arguments)
    defaults = DEFAULTS["quick" if options.quick else options.device]
    for name, value in zip(("n", "v", "pairs"), defaults, strict=True):
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.quick:
        options.rounds = options.least = 1
    if OURS.name not in options.peers:
        options.peers.insert(0, OURS.name)
    recording.finish_options(options)
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    run(options)


if __name__ == "__main__":
    main()
