"""A whole training step on real text: ours against the released way and TRL's DPO, on the same
pairs and weights.

    python -m benchmarks.bench_train_step [--data pairs.jsonl --pairs 4 --batches 3 --threads 2]
    python -m benchmarks.bench_train_step --scaling

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
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness, recording, training_problem
from benchmarks.training_problem import CANNOT, PARTS, WAYS, Setup, make_batch


def measure(setup: Setup, pairs: list[Any], options: argparse.Namespace) -> dict[str, Any]:
    device, model = options.device, setup.model
    batch = make_batch(setup, pairs, tuple(options.ways))
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
    pieces = {} if options.no_parts else {"parts": training_problem.parts(setup, batch, 3)}
    return {
        **batch.sizes(),
        **{f"{name} ms": timing for name, timing in timings.items()},
        **{f"{name} peak MiB": peak for name, peak in peaks.items()},
        **pieces,
    }


def show(row: dict[str, Any], pairs: int) -> str:
    header = ["", "s/pair (p20-p80)", "x ours", "MiB", "x ours"]
    lines = []
    for way in WAYS:
        if f"{way} ms" not in row:
            continue
        timing, peak = row[f"{way} ms"], row[f"{way} peak MiB"]
        of_ours = peak / row["ours peak MiB"] if row["ours peak MiB"] else float("nan")
        lines.append(
            [
                way,
                "{:.3f} ({:.3f}-{:.3f})".format(
                    *(ms / 1e3 / pairs for ms in (timing.median, timing.p20, timing.p80))
                ),
                f"{timing.median / row['ours ms'].median:.2f}",
                f"{peak:.0f}",
                f"{of_ours:.2f}",
            ]
        )
    sizes = ", ".join(f"{row[k]} {k}" for k in ("tokens", "padded", "packed", "response rows"))
    text = f"{sizes}\n{harness.table(header, lines)}"
    if "parts" in row:
        parts = [f"{name} {row['parts'][name].median:.1f}" for name in (*PARTS, "step")]
        text += f"\nparts of ours, ms: {', '.join(parts)}, rest {row['parts']['rest']:.1f}"
    return text


def run(options: argparse.Namespace) -> recording.Recording:
    name, case = "train_step", "batch"
    if options.scaling:
        name, case = "train_step_scaling", "length"
    elif options.shuffle is not None:
        name = "train_step_shuffled"
    setup = training_problem.load(options.model, options.device, WAYS[3] in options.ways)
    more: dict[str, Any] = {"model": options.model, "cannot": CANNOT, "missing": setup.missing}
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
        recorded.put(chosen, [row], "\n".join([show(row, len(pairs)), *missing]))
    return recorded


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="smollm2, a folder or a Hub id, or tiny (random weights)")
    parser.add_argument(
        "--data",
        default=training_problem.DEMO,
        help="preference pairs, a file or a Hub id; default the demo's, which are short",
    )
    parser.add_argument("--shuffle", type=int, help="seed; default, the order of the file")
    parser.add_argument("--scaling", action="store_true", help="against the length of responses")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--no-parts", action="store_true")
    parser.add_argument("--pairs", type=int, default=4, help="pairs in a micro-batch")
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=512)
    recording.shared_options(parser, "train_step[_scaling]")
    options = parser.parse_args(arguments)
    if options.model is None:
        options.model = "tiny" if options.quick else "smollm2"
    if options.quick:  # random weights have no tokenizer, so no text
        options.scaling, options.rounds, options.lengths = True, 1, options.lengths[:1]
    if "ours" not in options.ways:
        options.ways.insert(0, "ours")
    recording.finish_options(options)
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    run(options)


if __name__ == "__main__":
    main()
