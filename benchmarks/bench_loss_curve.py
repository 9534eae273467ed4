"""Whether the default step trains as the logits path does: both losses, update by update.

    python -m benchmarks.bench_loss_curve [--data pairs.jsonl --steps 50 --pairs 2 --dtype bfloat16]

Same model, seed and order of pairs; packed and without logits against padded with logits.
"""

import argparse
import tempfile

import torch

from benchmarks import bench, recording, training_problem
from qadapter import QAdapterConfig, QAdapterModel, QAdapterTrainer
from qadapter.model.checkpoint import resolve_model
from qadapter.text.data import load_preference_data

WAYS = {"default": {}, "logits": {"packing": False, "use_logits": True}}


def curve(options: argparse.Namespace, folder: str, settings: dict[str, bool]) -> list[float]:
    torch.manual_seed(0)
    model = QAdapterModel.from_pretrained(resolve_model(options.model), dtype=options.base_dtype)
    config = QAdapterConfig(
        output_dir=folder,
        max_steps=options.steps,
        per_device_train_batch_size=options.pairs,
        max_length=options.max_length,
        drop_long_prompts=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=0,
        **settings,
    )
    trainer = QAdapterTrainer(model, config, train_dataset=load_preference_data(options.data))
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def run(options: argparse.Namespace) -> recording.Recording:
    recorded = recording.Recording("loss_curves", options, ("dtype",), model=options.model)
    # One file holds the runs of several dtypes.
    runs = recorded.more.setdefault("runs", {})
    for case in recorded.todo(bench.grid(dtype=options.dtype)):
        with tempfile.TemporaryDirectory() as folder:
            options.base_dtype = case["dtype"]
            found = {way: curve(options, folder, settings) for way, settings in WAYS.items()}
        pairs = zip(found["default"], found["logits"], strict=True)
        largest = max(abs(a - b) / b for a, b in pairs)
        runs[case["dtype"]] = {"pairs": options.pairs, **found}
        text = f"largest relative difference over {options.steps} updates: {largest:.2e}"
        recorded.put(case, [{"largest_difference": largest, "steps": options.steps}], text)
    return recorded


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = bench.parser("loss_curves", __doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", default=training_problem.DEMO)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=2, help="in an update")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], help="of the base")
    options = bench.parse(parser, arguments, {})
    if options.quick:
        options.steps, options.dtype = min(options.steps, 1), options.dtype[:1]
    return options


if __name__ == "__main__":
    bench.main(parse, run)
