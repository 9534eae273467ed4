"""A whole training step on real text: ours against the released way, on the same pairs and model.

    python -m benchmarks.bench_train_step [--data pairs.jsonl --pairs 4 --batches 3 --threads 2]
    python -m benchmarks.bench_train_step --scaling

Ours: base pass without gradient and adapter pass over a pack of the real tokens, prompts once; the
loss from the hidden states of the response rows; backward. "cached" has the base's two floats a
token from a cache, and no base pass. Peak memory is what the step adds to the loaded model.

Floor: a pass over a token is 2 FLOPs a weight of the trunk, and the trunk is passed three times
(base, adapter, backward to the activations; no weight but LoRA has a gradient), a row of the head
three times. ``--scaling`` takes one pair of two equally long responses to a prompt of 16 tokens,
without padding: what is left to gain there is the head alone.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

import qadapter
from benchmarks import harness
from benchmarks.peers import released
from qadapter import QAdapterModel, packed_attention
from qadapter import functional as QF
from qadapter.checkpoint import resolve_model
from qadapter.data import (
    PreferenceCollator,
    eos_token_ids,
    load_preference_data,
    pad_token_id,
    prepare_dataset,
)
from qadapter.packing import PackedPreferenceCollator


def our_step(model: QAdapterModel, batch: dict[str, Any]) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name != "cu_seqlens"}
    values = model(**inputs).values
    loss = QF.preference_loss(values, batch["actions"], batch["cu_seqlens"]).loss
    loss.backward()
    return loss.detach()


def to(device: str, batch: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def measure(
    model: QAdapterModel, pairs: list[Any], pad: int, options: argparse.Namespace
) -> dict[str, Any]:
    device = options.device
    batch, packed = PreferenceCollator(pad)(pairs), PackedPreferenceCollator()(pairs)
    batch, packed = to(device, batch), to(device, packed)
    statistics = model.base_statistics(packed)
    cached = {**packed, **{k: statistics[k] for k in ("base_lse", "base_logp")}}
    labels = released.labels_of(batch)
    ways = {
        "ours": lambda: our_step(model, packed),
        "cached": lambda: our_step(model, cached),
        "released": lambda: released.step(model, batch, labels),
    }
    peaks = {}
    for name, way in ways.items():
        way()
        model.zero_grad(set_to_none=True)
        with harness.peak_memory(device) as peak:
            way()
        peaks[name] = peak.mebibytes
    timings = harness.interleaved(
        ways, device=device, rounds=options.rounds, warmup=0, least=options.rounds
    )
    model.zero_grad(set_to_none=True)
    return {
        "tokens": int(batch["attention_mask"].sum()),
        "padded": batch["input_ids"].numel(),
        "packed": packed["input_ids"].numel(),
        "response rows": batch["rows"].numel(),
        **{f"{name} ms": timing for name, timing in timings.items()},
        **{f"{name} peak MiB": peak for name, peak in peaks.items()},
    }


def show(report: list[dict[str, Any]], pairs: int) -> None:
    header = ["tokens", "padded", "packed", "rows", "released s/pair", "ours", "cached",
              "released MiB", "ours", "cached"]  # fmt: skip
    lines = []
    for r in report:
        released_ms, peak = r["released ms"].median, r["released peak MiB"]
        lines.append(
            [
                *(str(r[name]) for name in ("tokens", "padded", "packed", "response rows")),
                f"{released_ms / 1e3 / pairs:.2f}",
                *(f"{released_ms / r[f'{way} ms'].median:.2f}x" for way in ("ours", "cached")),
                f"{peak:.0f}",
                *(f"{r[f'{way} peak MiB'] / peak:.2f}" for way in ("ours", "cached")),
            ]
        )
    print(harness.table(header, lines), flush=True)


def scaling(model: QAdapterModel, options: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(0)
    vocab = model.config.get_text_config().vocab_size
    report = []
    for length in options.lengths:
        ids = torch.randint(3, vocab, (16 + 2 * length,), generator=generator).tolist()
        chosen, rejected = ids[16 : 16 + length], ids[16 + length :]
        pair = {"prompt_ids": ids[:16], "chosen_ids": chosen, "rejected_ids": rejected}
        report.append({"length": length, **measure(model, [pair], 0, options)})
        show(report[-1:], 1)
    harness.write_json(
        "train_step_scaling", options.device, report, options.json, model=options.model
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument(
        "--data",
        default=str(Path(qadapter.__file__).parent / "demo_data" / "train.jsonl"),
        help="preference pairs, a file or a Hub id; default the demo's, which are short",
    )
    parser.add_argument("--shuffle", type=int, help="seed; default, the order of the file")
    parser.add_argument("--scaling", action="store_true", help="against the length of responses")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--pairs", type=int, default=4, help="pairs in a micro-batch")
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    source = resolve_model(options.model)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = QAdapterModel.from_pretrained(source).to(options.device)
    model.train()
    if (reason := packed_attention.enable(model.hf_model)) is not None:
        raise SystemExit(f"this model cannot be packed: {reason}")
    if options.scaling:
        scaling(model, options)
        return
    data = load_preference_data(options.data)
    data = data if options.shuffle is None else data.shuffle(seed=options.shuffle)
    pairs = data.select(range(options.pairs * options.batches))
    rows = list(
        prepare_dataset(
            pairs,
            tokenizer,
            max_length=options.max_length,
            eos_token_ids=eos_token_ids(model, tokenizer),
        )
    )
    report = []
    for number in range(options.batches):
        part = rows[number * options.pairs : (number + 1) * options.pairs]
        report.append(measure(model, part, pad_token_id(tokenizer), options))
    show(report, options.pairs)
    name = "train_step" if options.shuffle is None else "train_step_shuffled"
    harness.write_json(
        name, options.device, report, options.json,
        model=options.model, pairs=options.pairs, max_length=options.max_length,
    )  # fmt: skip


if __name__ == "__main__":
    main()
