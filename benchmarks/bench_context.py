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
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import bench, harness, recording, training_problem
from benchmarks.training_problem import CANNOT, WAYS, Setup, make_batch

CPU = {"model": "smollm2", "budgets": [512, 1024, 2048], "resolution": 32, "longest": 4096}
DEFAULTS: bench.Defaults = {
    "cpu": CPU,
    "cuda": {**CPU, "budgets": [8192, 16384, 32768, 65536], "longest": 65536},
    "quick": {"model": "tiny", "budgets": [4], "resolution": 32, "longest": 128},
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


class Peaks:
    """Peaks of one way in MiB, each length measured once."""

    def __init__(self, setup: Setup, who: str) -> None:
        self.setup, self.who = setup, who
        self.known: dict[int, float | None] = {}

    def __call__(self, length: int) -> float | None:
        if length not in self.known:
            self.known[length] = self._measure(length) if self._may(length) else None
        return self.known[length]

    def _may(self, length: int) -> bool:
        shorter = {n: p for n, p in self.known.items() if n < length and p is not None}
        if not shorter:
            return True
        nearest = max(shorter)
        expected = shorter[nearest] * GROWTH ** (length / nearest / 2)
        return expected * 2**20 < SAFETY * harness.free_memory(self.setup.device)

    def _measure(self, length: int) -> float:
        pair = training_problem.random_pair(self.setup, length)
        step = make_batch(self.setup, [pair], (self.who,)).ways[self.who]
        self.setup.model.zero_grad(set_to_none=True)
        gc.collect()
        try:
            with harness.peak_memory(self.setup.device) as memory:
                step()
        except torch.cuda.OutOfMemoryError:
            return float("inf")
        return memory.mebibytes


def run(options: argparse.Namespace) -> recording.Recording:
    setup = training_problem.load(options.model, options.device, WAYS[3] in options.ways)
    recorded = recording.Recording(
        "context",
        options,
        CASE,
        model=options.model,
        resolution=options.resolution,
        cannot=CANNOT,
        missing=setup.missing,
    )
    ways = [way for way in options.ways if way not in setup.missing]
    peaks = {way: Peaks(setup, way) for way in ways}
    for way in ways:  # what is set up in a first step is no part of any peak
        make_batch(setup, [training_problem.random_pair(setup, 8)], (way,)).ways[way]()
    for case in recorded.todo(bench.grid(who=ways, budget_mib=options.budgets)):
        peak = peaks[case["who"]]
        row = longest(peak, case["budget_mib"], options.resolution, options.longest)
        row["peaks"] = {str(n): p for n, p in sorted(peak.known.items()) if p is not None}
        recorded.put(case, [row], show(row))
    return recorded


def show(row: dict[str, Any]) -> str:
    if not row["length"]:
        return f"not even the shortest length: it takes {row['beyond_mib']:.0f} MiB"
    sign = "at least " if row["at_least"] else ""
    return f"{sign}{row['length']} tokens a response ({row['peak_mib']:.0f} MiB)"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = bench.parser("context", __doc__)
    parser.add_argument("--model", help="smollm2, a folder or a Hub id, or tiny (random weights)")
    parser.add_argument("--budgets", type=int, nargs="+", metavar="MiB")
    parser.add_argument("--resolution", type=int, help="tokens of a response")
    parser.add_argument("--longest", type=int, help="tokens of a response, tried at most")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    return bench.parse(parser, arguments, DEFAULTS)


if __name__ == "__main__":
    bench.main(parse, run)
