"""Whether the default step trains as the logits path does: both losses, update by update.

    python -m benchmarks.bench_loss_curve [--data pairs.jsonl --steps 50 --pairs 2 --dtype bfloat16]

Same model, seed and order of pairs; packed and without logits against padded with logits.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch

import qadapter
from benchmarks import harness
from qadapter import QAdapterConfig, QAdapterModel, QAdapterTrainer
from qadapter.checkpoint import resolve_model
from qadapter.data import load_preference_data

WAYS = {"default": {}, "logits": {"packing": False, "use_logits": True}}


def curve(options: argparse.Namespace, folder: str, settings: dict[str, bool]) -> list[float]:
    torch.manual_seed(0)
    model = QAdapterModel.from_pretrained(resolve_model(options.model), dtype=options.dtype)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument(
        "--data", default=str(Path(qadapter.__file__).parent / "demo_data" / "train.jsonl")
    )
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=2, help="in an update")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16", help="of the base")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    with tempfile.TemporaryDirectory() as folder:
        run = {way: curve(options, folder, settings) for way, settings in WAYS.items()}
    differences = [abs(a - b) / b for a, b in zip(run["default"], run["logits"], strict=True)]
    print(f"largest relative difference over {len(differences)} updates: {max(differences):.2e}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = harness.RESULTS / f"loss_curves-{device}.json"
    # One file holds the runs of several dtypes.
    runs = json.loads(path.read_text())["runs"] if path.exists() else {}
    runs[options.dtype] = {"pairs": options.pairs, **run}
    harness.write_json("loss_curves", device, [], None, model=options.model, runs=runs)


if __name__ == "__main__":
    main()
