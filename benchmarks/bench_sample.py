"""One draw per row from the composed policy: the sampler alone, against what others have.

    python -m benchmarks.bench_sample [--device cpu|cuda] [--quick] [--append] [--json PATH]

One case is a batch, a vocabulary, a dtype, one or two tensors of logits, and their kind
(`sampling_problem.LOGITS`); all filters are measured in it. Ours (QF.sample, every backend that can
run here, log-probability of the token included) takes turns with plain PyTorch, transformers'
processors with softmax and torch.multinomial, the same compiled, and FlashInfer. All of them start
from the logits of the streams: composing them counts.

GB/s counts one read of the logits; "of read" is the time that this read takes at the best that a
plain reading loop reaches on the same tensors, in the same turns, over the median time. Tensors
that would fit in the cache are driven out of it before every call; the loop's are, too. With
--warm they may stay there, as those of a decoding loop do.

The torch backend is left out where B * V is large, and compilation to a few cases, as both take
long: --backends and --compile-all. Logits whose nucleus is most of the vocabulary: --logits flat.
"""

import argparse
import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import qadapter
from benchmarks import bench, harness, recording, sampling_problem
from benchmarks.bench import DTYPES
from benchmarks.peers.eager_sampling import EAGER
from benchmarks.peers.flashinfer_sampling import FLASHINFER
from benchmarks.peers.hf_sampling import COMPILED, HF
from benchmarks.sampling_problem import FILTERS, LOGITS, STREAMS, Problem, Sampler
from benchmarks.tables import Row
from qadapter import functional as QF
from qadapter.ops import backends

DEFAULTS: bench.Defaults = {
    "cpu": {"batch_sizes": [8, 64], "vocab": [49152, 128256], "dtype": ["bf16", "fp32"]},
    "cuda": {"batch_sizes": [64], "vocab": [128256], "dtype": ["bf16"]},
    "quick": {"batch_sizes": [3], "vocab": [1000], "dtype": ["bf16", "fp32"]},
}
PEERS = {peer.name: peer for peer in (EAGER, HF, COMPILED, FLASHINFER)}
CASE = ("dtype", "b", "v", "streams", "logits")
SETTLE_MS = 50.0  # a function that takes longer is not run once untimed before every sample
TORCH_ELEMENTS = 8 * 128256  # logits up to which the torch backend runs too
COMPILED_FILTERS = ("plain", "top-k, top-p")


def ours(backend: str) -> Sampler:
    def prepare(problem: Problem) -> Callable[[], Tensor]:
        arguments = problem.arguments

        def run() -> Tensor:
            with qadapter.use_backend(backend):
                return QF.sample(problem.base, problem.q, **arguments).tokens

        return run

    return Sampler(f"qadapter {backend}", prepare)


def our_backends(problem: Problem, chosen: list[str] | None) -> list[str]:
    """The one that is taken by itself first: the others' times are given as multiples of its."""
    device, own = problem.q.device.type, backends.serving(problem.q)
    names = [b.name for b in qadapter.backends() if b.available and device in b.devices]
    names.sort(key=lambda name: name != own)
    if chosen:
        return [name for name in names if name in chosen]
    large = problem.q.numel() > TORCH_ELEMENTS
    return [n for n in names if n != "torch" or not large] or ["torch"]


def takes_part(peer: Sampler, case: dict[str, Any], filters: str, everything: bool) -> bool:
    if peer is not COMPILED or everything:
        return True
    headline = (case["streams"], case["logits"]) == ("two", "peaked")
    return headline and filters in COMPILED_FILTERS


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
    if COMPILED in samplers:
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
    if options.device == "cuda" and not options.eager:
        for name, function in functions.items():
            functions[name] = graphed(function)
            known[name]["graph"] = functions[name] is not function
    reads = {f"read {k}": f for k, f in harness.read_function(problem.q).items()}
    settings = {"warmup": 1, "settle_ms": SETTLE_MS, **({"cold": False} if options.warm else {})}
    times = bench.timed({**functions, **reads}, options, problem.q.nbytes, **settings)
    tensors = 1 if problem.base is None else 2
    read_ms = tensors * min(times[name].best for name in reads)
    size = tensors * problem.q.nbytes
    own = times[next(iter(functions))]
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
        compositions=STREAMS,
        filters=FILTERS,
        cannot={name: peer.cannot for name, peer in PEERS.items()},
    )
    recording.ceilings(options)
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
            samplers = [ours(backend) for backend in our_backends(problem, options.backends)]
            chosen = [PEERS[name] for name in options.peers]
            samplers += [p for p in chosen if takes_part(p, case, filters, options.compile_all)]
            rows = run_filters(problem, samplers, options)
            done += [{"filters": filters, **row} for row in rows]
            shown.append(f"{filters}\n{bench.show(rows)}")
            del problem
            gc.collect()
        recorded.put(case, done, "\n".join(shown))
    return recorded


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = bench.parser("sample", __doc__)
    parser.add_argument("--batch-sizes", type=int, nargs="+", metavar="B")
    parser.add_argument("--vocab", type=int, nargs="+", metavar="V")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES)
    parser.add_argument("--streams", nargs="+", choices=STREAMS, default=list(STREAMS))
    parser.add_argument("--logits", nargs="+", choices=LOGITS, default=["peaked"])
    parser.add_argument("--filters", nargs="+", choices=FILTERS, default=list(FILTERS))
    parser.add_argument("--backends", nargs="+", help="of ours; default: all that run here")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--compile-all", action="store_true", help="compile in every case")
    parser.add_argument("--eager", action="store_true", help="on a GPU: no CUDA graphs")
    parser.add_argument("--warm", action="store_true", help="leave inputs in the cache")
    bench.timing_options(parser, rounds=25, seconds=1.0)
    return bench.parse(parser, arguments, DEFAULTS)


if __name__ == "__main__":
    bench.main(parse, run)
