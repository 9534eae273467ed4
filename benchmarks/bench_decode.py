"""Time per token of decoding from the composed policy, against the base alone.

    python -m benchmarks.bench_decode [--device cpu|cuda] [--quick] [--append] [--json PATH]

One case is a batch of ragged, left-padded prompts of about 64 tokens, sampled (temperature 0.8,
top-k 50, top-p 0.9) or greedy, and a LoRA (r = 8 on q and v, B not 0) on all layers or on the upper
half. In it take turns, end of sequence switched off:

    base          transformers' generate of the base, a model without any LoRA layer
    lora          transformers' generate of the PEFT model: the price of plain LoRA
    naive         two forwards a token with PEFT's disable_adapter(), composed by hand
    two streams   model.generate at strength 0.5
    one stream    model.generate at strength 1, where the base cancels
    two adapters  model.generate of two adapters blended: three streams
    llama.cpp     the adapter alone by llama.cpp, one row of the packaged model; where the package
                  xllamacpp is installed

Time per token is the time from one token to the next, of all tokens but the first of all runs (the
time to the first is given as prefill). All weights are shared by the competitors.

The parts of a step of two streams are taken one by one, at the middle of the text: the forward of
both streams, the head's product, the sampler; and transformers' forward of the base. What a token
takes beyond its parts is "rest": the loop in Python.
"""

import argparse
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks import bench, harness, recording
from benchmarks import decoding_problem as decoding
from benchmarks.bases import load_base
from benchmarks.decoding_problem import Clock, Competitors, Way
from benchmarks.tables import Row
from qadapter import functional as QF
from qadapter.model.growing_cache import grow_in_place

OPTIONS: bench.Options = {
    "model": ("smollm2", "llama-8b", "tiny"),  # or a folder, or a Hub id
    "batch_sizes": ([1, 8], [1, 8], [1, 2]),
    "new_tokens": (128, 128, 8),  # at least 2
    "mode": ["sampled", "greedy"],
    "lora": ["all", "upper"],
    "cache": ("dynamic", "static", "dynamic"),
    "rounds": (3, 5, 1),
}
CHOICES = {"mode": decoding.MODES, "lora": ("all", "upper"), "cache": ("dynamic", "static")}
CASE = ("model", "batch", "mode", "lora")
CANNOT = {
    "base": "is the base alone: it knows nothing of the preference",
    "lora": "is the adapter alone: it cannot be blended with the base",
    "naive": "has no seed per row; each stream takes a forward of its own",
    "llama.cpp": "is the adapter alone; its times are means of runs by its own clock",
}
LESS = ("base", "naive", "two streams")  # what runs in the cases that are no headline


def peak_of(way: Way, tokens: int, ids: Tensor) -> float:
    """MiB of the second of two runs."""
    text = way(tokens, Clock(len(ids), ids.device))
    if text.shape != (ids.shape[0], ids.shape[1] + tokens):
        raise RuntimeError(f"expected {tokens} new tokens a row, got {tuple(text.shape)}")
    with harness.peak_memory(ids.device.type) as peak:
        way(tokens, Clock(len(ids), ids.device))
    return peak.mebibytes


def timed(way: Way, new: int, clock: Clock) -> tuple[float, list[float]]:
    """Milliseconds to the first token, and from each to the next."""
    harness.synchronize(clock.never.device.type)
    start = time.perf_counter()
    way(new, clock)
    if len(clock.times) != new:
        raise RuntimeError(f"expected {new} steps, got {len(clock.times)}")
    steps = [(b - a) * 1e3 for a, b in itertools.pairwise(clock.times)]
    return (clock.times[0] - start) * 1e3, steps


def run_case(
    ways: dict[str, Way], ids: Tensor, rounds: int, options: argparse.Namespace
) -> list[Row]:
    # Static caches compile for each length.
    tokens = options.new_tokens if options.cache == "static" else min(options.new_tokens, 8)
    known, missing = bench.first_runs(
        ways, lambda name: {"peak_mib": peak_of(ways[name], tokens, ids)}, decoding.OURS
    )
    prefill: dict[str, list[float]] = {name: [] for name in known}
    steps: dict[str, list[float]] = {name: [] for name in known}
    gc.collect()
    for _ in range(rounds):
        for name in known:
            clock = Clock(len(ids), ids.device)
            first, others = timed(ways[name], options.new_tokens, clock)
            prefill[name].append(first)
            steps[name] += others
    timings = {name: harness.Timing.of(samples) for name, samples in steps.items()}
    means = {name: statistics.fmean(samples) for name, samples in steps.items()}
    rows = []
    for name, timing in timings.items():
        row = {"who": name, "ms": timing, "mean_ms": means[name], **known[name]}
        row["prefill_ms"] = statistics.median(prefill[name])
        for peer in ("base", "naive"):
            if peer in timings:
                row[f"times_{peer}"] = timing.median / timings[peer].median
                row[f"times_{peer}_mean"] = means[name] / means[peer]
        rows.append(row)
    return rows + missing


@torch.no_grad()
def parts(
    competitors: Competitors, mask: Tensor, mode: str, token_ms: float, options: argparse.Namespace
) -> dict[str, Any]:
    """Milliseconds of the pieces of one decoding step, of ``token_ms`` in all, see the top."""
    model, base = competitors.ours, competitors.base
    batch, vocab, device = len(mask), base.config.vocab_size, base.device
    streams, trunk = model.streams((None, model.adapter_names[0])), base.base_model
    if streams.reason is not None:
        raise RuntimeError(f"two streams do not run in one forward: {streams.reason}")
    seen = torch.cat([mask, mask.new_ones(batch, options.new_tokens // 2)], 1)
    whole: Tensor | None = torch.cat([seen, seen[:, -1:]], 1)
    prompt = torch.randint(5, vocab, tuple(seen.shape), device=device)
    places = (seen.cumsum(-1) - 1).clamp(min=0)
    token, place = prompt[:, :1], places[:, -1:] + 1
    if bool(mask.all()):
        seen = whole = None
    own, theirs = DynamicCache(), DynamicCache()
    grow_in_place(own)  # as generate does
    with streams.installed():
        streams.hidden(prompt, seen, places, own)
    trunk(prompt, attention_mask=seen, position_ids=places, past_key_values=theirs)
    hidden = torch.randn(batch, base.config.hidden_size, device=device).to(base.dtype)
    head = model.hf_model.get_output_embeddings()
    logits, seed = head(hidden), torch.arange(batch, device=device)
    filters: dict[str, Any] = {"temperature": 0.0} if mode == "greedy" else decoding.MODES[mode]

    def both_streams() -> None:
        streams.hidden(token, whole, place, own)
        own.crop(-1)

    def base_alone() -> None:
        trunk(token, attention_mask=whole, position_ids=place, past_key_values=theirs)
        theirs.crop(-1)

    functions: dict[str, Callable[[], Any]] = {
        "forward": both_streams,
        "head": lambda: head(hidden),
        "sampler": lambda: QF.sample(None, logits, seed=seed, position=seed, **filters),
        "base forward": base_alone,
    }
    settings = {"device": options.device, "rounds": 21, "seconds": 3.0, "warmup": 1, "least": 3}
    with streams.installed():
        times = harness.interleaved(functions, **settings)
    known = sum(times[name].median for name in ("forward", "head", "sampler"))
    return {**times, "two streams": token_ms, "rest": token_ms - known}


def ways_of(case: Row, options: argparse.Namespace) -> tuple[str, ...]:
    """All ways take part in the first LoRA and mode, fewer where only one of the two differs, none
    where both do."""
    first = (case["lora"] == options.lora[0]) + (case["mode"] == options.mode[0])
    return ((), LESS, decoding.WAYS)[first]


def run(options: argparse.Namespace) -> recording.Recording:
    recorded = recording.Recording(
        "decode",
        options,
        CASE,
        new_tokens=options.new_tokens,
        strength=decoding.STRENGTH,
        modes=decoding.MODES,
        cache=options.cache,
        dtype="bf16",
        cannot=CANNOT,
    )
    base = load_base(options.model, options.device)
    made: dict[str, Competitors] = {}
    cases = bench.grid(
        model=[options.model], lora=options.lora, mode=options.mode, batch=options.batch_sizes
    )
    for case in recorded.todo([case for case in cases if ways_of(case, options)]):
        chosen, which, mode = ways_of(case, options), case["lora"], case["mode"]
        if which not in made:
            made = {which: Competitors(base, which, options.cache)}
        ids, mask = decoding.prompts(base, options.model, case["batch"])
        ways = made[which].ways(ids, mask, mode)
        rounds = options.rounds if chosen == decoding.WAYS else max(1, options.rounds - 1)
        taking = chosen
        if chosen == decoding.WAYS and decoding.LLAMA_CPP in ways:
            taking = (*chosen, decoding.LLAMA_CPP)
        rows = run_case({name: ways[name] for name in taking}, ids, rounds, options)
        token_ms = next(row["ms"].median for row in rows if row["who"] == "two streams")
        pieces = parts(made[which], mask, mode, token_ms, options)
        others = recorded.more.get("parts", [])
        others = [part for part in others if any(part[name] != case[name] for name in CASE)]
        recorded.more["parts"] = [*others, {**case, **pieces}]
        lengths = {"rounds": rounds, "prompt_tokens": mask.sum(1).tolist()}
        cells = (f"{name} {getattr(ms, 'median', ms):.2f}" for name, ms in pieces.items())
        text = f"{recording.show(rows)}\nparts, ms: {', '.join(cells)}"
        recorded.put(case, [{**lengths, **row} for row in rows], text)
    return recorded


if __name__ == "__main__":
    bench.main(sys.modules[__name__])
