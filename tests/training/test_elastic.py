"""Long work: it goes on in another number of processes, and a process that is killed ends it."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from qadapter.training import processes
from qadapter.training.engines import EngineTraining
from qadapter.training.trainer import last_complete_checkpoint
from tests.training import engine_runs
from tests.training.test_engines import start_of, update_error
from tests.training.tiny_trainer import trainer


def go_on(root, engine, count, names=("go on",)):
    if count == 1:
        made = {name: engine_runs.case(name, root / name, engine, 1) for name in names}
        return {name: tensors for name, (tensors, _) in made.items()}
    return engine_runs.start(root, engine, names, processes=count)[0]


def check(tensors, whole, bound=1e-5):
    assert update_error(tensors["weights"], whole, start_of("train")) < bound


@pytest.mark.slow
def test_ddp_goes_on_in_other_numbers_of_processes(tmp_path):
    whole = engine_runs.start(tmp_path, "ddp", ["resume"])[0]["resume"]["weights"]
    check(go_on(tmp_path, "ddp", 1)["go on"], whole)
    four = go_on(tmp_path, "ddp", 4, ("go on", "train"))
    check(four["go on"], whole)
    check(four["train"], engine_runs.case("train", tmp_path / "one", "ddp", 1)[0]["weights"])
    # And from one process to two.
    alone = tmp_path / "alone"
    alone.mkdir()
    whole = engine_runs.case("resume", alone / "resume", "ddp", 1)[0]["weights"]
    check(go_on(alone, "ddp", 2)["go on"], whole)


@pytest.mark.slow
def test_fsdp2_goes_on_in_other_numbers_of_processes(tmp_path):
    begun = engine_runs.start(tmp_path, "fsdp2", ["resume", "resume, sharded"])[0]
    four = go_on(tmp_path, "fsdp2", 4, ("go on", "go on, sharded", "train"))
    check(four["go on"], begun["resume"]["weights"])
    check(four["go on, sharded"], begun["resume, sharded"]["weights"])
    check(four["train"], engine_runs.case("train", tmp_path / "one", "ddp", 1)[0]["weights"])
    with pytest.raises(ValueError, match="saved by FSDP2, this is DDP or one process"):
        go_on(tmp_path, "ddp", 1)


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_job(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, "-m", "tests.training.test_elastic", str(tmp_path)],
        env=dict(os.environ, OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=600,
        cwd=engine_runs.ROOT,
    )
    ended = time.time()
    assert done.returncode != 0 and "Signal 9 (SIGKILL) received" in done.stderr
    assert ended - float((tmp_path / "killed").read_text()) < 60
    last = last_complete_checkpoint(tmp_path / "out")
    assert last == tmp_path / "out" / "checkpoint-2"  # of the third step there is no checkpoint
    whole = engine_runs.case("resume", tmp_path / "whole", "ddp", 1)[0]["weights"]
    run = engine_runs.made(tmp_path, 1, **engine_runs.FOUR_UPDATES)
    run.train("True")
    check({"weights": engine_runs.weights(run)}, whole)


class Kill(TrainerCallback):
    """The second process, when the third update is done."""

    def __init__(self, folder):
        self.folder = folder

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and args.process_index == 1:
            (self.folder / "killed").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)


# What needs one process.


def test_another_number_of_pairs_is_said(tmp_path, tiny_tokenizer, caplog):
    how = {"save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, tiny_tokenizer, **how).train()
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    trainer(tmp_path, tiny_tokenizer, **how).train(checkpoint)
    assert "an update was of" not in caplog.text
    trainer(tmp_path, tiny_tokenizer, per_device_train_batch_size=2, **how).train(checkpoint)
    assert "an update was of 4 pairs, and is of 2 now" in caplog.text


def checked(folder, engine, world_size):
    one = SimpleNamespace(
        is_fsdp_enabled=engine == "fsdp",
        is_deepspeed_enabled=engine == "deepspeed",
        args=SimpleNamespace(world_size=world_size, to_dict=dict),
    )
    EngineTraining._check_checkpoint(one, folder)


def test_the_optimiser_of_another_engine_is_refused(tmp_path):
    checked(tmp_path, "ddp", 2)  # it has none
    (tmp_path / "optimizer.pt").write_text("")
    checked(tmp_path, "ddp", 2)
    with pytest.raises(ValueError, match="saved by DDP or one process, this is FSDP2"):
        checked(tmp_path, "fsdp", 2)
    (tmp_path / "optimizer_0").mkdir()
    checked(tmp_path, "fsdp", 4)
    with pytest.raises(ValueError, match="saved by FSDP2, this is DeepSpeed"):
        checked(tmp_path, "deepspeed", 2)
    (tmp_path / "global_step2").mkdir()
    for rank in range(2):
        name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        (tmp_path / "global_step2" / name).write_text("")
    checked(tmp_path, "deepspeed", 2)
    with pytest.raises(ValueError, match="a part for each of 2 processes, and there are 4"):
        checked(tmp_path, "deepspeed", 4)
    with pytest.raises(ValueError, match="saved by DeepSpeed, this is DDP"):
        checked(tmp_path, "ddp", 2)


@pytest.mark.parametrize("rows", [1, 3, 4, 9, 10, 11, 12])
@pytest.mark.parametrize("ranks", [2, 3])
def test_every_pair_of_a_stream_counts_once(rows, ranks):
    """By accelerate's own shards of a stream, which fill the last batch from the beginning."""
    from accelerate.data_loader import IterableDatasetShard
    from datasets import Dataset

    def collate(features):
        return {"cu_seqlens": torch.arange(2 * len(features) + 1), "row": features}

    kept = []
    plain, processes.first_pairs = processes.first_pairs, lambda batch, n: batch["row"][:n]
    try:
        for rank in range(ranks):
            data = Dataset.from_dict({"x": list(range(rows))}).to_iterable_dataset()
            stream = processes.NumberedStream(data)
            shard = list(IterableDatasetShard(stream, 2, False, ranks, rank))
            who = SimpleNamespace(num_processes=ranks, process_index=rank)
            for at in range(0, len(shard), 2):
                batch = processes.NumberedCollator(collate)(shard[at : at + 2])
                kept += [row["x"] for row in processes.of_stream(batch, who)]
    finally:
        processes.first_pairs = plain
    assert sorted(kept) == list(range(rows))


def main(folder):
    run = engine_runs.made(folder, 2, callbacks=[Kill(folder)], **engine_runs.FOUR_UPDATES)
    run.train()


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main(Path(sys.argv[1]))
