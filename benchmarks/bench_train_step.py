"""A whole training step on real text: ours, the released way and TRL's DPO, on the same weights.

    python -m benchmarks.bench_train_step [--data pairs.jsonl --pairs 4 --batches 3 --threads 2]
    python -m benchmarks.bench_train_step --scaling
    python -m benchmarks.bench_train_step --lora "query and value"

Ours: base pass without gradient and adapter pass over a pack of the real tokens, prompts once; the
loss from the hidden states of the response rows; backward. "cached" has the base's two floats a
token from a cache, and no base pass. Peak memory is what the step adds to the loaded model. Beside
them, the parts of our step one by one: trunk, head and loss, backward, optimiser.

Floor: a pass over a token is 2 FLOPs a weight of the trunk, and the trunk is passed three times
(base, adapter, backward to the activations; no weight but LoRA has a gradient), a row of the head
three times. ``--scaling`` takes one pair of two equally long responses to a prompt of 16 tokens,
without padding: what is left to gain there is the head alone.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks import bench, harness, recording, training_problem
from benchmarks.peers.training import CANNOT
from benchmarks.tables import Row
from benchmarks.training_problem import WAYS, Setup, make_batch

OPTIONS: bench.Options = {
    "model": ("smollm2", "smollm2", "tiny"),
    "lora": "all linear",  # the default of a training
    "dtype": "auto",  # as training takes it, by what the CPU has; --dtype float32 where it is held
    "data": training_problem.DEMO,
    "shuffle": int,
    "pairs": 4,
    "batches": 3,
    "max_length": 512,
    "rounds": (3, 3, 1),
    "scaling": (False, False, True),  # the tiny model has no tokenizer, so no text
    "lengths": ([128, 256, 512, 1024, 2048], [128, 256, 512, 1024, 2048], [128]),
}
CHOICES = {"lora": list(training_problem.LORA), "dtype": ["auto", "float32", "bfloat16"]}


def measure(setup: Setup, pairs: list[Any], options: argparse.Namespace) -> dict[str, Any]:
    device, model = options.device, setup.model
    batch = make_batch(setup, pairs)
    peaks = {}
    for name, way in batch.ways.items():
        way()
        model.zero_grad(set_to_none=True)
        with harness.peak_memory(device) as peak:
            way()
        peaks[name] = peak.mebibytes
    timings = harness.interleaved(
        batch.ways, device=device, rounds=options.rounds, warmup=0, least=options.rounds
    )
    model.zero_grad(set_to_none=True)
    return {
        **batch.sizes(),
        **{f"{name} ms": timing for name, timing in timings.items()},
        **{f"{name} peak MiB": peak for name, peak in peaks.items()},
        "parts": training_problem.parts(setup, batch, 3),
    }


def show(row: Row) -> str:
    names = [way for way in WAYS if f"{way} ms" in row]
    ways = [{"who": w, "ms": row[f"{w} ms"], "peak_mib": row[f"{w} peak MiB"]} for w in names]
    sizes = ", ".join(f"{row[k]} {k}" for k in ("tokens", "padded", "packed", "response rows"))
    parts = [f"{name} {getattr(ms, 'median', ms):.1f}" for name, ms in row["parts"].items()]
    return f"{sizes}\n{recording.show(ways)}\nparts of ours, ms: {', '.join(parts)}"


def run(options: argparse.Namespace) -> recording.Recording:
    name, case = "train_step", "batch"
    if options.scaling:
        name, case = "train_step_scaling", "length"
    elif options.shuffle is not None:
        name = "train_step_shuffled"
    setup = training_problem.load(options.model, options.device, options.lora, options.dtype)
    more: dict[str, Any] = {
        "model": options.model,
        "lora": options.lora,
        "dtype": str(setup.model.hf_model.dtype).removeprefix("torch."),
        "cannot": CANNOT,
        "missing": setup.missing,
    }
    if not options.scaling:
        more |= {"pairs": options.pairs, "max_length": options.max_length}
        more["data"] = Path(options.data).name
    recorded = recording.Recording(name, options, (case,), **more)
    tokenised = [] if options.scaling else training_problem.real_pairs(setup, options)
    values = options.lengths if options.scaling else range(options.batches)
    for chosen in recorded.todo([{case: value} for value in values]):
        if options.scaling:
            pairs = [training_problem.random_pair(setup, chosen[case])]
        else:
            start = chosen[case] * options.pairs
            pairs = tokenised[start : start + options.pairs]
        row = measure(setup, pairs, options)
        missing = [f"{who}: {reason}" for who, reason in setup.missing.items()]
        recorded.put(chosen, [row], "\n".join([show(row), *missing]))
    return recorded


if __name__ == "__main__":
    bench.main(sys.modules[__name__])
