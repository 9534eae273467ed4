"""Two processes take the updates of one on the same pairs; slow for starting them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_text import word_tokenizer
from tests.training.test_anchors import anchor_rows
from tests.training.tiny_trainer import trainer

ROOT = Path(__file__).resolve().parents[2]


def train(folder, processes, anchored):
    """The adapter after two updates of four pairs, which differ in length, as do their anchors."""
    more = {"anchors": anchor_rows(), "anchor_coef": 2.0} if anchored else {}
    run = trainer(
        folder,
        word_tokenizer(),
        moved=True,
        rows=8,
        optim="sgd",
        lr_scheduler_type="constant",
        max_steps=2,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=4 // processes,
        reg_coef=0.5,
        **more,
    )
    run.train()
    return torch.cat(
        [p.detach().flatten() for n, p in run.model.named_parameters() if "lora_" in n]
    )


@pytest.mark.slow
@pytest.mark.parametrize("anchored", [False, True])
def test_two_processes_are_as_one(tmp_path, anchored):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, "-m", "tests.training.test_processes", str(tmp_path), str(int(anchored))],
        env=dict(os.environ, OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    two = load_file(tmp_path / "adapter.safetensors")["adapter"]
    torch.testing.assert_close(two, train(tmp_path / "one", 1, anchored), rtol=0, atol=1e-6)


if __name__ == "__main__":
    where = Path(sys.argv[1])
    made = train(where / "two", int(os.environ["WORLD_SIZE"]), sys.argv[2] == "1")
    if os.environ["RANK"] == "0":
        save_file({"adapter": made}, where / "adapter.safetensors")
