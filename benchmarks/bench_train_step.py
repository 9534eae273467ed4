"""A whole training step on real text: ours against the released way, on the same pairs and model.

python -m benchmarks.bench_train_step --data pairs.jsonl [--pairs 4 --batches 3 --threads 2]

Ours: base pass without gradient and adapter pass over a pack of the real tokens, prompts once; the
loss from the hidden states of the response rows; backward. "cached" has the base's two floats a
token from a cache, and no base pass. Peak memory is what the step adds to the loaded model.
"""

import argparse
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks import harness
from benchmarks.peers import released
from qadapter import QAdapterModel, packed_attention
from qadapter import functional as QF
from qadapter.checkpoint import resolve_model
from qadapter.data import (
    PackedPreferenceCollator,
    PreferenceCollator,
    eos_token_ids,
    load_preference_data,
    pad_token_id,
    prepare_dataset,
)


def our_step(model: QAdapterModel, batch: dict[str, Any]) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name != "cu_seqlens"}
    values = model(**inputs).values
    loss = QF.preference_loss(values, batch["actions"], batch["cu_seqlens"]).loss
    loss.backward()
    return loss.detach()


def to(device: str, batch: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", required=True)
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
    pairs = load_preference_data(options.data).select(range(options.pairs * options.batches))
    rows = list(
        prepare_dataset(
            pairs,
            tokenizer,
            max_length=options.max_length,
            eos_token_ids=eos_token_ids(model, tokenizer),
        )
    )
    collate, pack = PreferenceCollator(pad_token_id(tokenizer)), PackedPreferenceCollator()
    if (reason := packed_attention.enable(model.hf_model)) is not None:
        raise SystemExit(f"this model cannot be packed: {reason}")
    report = []
    for number in range(options.batches):
        part = rows[number * options.pairs : (number + 1) * options.pairs]
        batch, packed = to(options.device, collate(part)), to(options.device, pack(part))
        statistics = model.base_statistics(packed)
        cached = {**packed, **{k: statistics[k] for k in ("base_lse", "base_logp")}}
        labels = released.labels_of(batch)
        ways = {
            "ours": lambda packed=packed: our_step(model, packed),
            "cached": lambda cached=cached: our_step(model, cached),
            "released": lambda batch=batch, labels=labels: released.step(model, batch, labels),
        }
        peaks = {}
        for name, way in ways.items():
            way()
            model.zero_grad(set_to_none=True)
            with harness.peak_memory(options.device) as peak:
                way()
            peaks[name] = peak.mebibytes
        timings = harness.interleaved(
            ways, device=options.device, rounds=max(5, options.rounds), warmup=0
        )
        model.zero_grad(set_to_none=True)
        report.append(
            {
                "tokens": int(batch["attention_mask"].sum()),
                "padded": batch["input_ids"].numel(),
                "packed": packed["input_ids"].numel(),
                "response rows": batch["rows"].numel(),
                **{f"{name} ms": timing for name, timing in timings.items()},
                **{f"{name} peak MiB": peak for name, peak in peaks.items()},
            }
        )
    for way in ("ours", "cached", "released"):
        total = {
            "way": way,
            "s per pair": sum(r[f"{way} ms"].median for r in report) / 1e3
            / (options.pairs * options.batches),
            "peak MiB": max(r[f"{way} peak MiB"] for r in report),
        }  # fmt: skip
        print(f"{way}: {total['s per pair']:.3f} s per pair, peak {total['peak MiB']:.0f} MiB")
    header = ["tokens", "padded", "packed", "rows", "released s/pair", "ours", "cached",
              "released MiB", "ours", "cached"]  # fmt: skip
    lines = []
    for r in report:
        released_ms, peak = r["released ms"].median, r["released peak MiB"]
        lines.append(
            [
                *(str(r[name]) for name in ("tokens", "padded", "packed", "response rows")),
                f"{released_ms / 1e3 / options.pairs:.2f}",
                *(f"{released_ms / r[f'{way} ms'].median:.2f}x" for way in ("ours", "cached")),
                f"{peak:.0f}",
                *(f"{r[f'{way} peak MiB'] / peak:.2f}" for way in ("ours", "cached")),
            ]
        )
    print(harness.table(header, lines))
    harness.write_json(
        "train_step", options.device, report, options.json,
        model=options.model, pairs=options.pairs, max_length=options.max_length,
    )  # fmt: skip


if __name__ == "__main__":
    main()
