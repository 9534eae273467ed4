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
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks import harness, recording
from benchmarks.decoding_problem import (
    LORAS,
    MODES,
    OURS,
    SHAPES,
    STRENGTH,
    WAYS,
    Clock,
    Competitors,
    Way,
    load_base,
    prompts,
)
from qadapter import functional as QF

DEFAULTS: dict[str, tuple[str, list[int], int, int]] = {  # model, batches, new tokens, rounds
    "cpu": ("smollm2", [1, 8], 128, 3),
    "cuda": ("llama-8b", [1, 8], 128, 5),
    "quick": ("tiny", [1, 2], 8, 1),
}
CASE = ("model", "batch", "mode", "lora")
CANNOT = {
    "base": "is the base alone: it knows nothing of the preference",
    "lora": "is the adapter alone: it cannot be blended with the base",
    "naive": "has no seed per row; each stream takes a forward of its own",
}
LESS = ("base", "naive", "two streams")  # what runs in the cases that are no headline


def warmed(
    ways: dict[str, Way], clock: Callable[[], Clock], tokens: int, shape: tuple[int, int]
) -> tuple[dict[str, float], dict[str, str]]:
    """Each runs twice: peak memory in MiB of who could, and who is missing and why."""
    ran: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name, way in ways.items():
        try:
            text = way(tokens, clock())
        except Exception as error:  # a peer that fails must not end the comparison
            if name in OURS:
                raise
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            continue
        if text.shape != (shape[0], shape[1] + tokens):
            raise RuntimeError(f"{name}: expected {tokens} new tokens, got {tuple(text.shape)}")
        with harness.peak_memory(clock().never.device.type) as peak:
            way(tokens, clock())
        ran[name] = peak.mebibytes
    return ran, missing


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
) -> list[dict[str, Any]]:
    def clock() -> Clock:
        return Clock(len(ids), ids.device)

    # Static caches compile for each length.
    tokens = options.new_tokens if options.cache == "static" else min(options.new_tokens, 8)
    ran, missing = warmed(ways, clock, tokens, (ids.shape[0], ids.shape[1]))
    prefill: dict[str, list[float]] = {name: [] for name in ran}
    steps: dict[str, list[float]] = {name: [] for name in ran}
    gc.collect()
    for _ in range(rounds):
        for name in ran:
            first, others = timed(ways[name], options.new_tokens, clock())
            prefill[name].append(first)
            steps[name] += others
    timings = {name: harness.Timing.of(samples) for name, samples in steps.items()}
    means = {name: statistics.fmean(samples) for name, samples in steps.items()}
    rows = []
    for name, timing in timings.items():
        row = {"who": name, "ms": timing, "mean_ms": means[name], "peak_mib": ran[name]}
        row["prefill_ms"] = statistics.median(prefill[name])
        for peer in ("base", "naive"):
            if peer in timings:
                row[f"times_{peer}"] = timing.median / timings[peer].median
                row[f"times_{peer}_mean"] = means[name] / means[peer]
        rows.append(row)
    return rows + [{"who": name, "missing": reason} for name, reason in missing.items()]


@torch.no_grad()
def parts(
    competitors: Competitors, mask: Tensor, mode: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Milliseconds of the pieces of one decoding step, see the top of this file."""
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
    with streams.installed():
        streams.hidden(prompt, seen, places, own)
    trunk(prompt, attention_mask=seen, position_ids=places, past_key_values=theirs)
    hidden = torch.randn(batch, base.config.hidden_size, device=device).to(base.dtype)
    head = model.hf_model.get_output_embeddings()
    logits, seed = head(hidden), torch.arange(batch, device=device)
    filters: dict[str, Any] = {"temperature": 0.0} if mode == "greedy" else MODES[mode]

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
    with streams.installed():
        return dict(
            harness.interleaved(
                functions, device=options.device, rounds=21, seconds=3.0, warmup=1, least=3
            )
        )


def with_rest(pieces: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    total = next(row["ms"].median for row in rows if row["who"] == "two streams")
    known = sum(pieces[name].median for name in ("forward", "head", "sampler"))
    return {**pieces, "two streams": total, "rest": total - known}


def all_cases(options: argparse.Namespace) -> list[tuple[str, str, int, list[str]]]:
    """LoRA, mode, batch, ways. Every way takes part in the first of the LoRAs and of the modes."""
    cases = []
    for which, mode, batch in itertools.product(options.lora, options.mode, options.batch_sizes):
        headline = (which, mode) == (options.lora[0], options.mode[0])
        if headline or options.full:
            cases.append((which, mode, batch, options.ways))
        elif which == options.lora[0] or mode == options.mode[0]:
            cases.append((which, mode, batch, [way for way in options.ways if way in LESS]))
    return cases


def run(options: argparse.Namespace) -> recording.Recording:
    recorded = recording.Recording(
        "decode",
        options,
        CASE,
        new_tokens=options.new_tokens,
        strength=STRENGTH,
        modes=MODES,
        cache=options.cache,
        dtype="bf16",
        cannot=CANNOT,
    )
    base = load_base(options.model, options.device)
    made: dict[str, Competitors] = {}
    ways_of = {}
    for which, mode, batch, chosen in all_cases(options):
        case = dict(zip(CASE, (options.model, batch, mode, which), strict=True))
        ways_of[tuple(case.values())] = chosen
    for case in recorded.todo([dict(zip(CASE, key, strict=True)) for key in ways_of]):
        _, batch, mode, which = case.values()
        chosen = ways_of[tuple(case.values())]
        if which not in made:
            made = {which: Competitors(base, which, options.cache, options.ways)}
        ids, mask = prompts(base, options.model, batch)
        ways = made[which].ways(ids, mask, mode)
        ways = {name: way for name, way in ways.items() if name in chosen}
        rounds = options.rounds if chosen == options.ways else max(1, options.rounds - 1)
        rows = run_case(ways, ids, rounds, options)
        text = show(rows)
        pieces = recorded.more.get("parts", [])
        if "two streams" in chosen:
            taken = with_rest(parts(made[which], mask, mode, options), rows)
            pieces = [p for p in pieces if any(p[name] != case[name] for name in CASE)]
            pieces.append({**case, **taken})
            text = f"{text}\n{show_parts(taken)}"
        recorded.more["parts"] = pieces
        lengths = {"rounds": rounds, "prompt_tokens": mask.sum(1).tolist()}
        recorded.put(case, [{**lengths, **row} for row in rows], text)
    return recorded


def show(rows: list[dict[str, Any]]) -> str:
    header = ["who", "ms a token (p20-p80)", "mean", "x base", "mean", "x naive", "mean", "prefill"]
    ratios = ("times_base", "times_base_mean", "times_naive", "times_naive_mean")
    lines = []
    for row in rows:
        if "missing" in row:
            continue
        timing = row["ms"]
        lines.append(
            [
                row["who"],
                f"{timing.median:.2f} ({timing.p20:.2f}-{timing.p80:.2f})",
                f"{row['mean_ms']:.2f}",
                *(f"{row[name]:.2f}" if name in row else "" for name in ratios),
                f"{row['prefill_ms']:.1f}",
            ]
        )
    missing = [f"{row['who']}: {row['missing']}" for row in rows if "missing" in row]
    return "\n".join([harness.table(header, lines), *missing])


def show_parts(pieces: dict[str, Any]) -> str:
    cells = {name: t if isinstance(t, float) else t.median for name, t in pieces.items()}
    return "parts, ms: " + ", ".join(f"{name} {ms:.2f}" for name, ms in cells.items())


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help=f"smollm2, a folder or a Hub id, or {', '.join(SHAPES)}")
    parser.add_argument("--batch-sizes", type=int, nargs="+", metavar="B")
    parser.add_argument("--new-tokens", type=int, help="at least 2")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=["sampled", "greedy"])
    parser.add_argument("--lora", nargs="+", choices=LORAS, default=list(LORAS))
    parser.add_argument("--full", action="store_true", help="every way in every case")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--cache", choices=("dynamic", "static"), help="static on a GPU")
    parser.add_argument("--rounds", type=int)
    recording.shared_options(parser, "decode")
    options = parser.parse_args(arguments)
    defaults = DEFAULTS["quick" if options.quick else options.device]
    for name, value in zip(("model", "batch_sizes", "new_tokens", "rounds"), defaults, strict=True):
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.new_tokens < 2:
        parser.error(f"--new-tokens: expected at least 2, got {options.new_tokens}")
    if options.cache is None:
        options.cache = "static" if options.device == "cuda" else "dynamic"
    recording.finish_options(options)
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    run(options)


if __name__ == "__main__":
    main()
