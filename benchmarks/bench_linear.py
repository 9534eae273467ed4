"""The loss from hidden states, whose logits need not exist, against everyone who has such a thing.

    python -m benchmarks.bench_linear [--device cpu|cuda] [--quick] [--json PATH]

One case is a dtype, a size of hidden state and vocabulary, and a mode (`linear_problem.MODES`). In
a case all competitors take turns in one process, forward and backward of the same loss. Beside them
runs the yardstick, "products": the two or three matrix products of this mode and nothing else, bare
torch.mm of all rows at once into memory that is there already (on a GPU with float32 logits).
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
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

import qadapter
from benchmarks import harness, recording
from benchmarks.linear_problem import (
    MODES,
    Peer,
    Problem,
    Truth,
    errors,
    make_problem,
    solve,
    with_cache,
)
from benchmarks.peers import cce, compiled, eager, liger, ours, quack, torch_lce, trl_chunked
from qadapter.ops import backends

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = [(576, 49152), (576, 128256), (2048, 49152), (2048, 128256)]
DEFAULTS = {  # rows, pairs, sizes, dtypes
    "cpu": (1024, 4, SIZES, ["fp32", "bf16"]),
    "cuda": (8192, 8, [*SIZES, (4096, 128256)], ["bf16"]),
    "quick": (64, 2, [(64, 1000), (96, 2051)], ["fp32", "bf16"]),
}
SETTLE_MS = 500.0  # a function that takes longer is not run once untimed before every sample


OURS = ours.LINEAR
PEERS = {
    peer.name: peer
    for peer in (
        OURS,
        eager.LINEAR,
        compiled.LINEAR,
        liger.LINEAR,
        torch_lce.LINEAR,
        trl_chunked.LINEAR,
        cce.LINEAR,
        cce.EXACT,
        quack.LINEAR,
    )
}
CANNOT = {peer.name: peer.cannot for peer in PEERS.values() if peer.cannot}
YARDSTICK = "products"


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
    with torch.no_grad():
        values = peer.values(problem) if peer.values else None
        rewards = peer.rewards(problem) if peer.rewards else None
    if values is not None:
        rewards = values[0] - values[1]
    return errors(truth, problem.q_hidden.grad, rewards, values)


def first_runs(
    names: list[str], problem: Problem, truth: Truth | None
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Each runs once (compilers compile): what is known of it then; and why the others do not."""
    report: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    for name in names:
        peer = PEERS[name]
        reason = peer.reason(problem)
        if not reason:
            try:
                step(peer, problem)()
                report[name] = {"error": accuracy(peer, problem, truth)} if truth else {}
            except Exception as error:  # a peer that fails must not end the comparison
                if peer is OURS:
                    raise
                reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        if reason:
            missing[name] = reason
        _clear(problem)
    return report, missing


def _clear(problem: Problem) -> None:
    problem.q_hidden.grad = None
    gc.collect()
    if problem.weight.device.type == "cuda":
        torch.cuda.empty_cache()


def peak(function: Callable[[], Any], problem: Problem, device: str) -> float:
    """Peak memory of a step, the gradient that it leaves included."""
    _clear(problem)
    with harness.peak_memory(device) as memory:
        function()
    return memory.mebibytes


def run_case(
    names: list[str], problem: Problem, truth: Truth | None, options: argparse.Namespace
) -> list[dict[str, Any]]:
    torch._dynamo.reset()
    report, missing = first_runs(names, problem, truth)
    steps = {name: step(PEERS[name], problem) for name in report}
    for name, function in steps.items():
        report[name]["peak_mib"] = peak(function, problem, options.device)
    times = harness.interleaved(
        {**steps, YARDSTICK: bare_products(problem)},
        device=options.device,
        rounds=options.rounds,
        seconds=options.seconds,
        warmup=0,
        least=options.least,
        settle_ms=SETTLE_MS,
        clock=options.clock,
        cold=problem.weight.nbytes < harness.COLD * harness.cache_bytes(),
    )
    dtype = str(problem.weight.dtype).removeprefix("torch.")
    ceiling = recording.ceilings(options).gemm_tflop_s.get(dtype)
    n, d, v = *problem.q_hidden.shape, problem.weight.shape[0]
    products = problem.mode.products
    rows = []
    for name, timing in times.items():
        taken = products if name == YARDSTICK else PEERS[name].products(problem)
        rows.append(
            {
                "who": name,
                "ms": timing,
                "products": taken,
                "gflop_s": (gflop_s := 2 * n * d * v * products / timing.median / 1e6),
                **({"share_of_ceiling": gflop_s / 1e3 / ceiling} if ceiling else {}),
                "times_products": timing.median / times[YARDSTICK].median,
                "times_ours": timing.median / times[OURS.name].median,
                # steadier where other work runs on the machine
                "times_products_best": timing.best / times[YARDSTICK].best,
                "times_ours_best": timing.best / times[OURS.name].best,
                **report.get(name, {}),
            }
        )
    return rows + [{"who": name, "missing": reason} for name, reason in missing.items()]


CASE = ("dtype", "d", "v", "mode")


def backend_of(options: argparse.Namespace) -> str:
    """Which of ours runs."""
    like = torch.empty(0, dtype=DTYPES[options.dtype[0]], device=options.device)
    return backends.serving(like)


def run(options: argparse.Namespace) -> recording.Recording:
    with qadapter.use_backend(options.backend) if options.backend else nullcontext():
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
        grid = itertools.product(options.dtype, options.size, options.mode)
        cases = [dict(zip(CASE, (t, *size, mode), strict=True)) for t, size, mode in grid]
        solved: dict[tuple[Any, ...], Truth] = {}
        for case in recorded.todo(cases):
            mode = MODES[case["mode"]]
            problem = make_problem(
                options.n, case["d"], case["v"], DTYPES[case["dtype"]], options.device, mode,
                options.pairs,
            )  # fmt: skip
            # The modes of one size share what their compositions have in common.
            key = (case["dtype"], case["d"], case["v"], mode.alpha_0, mode.alpha_tilde, mode.center)
            solved = {k: truth for k, truth in solved.items() if k[:3] == key[:3]}
            if key not in solved:
                solved[key] = solve(problem)
            problem = with_cache(problem, solved[key])
            rows = run_case(options.peers, problem, solved[key], options)
            recorded.put(case, rows, show(rows))
            del problem
    return recorded


def show(rows: list[dict[str, Any]]) -> str:
    header = [
        "who",
        "median (p20-p80) ms",
        "GFLOP/s",
        "of ceiling",
        "x products",
        "best",
        "x ours",
        "best",
        "MiB",
    ]
    bands = ["<0.9", "0.9-0.99", ">0.99"]
    header += [*(f"dh {band}" for band in bands), "r rms", "value rms", "r, sum: max"]
    lines = []
    for row in rows:
        if "missing" in row:
            continue
        error, timing = row.get("error", {}), row["ms"]
        dh, reward = error.get("dh", {}), error.get("reward", {})
        sums = [part["max"] for name, part in reward.items() if name.startswith("sum")]
        cells = [dh.get(band, {}).get("median") for band in bands]
        cells += [reward.get("rms"), error.get("value", {}).get("rms"), *(sums or [None])]
        lines.append(
            [
                row["who"],
                f"{timing.median:.1f} ({timing.p20:.1f}-{timing.p80:.1f})",
                f"{row['gflop_s']:.0f}",
                f"{row['share_of_ceiling']:.0%}" if "share_of_ceiling" in row else "",
                f"{row['times_products']:.2f}",
                f"{row['times_products_best']:.2f}",
                f"{row['times_ours']:.2f}",
                f"{row['times_ours_best']:.2f}",
                f"{row['peak_mib']:.0f}" if "peak_mib" in row else "",
                *("" if cell is None else f"{cell:.1e}" for cell in cells),
            ]
        )
    missing = [f"{row['who']}: {row['missing']}" for row in rows if "missing" in row]
    return "\n".join([harness.table(header, lines), *missing])


def _size(text: str) -> tuple[int, int]:
    d, v = text.split("x")
    return int(d), int(v)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Of this benchmark and of its scaling."""
    parser.add_argument("--backend", help="of ours; default: what is picked by itself")
    parser.add_argument("--n", type=int, help="rows, a multiple of 2 * pairs")
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=11, help="samples at most")
    parser.add_argument("--least", type=int, default=3, help="samples at least")
    parser.add_argument("--seconds", type=float, default=40.0, help="per case, past --least")
    parser.add_argument("--clock", choices=harness.CLOCKS, default="wall")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", type=_size, metavar="DxV")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    add_options(parser)
    recording.shared_options(parser, "linear")
    options = parser.parse_args(arguments)
    defaults = DEFAULTS["quick" if options.quick else options.device]
    for name, value in zip(("n", "pairs", "size", "dtype"), defaults, strict=True):
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
