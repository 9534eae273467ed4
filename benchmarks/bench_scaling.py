"""Time and memory of the loss from hidden states against vocabulary, rows, hidden size, threads.

    python -m benchmarks.bench_scaling [--sweep rows vocab hidden threads] [--quick] [--resume]

One thing varies, the others stay: N = 512, V = 49152, D = 576. A competitor that would not fit
into the free memory is left out and says so. The yardstick is that of `bench_linear`.
"""

import argparse
import os
import sys

import torch

from benchmarks import bench, bench_linear, harness, recording
from benchmarks.linear_problem import MODES, make_problem
from benchmarks.peers.linear import CANNOT
from benchmarks.tables import Row

CASE = ("sweep", "n", "d", "v", "threads")
PEERS = ["qadapter", "eager", "compile"]
VOCABULARIES = [32000, 49152, 65536, 128256, 151936, 262144]
CORES = os.cpu_count() or 1
THREADS = sorted({2**i for i in range(CORES.bit_length())} | {CORES})
FIXED = {
    "cpu": {"n": 512, "d": 576, "v": 49152},
    "cuda": {"n": 8192, "d": 4096, "v": 128256},
    "quick": {"n": 64, "d": 32, "v": 512},
}
# Sweep -> what varies, and its values on a CPU, on a GPU, and of a quick run.
SWEEPS: dict[str, tuple[str, tuple[list[int], list[int], list[int]]]] = {
    "rows": (
        "n",
        (
            [8, 32, 128, 512, 1024, 2048, 4096, 8192],
            [16, 128, 1024, 2048, 4096, 8192, 16384, 32768, 65536],
            [64, 128],
        ),
    ),
    "vocab": ("v", (VOCABULARIES, VOCABULARIES, [512, 1000])),
    "hidden": ("d", ([256, 576, 1024, 2048, 4096], [1024, 2048, 4096, 8192], [32, 48])),
    "threads": ("threads", (THREADS, [], THREADS)),
}
OPTIONS: bench.Options = {
    **{n: bench_linear.OPTIONS[n] for n in ("backend", "seconds", "least", "far", "clock")},
    "sweep": list(SWEEPS),
    "pairs": 4,
    "dtype": ["bf16"],
    "peers": PEERS,
    "rounds": (5, 5, 1),
}
CHOICES = {"sweep": SWEEPS, "peers": PEERS, "dtype": bench.DTYPES}


def points(sweep: str, options: argparse.Namespace) -> list[Row]:
    place = "quick" if options.quick else options.device
    what, values = SWEEPS[sweep]
    fixed = {"sweep": sweep, **FIXED[place], "threads": options.threads}
    return [{**fixed, what: value} for value in values[bench.PLACES.index(place)]]


def run(options: argparse.Namespace) -> recording.Recording:
    dtype = options.dtype[0]
    with bench.backend(options.backend):
        recorded = recording.Recording(
            "linear_scaling",
            options,
            CASE,
            backend=bench_linear.backend_of(options),
            cannot={name: CANNOT[name] for name in PEERS[1:]},
        )
        recording.ceilings(options)
        cases = [point for sweep in options.sweep for point in points(sweep, options)]
        for case in recorded.todo(cases):
            n, d, v = case["n"], case["d"], case["v"]
            torch.set_num_threads(case["threads"])
            problem = make_problem(
                n, d, v, bench.DTYPES[dtype], options.device, MODES["uncached"], options.pairs
            )
            free = harness.free_memory(options.device)
            needed = 5 * 4 * n * v  # eager: float32 copies, their gradient, 16-bit ones
            large = [name for name in options.peers if name != "qadapter" and needed > 0.8 * free]
            names = [name for name in options.peers if name not in large]
            rows = bench_linear.run_case(names, problem, None, options)
            reason = f"needs about {needed >> 20} MiB, {free >> 20} are free"
            rows += [{"who": name, "missing": reason} for name in large]
            torch.set_num_threads(options.threads)
            recorded.put(case, [{"dtype": dtype, **row} for row in rows])
            del problem
    return recorded


if __name__ == "__main__":
    bench.main(sys.modules[__name__])
