"""The longest responses whose training step fits in a given memory, for us and for each peer.

    python -m benchmarks.bench_context [--budgets 512 1024 2048] [--resolution 32] [--quick]

A step on one pair of two equally long responses to a prompt of 16 tokens, as in
`bench_train_step --scaling`. Its peak is measured for growing lengths, each twice the one before,
until it is beyond the budget, and then by bisection. The budget is what the step may add to the
loaded model. A length whose peak would not fit into this machine is not tried: then the answer is
"at least".
"""

import argparse
import gc
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import bench, harness, recording, training_problem
from benchmarks.peers.training import CANNOT
from benchmarks.training_problem import WAYS, Setup, make_batch

OPTIONS: bench.Options = {
    "model": ("smollm2", "smollm2", "tiny"),
    "budgets": ([512, 1024, 2048], [8192, 16384, 32768, 65536], [4]),  # MiB
    "resolution": 32,  # tokens of a response
    "longest": (4096, 65536, 128),  # tokens of a response, tried at most
}
CASE = ("who", "budget_mib")
SAFETY = 0.8  # of the free memory
GROWTH = 4.0  # a step of twice the length takes at most this many times the memory


def longest(
    peak: Callable[[int], float | None], budget: float, resolution: int, limit: int
) -> dict[str, Any]:
    """The greatest multiple of ``resolution`` with a peak within the budget.

    ``peak`` gives None where a length cannot be tried. ``at_least`` is true where nothing was
    found to be too long.
    """
    fits, beyond = 0, None
    length = resolution
    while length <= limit:
        found = peak(length)
        if found is None:
            break
        if found > budget:
            beyond = length
            break
        fits, length = length, 2 * length
    while beyond is not None and beyond - fits > resolution:
        middle = (fits + beyond) // 2 // resolution * resolution
        found = peak(middle)
        fits, beyond = (middle, beyond) if found is not None and found <= budget else (fits, middle)
    return {
        "length": fits,
        "at_least": beyond is None,
        "peak_mib": peak(fits) if fits else None,
        "beyond_mib": peak(beyond) if beyond else None,
    }


def peak(setup: Setup, who: str, known: dict[int, float], length: int) -> float | None:
    """MiB of a step, measured once; None where it cannot be tried, as memory is short."""
    if length in known:
        return known[length]
    if shorter := [n for n in known if n < length]:
        nearest = max(shorter)
        expected = known[nearest] * GROWTH ** (length / nearest / 2)
        if expected * 2**20 >= SAFETY * harness.free_memory(setup.device):
            return None
    pair = training_problem.random_pair(setup, length)
    step = make_batch(setup, [pair], (who,)).ways[who]
    setup.model.zero_grad(set_to_none=True)
    gc.collect()
    try:
        with harness.peak_memory(setup.device) as memory:
            step()
        known[length] = memory.mebibytes
    except torch.cuda.OutOfMemoryError:
        known[length] = float("inf")
    return known[length]


def run(options: argparse.Namespace) -> recording.Recording:
    setup = training_problem.load(options.model, options.device)
    recorded = recording.Recording(
        "context",
        options,
        CASE,
        model=options.model,
        resolution=options.resolution,
        cannot=CANNOT,
        missing=setup.missing,
    )
    ways = [way for way in WAYS if way not in setup.missing]
    known: dict[str, dict[int, float]] = {way: {} for way in ways}
    for way in ways:  # what is set up in a first step is no part of any peak
        make_batch(setup, [training_problem.random_pair(setup, 8)], (way,)).ways[way]()
    for case in recorded.todo(bench.grid(who=ways, budget_mib=options.budgets)):
        who, peaks = case["who"], known[case["who"]]
        measure = partial(peak, setup, who, peaks)
        row = longest(measure, case["budget_mib"], options.resolution, options.longest)
        row["peaks"] = {str(length): mib for length, mib in sorted(peaks.items())}
        recorded.put(case, [row], show(row))
    return recorded


def show(row: dict[str, Any]) -> str:
    if not row["length"]:
        return f"not even the shortest length: it takes {row['beyond_mib']:.0f} MiB"
    sign = "at least " if row["at_least"] else ""
    return f"{sign}{row['length']} tokens a response ({row['peak_mib']:.0f} MiB)"


if __name__ == "__main__":
    bench.main(sys.modules[__name__])
