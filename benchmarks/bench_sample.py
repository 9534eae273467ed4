"""One draw per row from the composed policy: the sampler alone, against what others have.

    python -m benchmarks.bench_sample [--device cpu|cuda] [--quick] [--append] [--json PATH]

One case is a batch, a vocabulary, a dtype, one or two tensors of logits, and their kind
(`sampling_problem.LOGITS`); all filters are measured in it. Ours (QF.sample, every backend that can
run here, log-probability of the token included) takes turns with plain PyTorch, transformers'
processors with softmax and torch.multinomial, the same compiled, and FlashInfer. All of them start
from the logits of the streams: composing them counts.

GB/s counts one read of the logits; "of read" is the time that this read takes at the best that a
plain reading loop reaches on the same tensors, in the same turns, over the median time. On a CPU
logits are where the head's product has just left them, in the cache if they fit.

The torch backend is left out where B * V is large, and compilation to a few cases, as both take
long. Logits whose nucleus is most of the vocabulary: --logits flat.
"""

import argparse
import gc
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import qadapter
from benchmarks import bench, harness, recording, sampling_problem
from benchmarks.bench import DTYPES
from benchmarks.peers.sampling import COMPILED, PEERS
from benchmarks.sampling_problem import FILTERS, LOGITS, STREAMS, Problem, Sampler
from benchmarks.tables import Row
from qadapter import functional as QF
from qadapter.ops import backends
from qadapter.training import heap

OPTIONS: bench.Options = {
    "batch_sizes": ([8, 64], [64], [3]),
    "vocab": ([49152, 128256], [128256], [1000]),
    "dtype": (["bf16", "fp32"], ["bf16"], ["bf16", "fp32"]),
    "streams": list(STREAMS),
    "logits": ["peaked"],
    "filters": list(FILTERS),
    "peers": list(PEERS),
    **bench.timing(rounds=25, seconds=1.0),
}
CHOICES = {
    "dtype": DTYPES,
    "streams": STREAMS,
    "logits": LOGITS,
    "filters": FILTERS,
    "peers": PEERS,
}
CASE = ("dtype", "b", "v", "streams", "logits")
SETTLE_MS = 50.0  # a function that takes longer is not run once untimed before every sample
TORCH_ELEMENTS = 8 * 128256  # logits up to which the torch backend runs too
COMPILED_FILTERS = ("plain", "top-k, top-p")


def ours(backend: str) -> Sampler:
    def prepare(problem: Problem) -> Callable[[], Tensor]:
        arguments = problem.arguments

        def run() -> Tensor:
            return QF.sample(problem.base, problem.q, **arguments).tokens

        def run_there() -> Tensor:
            with qadapter.use_backend(backend):
                return run()

        return run if backend == backends.serving(problem.q) else run_there

    return Sampler(f"qadapter {backend}", prepare)


def our_backends(problem: Problem) -> list[str]:
    """The one that is taken by itself first: the others' times are given as multiples of its."""
    device, own = problem.q.device.type, backends.serving(problem.q)
    names = [b.name for b in qadapter.backends() if b.available and device in b.devices]
    large = problem.q.numel() > TORCH_ELEMENTS
    return [own, *(name for name in names if name != own and not (name == "torch" and large))]


def samplers_of(problem: Problem, case: Row, filters: str, peers: list[str]) -> list[Sampler]:
    """Ours, and the peers; compilers in a few cases only."""
    headline = (case["streams"], case["logits"]) == ("two", "peaked")
    compiled = headline and filters in COMPILED_FILTERS
    theirs = [PEERS[name] for name in peers if PEERS[name] is not COMPILED or compiled]
    return [*map(ours, our_backends(problem)), *theirs]


def graphed(function: Callable[[], Any]) -> Callable[[], Any]:
    """On a GPU, a replay of what the function launches: its launches from Python cost more than
    its kernels. Functions that cannot be captured (they wait for the GPU) stay as they are."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            function()
    except Exception:
        torch.cuda.synchronize()
        return function
    return graph.replay


def run_filters(
    problem: Problem, samplers: list[Sampler], options: argparse.Namespace
) -> list[Row]:
    torch._dynamo.reset()
    by_name = {sampler.name: sampler for sampler in samplers}
    mine = [name for name in by_name if name.startswith("qadapter")]
    functions: dict[str, Callable[[], Any]] = {}
    drawn: dict[str, Tensor] = {}

    def first(name: str) -> Row:
        function = by_name[name].prepare(problem)
        drawn[name] = function()
        with harness.peak_memory(options.device) as peak:
            function()
        functions[name] = function
        return {"peak_mib": peak.mebibytes}

    known, missing = bench.first_runs(
        by_name, first, mine, reason=lambda name: by_name[name].reason(problem)
    )
    for name in mine:  # same seeds, so the same tokens
        known[name]["same_tokens"] = (drawn[name] == drawn[mine[0]]).double().mean().item()
    if options.device == "cuda":
        for name, function in functions.items():
            functions[name] = graphed(function)
            known[name]["graph"] = functions[name] is not function
    reads = {f"read {k}": f for k, f in harness.read_function(problem.q).items()}
    own_name, timed = next(iter(functions)), {**functions, **reads}
    times = bench.timed(
        timed, options, problem.q.nbytes, own_name, warmup=1, settle_ms=SETTLE_MS, cold=False
    )
    tensors = 1 if problem.base is None else 2
    read_ms = tensors * min(times[name].best for name in reads)
    size = tensors * problem.q.nbytes
    own = times[own_name]
    rows = [
        {
            "who": who,
            "ms": times[who],
            "gb_s": size / times[who].median / 1e6,
            "share_of_read": read_ms / times[who].median,
            **bench.against(times[who], own),
            "read_gb_s": size / read_ms / 1e6,
            **known[who],
        }
        for who in functions
    ]
    return rows + missing


def run(options: argparse.Namespace) -> recording.Recording:
    recorded = recording.Recording(
        "sample",
        options,
        CASE,
        streams=STREAMS,
        filters=FILTERS,
        cannot={name: peer.cannot for name, peer in PEERS.items()},
    )
    recording.ceilings(options)
    if options.device == "cpu":
        heap.keep_freed_memory()  # peers make tensors of the vocabulary, with a fault a page
    # Those that matter most first: a run that is cut off has them.
    cases = bench.grid(
        streams=options.streams,
        logits=options.logits,
        dtype=options.dtype,
        b=options.batch_sizes,
        v=options.vocab,
    )
    for case in recorded.todo(cases):
        dtype, b, v, streams, logits = (case[name] for name in CASE)
        done, shown = [], []
        for filters in options.filters:
            problem = sampling_problem.make_problem(
                b, v, DTYPES[dtype], options.device, streams, logits, filters
            )
            samplers = samplers_of(problem, case, filters, options.peers)
            rows = run_filters(problem, samplers, options)
            done += [{"filters": filters, **row} for row in rows]
            shown.append(f"{filters}\n{recording.show(rows)}")
            del problem
            gc.collect()
        recorded.put(case, done, "\n".join(shown))
    return recorded


if __name__ == "__main__":
    bench.main(sys.modules[__name__])
