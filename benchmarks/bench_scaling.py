"""Time and memory of the loss from hidden states against vocabulary, rows, hidden size, threads.

    python -m benchmarks.bench_scaling [--sweep rows vocab hidden threads] [--quick] [--resume]

One thing varies, the others stay: N = 512, V = 49152, D = 576. A competitor that would not fit
into the free memory is left out and says so. The yardstick is that of `bench_linear`.
"""

import argparse
import os
from typing import Any

import torch

from benchmarks import bench, bench_linear, harness, recording
from benchmarks.linear_problem import MODES, make_problem

CASE = ("sweep", "n", "d", "v", "threads")
PEERS = ["qadapter", "eager", "compile"]
SWEEPS = {"rows": "n", "vocab": "v", "hidden": "d", "threads": "threads"}  # what varies
FIXED = {
    "cpu": {"n": 512, "d": 576, "v": 49152},
    "cuda": {"n": 8192, "d": 4096, "v": 128256},
    "quick": {"n": 64, "d": 32, "v": 512},
}
VOCABULARIES = [32000, 49152, 65536, 128256, 151936, 262144]
VALUES = {
    "cpu": {
        "rows": [8, 32, 128, 512, 1024, 2048, 4096, 8192],
        "vocab": VOCABULARIES,
        "hidden": [256, 576, 1024, 2048, 4096],
    },
    "cuda": {
        "rows": [16, 128, 1024, 2048, 4096, 8192, 16384, 32768, 65536],
        "vocab": VOCABULARIES,
        "hidden": [1024, 2048, 4096, 8192],
        "threads": [],
    },
    "quick": {"rows": [64, 128], "vocab": [512, 1000], "hidden": [32, 48]},
}


def thread_counts() -> list[int]:
    """1, 2, 4, ... and all cores."""
    cores = os.cpu_count() or 1
    return sorted({2**i for i in range(cores.bit_length()) if 2**i <= cores} | {cores})


def points(sweep: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    which = "quick" if options.quick else options.device
    varied = VALUES[options.device if sweep == "threads" else which]
    values = varied.get(sweep, thread_counts())
    fixed = {"sweep": sweep, **FIXED[which], "threads": options.threads}
    return [{**fixed, SWEEPS[sweep]: value} for value in values]


def run(options: argparse.Namespace) -> recording.Recording:
    dtype = options.dtype[0]
    with bench.backend(options.backend):
        recorded = recording.Recording(
            "linear_scaling",
            options,
            CASE,
            backend=bench_linear.backend_of(options),
            cannot={name: bench_linear.CANNOT[name] for name in PEERS[1:]},
        )
        recording.ceilings(options)
        chosen = [name for name in PEERS if name in options.peers]
        cases = [point for sweep in options.sweep for point in points(sweep, options)]
        for case in recorded.todo(cases):
            n, d, v = case["n"], case["d"], case["v"]
            torch.set_num_threads(case["threads"])
            problem = make_problem(
                n, d, v, bench.DTYPES[dtype], options.device, MODES["uncached"], options.pairs
            )
            free = harness.free_memory(options.device)
            needed = 5 * 4 * n * v  # eager: float32 copies, their gradient, 16-bit ones
            names = chosen[:1] if needed > 0.8 * free else chosen
            rows = bench_linear.run_case(names, problem, None, options)
            reason = f"needs about {needed >> 20} MiB, {free >> 20} are free"
            rows += [{"who": name, "missing": reason} for name in chosen[len(names) :]]
            torch.set_num_threads(options.threads)
            recorded.put(case, [{"dtype": dtype, **row} for row in rows], bench.show(rows))
            del problem
    return recorded


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = bench.parser("linear_scaling", __doc__)
    parser.add_argument("--sweep", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    bench_linear.add_options(parser)
    parser.set_defaults(pairs=4, dtype=["bf16"], peers=PEERS, rounds=5)
    return bench.parse(parser, arguments, {}, PEERS[0])


if __name__ == "__main__":
    bench.main(parse, run)
