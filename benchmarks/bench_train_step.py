"""A whole training step on real text: ours against the released way, on the same pairs and model.

python -m benchmarks.bench_train_step --data pairs.jsonl [--pairs 4 --batches 3 --threads 2]

Ours: base pass without gradient, adapter pass, head on the response rows alone, fused loss,
backward. Peak memory is what the step adds to the loaded model.
"""

import argparse

import torch
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks import harness
from benchmarks.peers import released
from qadapter import QAdapterModel
from qadapter import functional as QF
from qadapter.checkpoint import resolve_model
from qadapter.data import (
    PreferenceCollator,
    eos_token_ids,
    load_preference_data,
    pad_token_id,
    prepare_dataset,
)


def our_step(model: QAdapterModel, batch: dict[str, Tensor]) -> Tensor:
    logits = model(batch["input_ids"], batch["attention_mask"], batch["rows"])
    loss = QF.qadapter_loss(
        logits.base_logits,
        logits.q_logits,
        batch["actions"],
        batch["cu_seqlens"],
        **model.composition,
    ).loss
    loss.backward()
    return loss.detach()


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
    collate = PreferenceCollator(pad_token_id(tokenizer))
    report = []
    for number in range(options.batches):
        batch = collate(rows[number * options.pairs : (number + 1) * options.pairs])
        batch = {name: tensor.to(options.device) for name, tensor in batch.items()}
        labels = released.labels_of(batch)
        ways = {
            "ours": lambda batch=batch: our_step(model, batch),
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
                "response rows": batch["rows"].numel(),
                **{f"{name} ms": timing for name, timing in timings.items()},
                **{f"{name} peak MiB": peak for name, peak in peaks.items()},
            }
        )
    print(
        harness.table(
            ["tokens", "padded", "rows", "released s/pair", "ours s/pair", "speed-up",
             "released MiB", "ours MiB", "memory"],
            [
                [
                    str(r["tokens"]), str(r["padded"]), str(r["response rows"]),
                    f"{r['released ms'].median / 1e3 / options.pairs:.2f}",
                    f"{r['ours ms'].median / 1e3 / options.pairs:.2f}",
                    f"{r['released ms'].median / r['ours ms'].median:.2f}x",
                    f"{r['released peak MiB']:.0f}", f"{r['ours peak MiB']:.0f}",
                    f"{r['ours peak MiB'] / r['released peak MiB']:.2f}",
                ]
                for r in report
            ],
        )
    )  # fmt: skip
    harness.write_json(
        "train_step", options.device, report, options.json,
        model=options.model, pairs=options.pairs, max_length=options.max_length,
    )  # fmt: skip


if __name__ == "__main__":
    main()
