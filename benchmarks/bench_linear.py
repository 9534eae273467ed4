"""The loss from hidden states, whose logits need not exist, against everyone who has such a thing.

    python -m benchmarks.bench_linear [--device cpu|cuda] [--quick] [--json PATH]
    python -m benchmarks.bench_linear --scaling

One case is a dtype, a size of hidden state and vocabulary, and a mode (`linear_problem.MODES`). In
a case all competitors take turns in one process, forward and backward of the same loss. Beside them
runs the yardstick, "products": the two or three matrix products of this mode and nothing else, bare
torch.mm of all rows at once into memory that is there already (on a GPU with float32 logits).
GFLOP/s counts 2 N D V for each of those products, whatever a competitor does beyond them. Memory is
what a step adds at its peak, the gradient of the hidden states included.

Errors are against float64 from the same inputs, without any merging: of the gradient relative per
row, of r = q - value and value absolute, per token and on sums of 512 tokens.

The peers that are not installed, or cannot do a case, are listed with the reason. To have them all:
pip install --no-deps liger-kernel cut-cross-entropy trl
"""

import argparse
import gc
import itertools
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import qadapter
from benchmarks import harness
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
from benchmarks.peers import cce, compiled, eager, liger, ours, torch_lce, trl_chunked
from qadapter.backends import implementation

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
    )
}
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
    )
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
                "gflop_s": 2 * n * d * v * products / timing.median / 1e6,
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


def earlier_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """With --append, what the results hold already."""
    path = harness.results_path("linear", options.device, options.json)
    if not options.append or not path.is_file():
        return []
    return json.loads(path.read_text())["rows"]


def run(options: argparse.Namespace) -> None:
    rows, started = earlier_rows(options), time.perf_counter()
    for dtype, (d, v) in itertools.product(options.dtype, options.size):
        solved: dict[tuple[float, ...], Truth] = {}
        for mode_name in options.mode:
            mode = MODES[mode_name]
            problem = make_problem(
                options.n, d, v, DTYPES[dtype], options.device, mode, options.pairs
            )
            alphas = (mode.alpha_0, mode.alpha_tilde, mode.center)
            if alphas not in solved:
                solved[alphas] = solve(problem)
            truth = solved[alphas]
            problem = with_cache(problem, truth)
            done = run_case(options.peers, problem, truth, options)
            case = (dtype, d, v, mode_name)
            rows = [row for row in rows if tuple(row[name] for name in CASE) != case]
            rows += [{**dict(zip(CASE, case, strict=True)), **row} for row in done]
            minutes = (time.perf_counter() - started) / 60
            print(f"\n{dtype} D={d} V={v} {mode_name} ({minutes:.1f} min so far)")
            print(show(done), flush=True)
            harness.write_json(  # after every case: a run of all of them is long
                "linear",
                options.device,
                rows,
                options.json,
                clock=options.clock,
                shape={"n": options.n, "pairs": options.pairs},
                modes=MODES,
                versions=versions(options),
                minutes=minutes,
            )
            del problem, truth


def versions(options: argparse.Namespace) -> dict[str, str]:
    """Of the peers, and which backend ours was."""
    like = torch.empty(0, dtype=DTYPES[options.dtype[0]], device=options.device)
    found = {"backend": implementation(like).__name__.removeprefix("qadapter._")}
    for package in ("liger-kernel", "trl", "cut-cross-entropy", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


SWEEPS = {"rows": [128, 256, 512, 1024, 2048, 4096, 8192], "vocab": [2**i for i in range(15, 19)]}
SCALING_PEERS = [OURS.name, "eager", "compile"]


def scaling(options: argparse.Namespace) -> None:
    """Time and memory against rows (V = 49152) and against the vocabulary (N = 512)."""
    d = 32 if options.quick else 576
    points = [("rows", n, 49152) for n in SWEEPS["rows"]]
    points += [("vocab", 512, v) for v in SWEEPS["vocab"]]
    if options.quick:
        points = [("rows", n, 512) for n in (64, 128)] + [("vocab", 64, v) for v in (512, 1024)]
    rows: list[dict[str, Any]] = []
    options.least, options.rounds = min(options.least, 3), min(options.rounds, 5)
    for sweep, n, v in points:
        mode = MODES["uncached"]
        problem = make_problem(n, d, v, DTYPES["bf16"], options.device, mode, options.pairs)
        names = [name for name in SCALING_PEERS if name in options.peers]
        free = harness.free_memory(options.device)
        needed = 5 * 4 * n * v  # eager: float32 copies of the logits, their gradient, 16-bit ones
        if needed > 0.8 * free:
            names = [OURS.name]
        done = run_case(names, problem, None, options)
        done += [
            {"who": name, "missing": f"needs about {needed >> 20} MiB, {free >> 20} are free"}
            for name in SCALING_PEERS
            if name not in names and name in options.peers
        ]
        rows += [{"sweep": sweep, "n": n, "v": v, "d": d, "dtype": "bf16", **r} for r in done]
        print(f"\n{sweep}: N={n} V={v} D={d}")
        print(show(done), flush=True)
    harness.write_json(
        "linear_scaling",
        options.device,
        rows,
        options.json,
        clock=options.clock,
        versions=versions(options),
    )


def show(rows: list[dict[str, Any]]) -> str:
    header = [
        "who",
        "median (p20-p80) ms",
        "GFLOP/s",
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backend", help="of ours; default: what is picked by itself")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does everything run?")
    parser.add_argument("--scaling", action="store_true", help="against rows and vocabulary")
    parser.add_argument("--n", type=int, help="rows, a multiple of 2 * pairs")
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--size", nargs="+", type=_size, metavar="DxV")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES)
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=11, help="samples at most")
    parser.add_argument("--least", type=int, default=3, help="samples at least")
    parser.add_argument("--seconds", type=float, default=40.0, help="per case, past --least")
    parser.add_argument("--clock", choices=harness.CLOCKS, default="wall")
    parser.add_argument("--append", action="store_true", help="keep the results of other cases")
    parser.add_argument("--json", help="default: benchmarks/results/linear[_scaling]-<device>.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    defaults = DEFAULTS["quick" if options.quick else options.device]
    for name, value in zip(("n", "pairs", "size", "dtype"), defaults, strict=True):
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.quick and options.json is None:
        options.json = "/dev/null"
    if OURS.name not in options.peers:
        options.peers.insert(0, OURS.name)
    chosen = qadapter.use_backend(options.backend) if options.backend else nullcontext()
    with chosen:
        (scaling if options.scaling else run)(options)


if __name__ == "__main__":
    main()
