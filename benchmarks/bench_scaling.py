"""Time and memory of the loss from hidden states against vocabulary, rows, hidden size, threads.

    python -m benchmarks.bench_scaling [--sweep rows vocab hidden threads] [--quick] [--resume]

One thing varies, the others stay: N = 512, V = 49152, D = 576. A competitor that would not fit
into the free memory is left out and says so. The yardstick is that of `bench_linear`.
"""

import argparse
import os
from contextlib import nullcontext
from typing import Any

import torch

import qadapter
from benchmarks import bench_linear, harness, recording
from benchmarks.linear_problem import MODES, make_problem

CASE = ("sweep", "n", "d", "v", "threads")
PEERS = ["qadapter", "eager", "compile"]
FIXED = {"cpu": (512, 576, 49152), "cuda": (8192, 4096, 128256), "quick": (64, 32, 512)}
ROWS = {
    "cpu": [8, 32, 128, 512, 1024, 2048, 4096, 8192],
    "cuda": [16, 128, 1024, 2048, 4096, 8192, 16384, 32768, 65536],
    "quick": [64, 128],
}
VOCABULARIES = {
    "cpu": [32000, 49152, 65536, 128256, 151936, 262144],
    "cuda": [32000, 49152, 65536, 128256, 151936, 262144],
    "quick": [512, 1000],
}
HIDDEN = {"cpu": [256, 576, 1024, 2048, 4096], "cuda": [1024, 2048, 4096, 8192], "quick": [32, 48]}
SWEEPS = ("rows", "vocab", "hidden", "threads")


def thread_counts() -> list[int]:
    """1, 2, 4, ... and all cores."""
    cores = os.cpu_count() or 1
    return sorted({2**i for i in range(cores.bit_length()) if 2**i <= cores} | {cores})


def points(sweep: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    which = "quick" if options.quick else options.device
    n, d, v = FIXED[which]
    values: dict[str, list[dict[str, int]]] = {
        "rows": [{"n": value} for value in ROWS[which]],
        "vocab": [{"v": value} for value in VOCABULARIES[which]],
        "hidden": [{"d": value} for value in HIDDEN[which]],
        "threads": [{"threads": count} for count in thread_counts()],
    }
    if sweep == "threads" and options.device == "cuda":
        return []
    fixed = {"sweep": sweep, "n": n, "d": d, "v": v, "threads": options.threads}
    return [{**fixed, **varied} for varied in values[sweep]]


def run(options: argparse.Namespace) -> recording.Recording:
    dtype = options.dtype[0]
    with qadapter.use_backend(options.backend) if options.backend else nullcontext():
        recorded = recording.Recording(
            "linear_scaling",
            options,
            CASE,
            backend=bench_linear.backend_of(options),
            cannot={name: bench_linear.CANNOT[name] for name in PEERS[1:]},
        )
        recording.ceilings(options)
        cases = [point for sweep in options.sweep for point in points(sweep, options)]
        for case in recorded.todo(cases):
            n, d, v = case["n"], case["d"], case["v"]
            torch.set_num_threads(case["threads"])
            problem = make_problem(
                n, d, v, bench_linear.DTYPES[dtype], options.device, MODES["uncached"],
                options.pairs,
            )  # fmt: skip
            free = harness.free_memory(options.device)
            needed = 5 * 4 * n * v  # eager: float32 copies, their gradient, 16-bit ones
            names = [name for name in PEERS if name in options.peers]
            if needed > 0.8 * free:
                names = names[:1]
            rows = bench_linear.run_case(names, problem, None, options)
            reason = f"needs about {needed >> 20} MiB, {free >> 20} are free"
            rows += [
                {"who": name, "missing": reason}
                for name in PEERS
                if name in options.peers and name not in names
            ]
            torch.set_num_threads(options.threads)
            recorded.put(case, [{"dtype": dtype, **row} for row in rows], bench_linear.show(rows))
            del problem
    return recorded


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    bench_linear.add_options(parser)
    parser.set_defaults(pairs=4, dtype=["bf16"], peers=PEERS, rounds=5)
    recording.shared_options(parser, "linear_scaling")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds = options.least = 1
    if PEERS[0] not in options.peers:
        options.peers = [PEERS[0], *options.peers]
    recording.finish_options(options)
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    run(options)


if __name__ == "__main__":
    main()
