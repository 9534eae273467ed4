"""Whether the default step trains as the logits path does: both losses, update by update.

    python -m benchmarks.bench_loss_curve [--data pairs.jsonl --steps 50 --pairs 2 --dtype bfloat16]

Same model, seed and order of pairs; packed and without logits against padded with logits.
"""

import argparse
import sys
import tempfile

import torch

from benchmarks import bench, recording, training_problem
from qadapter import QAdapterConfig, QAdapterModel, QAdapterTrainer
from qadapter.model.checkpoint import resolve_model
from qadapter.text.data import load_preference_data

OPTIONS: bench.Options = {
    "model": "smollm2",
    "data": training_problem.DEMO,
    "steps": (50, 50, 1),
    "pairs": 2,  # in an update
    "max_length": 512,
    "dtype": (["float32", "bfloat16"], ["float32", "bfloat16"], ["float32"]),  # of the base
}
WAYS = {"default": {}, "logits": {"packing": False, "use_logits": True}}


def curve(options: argparse.Namespace, dtype: str, settings: dict[str, bool]) -> list[float]:
    """The losses of all updates."""
    torch.manual_seed(0)
    model = QAdapterModel.from_pretrained(resolve_model(options.model), dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
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
        found = {way: curve(options, case["dtype"], settings) for way, settings in WAYS.items()}
        pairs = zip(found["default"], found["logits"], strict=True)
        largest = max(abs(a - b) / b for a, b in pairs)
        runs[case["dtype"]] = {"pairs": options.pairs, **found}
        text = f"largest relative difference over {options.steps} updates: {largest:.2e}"
        recorded.put(case, [{"largest_difference": largest, "steps": options.steps}], text)
    return recorded


if __name__ == "__main__":
    bench.main(sys.modules[__name__])
