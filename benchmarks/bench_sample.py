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
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import qadapter
from benchmarks import harness, recording
from benchmarks.peers.eager_sampling import EAGER
from benchmarks.peers.flashinfer_sampling import FLASHINFER
from benchmarks.peers.hf_sampling import COMPILED, HF
from benchmarks.sampling_problem import (
    FILTERS,
    LOGITS,
    STREAMS,
    Problem,
    Sampler,
    make_problem,
)
from qadapter import functional as QF
from qadapter.ops import backends

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEFAULTS: dict[str, tuple[list[int], list[int], list[str]]] = {  # batches, vocabularies, dtypes
    "cpu": ([8, 64], [49152, 128256], ["bf16", "fp32"]),
    "cuda": ([64], [128256], ["bf16"]),
    "quick": ([3], [1000], ["bf16", "fp32"]),
}
PEERS = {peer.name: peer for peer in (EAGER, HF, COMPILED, FLASHINFER)}
CASE = ("dtype", "b", "v", "streams", "logits")
SETTLE_MS = 50.0  # a function that takes longer is not run once untimed before every sample
TORCH_ELEMENTS = 8 * 128256  # logits up to which the torch backend runs too
COMPILED_FILTERS = ("plain", "top-k, top-p")


def ours(backend: str) -> Sampler:
    def prepare(problem: Problem) -> Callable[[], Tensor]:
        c = problem.composition
        arguments: dict[str, Any] = {
            "alpha_0": c.alpha_0,
            "alpha_tilde": c.alpha_tilde,
            "center": c.center,
            "seed": problem.seed,
            "position": problem.position,
            **problem.filters,
        }

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


def first_runs(
    samplers: list[Sampler], problem: Problem
) -> tuple[dict[str, Callable[[], Any]], dict[str, dict[str, Any]], dict[str, str]]:
    """Each runs once (compilers compile): the functions, what is known of them, who is missing."""
    functions: dict[str, Callable[[], Any]] = {}
    known: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    own: Tensor | None = None
    for sampler in samplers:
        reason = sampler.reason(problem)
        if not reason:
            try:
                function = sampler.prepare(problem)
                tokens = function()
            except Exception as error:  # a peer that fails must not end the comparison
                if sampler.name.startswith("qadapter"):
                    raise
                reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        if reason:
            missing[sampler.name] = reason
            continue
        with harness.peak_memory(problem.q.device.type) as peak:
            function()
        known[sampler.name] = {"peak_mib": peak.mebibytes}
        if sampler.name.startswith("qadapter"):  # same seeds, so the same tokens
            own = tokens if own is None else own
            known[sampler.name]["same_tokens"] = (tokens == own).double().mean().item()
        functions[sampler.name] = function
    return functions, known, missing


def run_filters(
    problem: Problem, samplers: list[Sampler], options: argparse.Namespace
) -> list[dict[str, Any]]:
    if COMPILED in samplers:
        torch._dynamo.reset()
    functions, known, missing = first_runs(samplers, problem)
    if options.device == "cuda" and not options.eager:
        plain, functions = functions, {who: graphed(f) for who, f in functions.items()}
        for who in functions:
            known[who]["graph"] = functions[who] is not plain[who]
    reads = {f"read {k}": f for k, f in harness.read_function(problem.q).items()}
    times = harness.interleaved(
        {**functions, **reads},
        device=options.device,
        rounds=options.rounds,
        seconds=options.seconds,
        warmup=1,
        least=options.least,
        settle_ms=SETTLE_MS,
        clock=options.clock,
        cold=not options.warm and problem.q.nbytes < harness.COLD * harness.cache_bytes(),
    )
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
            "times_ours": times[who].median / own.median,
            "times_ours_best": times[who].best / own.best,
            "read_gb_s": size / read_ms / 1e6,
            **known[who],
        }
        for who in functions
    ]
    return rows + [{"who": who, "missing": reason} for who, reason in missing.items()]


def all_cases(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Those that matter most first: a run that is cut off has them."""
    grid = itertools.product(
        options.streams, options.logits, options.dtype, options.batch_sizes, options.vocab
    )
    return [
        dict(zip(CASE, (dtype, b, v, streams, logits), strict=True))
        for streams, logits, dtype, b, v in grid
    ]


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
    for case in recorded.todo(all_cases(options)):
        dtype, b, v, streams, logits = (case[name] for name in CASE)
        done = []
        for filters in options.filters:
            problem = make_problem(b, v, DTYPES[dtype], options.device, streams, logits, filters)
            samplers = [ours(backend) for backend in our_backends(problem, options.backends)]
            chosen = [PEERS[name] for name in options.peers]
            samplers += [p for p in chosen if takes_part(p, case, filters, options.compile_all)]
            part = run_filters(problem, samplers, options)
            done += [{"filters": filters, **row} for row in part]
            del problem
            gc.collect()
        recorded.put(case, done, show(done))
    return recorded


def show(rows: list[dict[str, Any]]) -> str:
    header = ["filters", "who", "median (p20-p80) ms", "GB/s", "of read", "x ours", "best"]
    header += ["MiB", "same"]
    lines = []
    for row in rows:
        if "missing" in row:
            continue
        timing = row["ms"]
        lines.append(
            [
                row["filters"],
                row["who"],
                f"{timing.median:.3f} ({timing.p20:.3f}-{timing.p80:.3f})",
                f"{row['gb_s']:.2f}",
                f"{row['share_of_read']:.1%}",
                f"{row['times_ours']:.2f}",
                f"{row['times_ours_best']:.2f}",
                f"{row['peak_mib']:.0f}",
                f"{row['same_tokens']:.0%}" if "same_tokens" in row else "",
            ]
        )
    missing = {f"{row['who']}: {row['missing']}": None for row in rows if "missing" in row}
    return "\n".join([harness.table(header, lines), *missing])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
    parser.add_argument("--rounds", type=int, default=25, help="samples at most")
    parser.add_argument("--least", type=int, default=3, help="samples at least")
    parser.add_argument("--seconds", type=float, default=1.0, help="per filter, past --least")
    parser.add_argument("--clock", choices=harness.CLOCKS, default="wall")
    recording.shared_options(parser, "sample")
    options = parser.parse_args(arguments)
    defaults = DEFAULTS["quick" if options.quick else options.device]
    for name, value in zip(("batch_sizes", "vocab", "dtype"), defaults, strict=True):
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.quick:
        options.rounds = options.least = 1
    recording.finish_options(options)
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    run(options)


if __name__ == "__main__":
    main()
