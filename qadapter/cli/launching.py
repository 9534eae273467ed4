"""``qadapter train --accelerate-config fsdp2``: the same command in several processes.

It is accelerate's own launcher that starts them, with a file of settings: one of those that the
package ships (`SHIPPED`), or one's own (``accelerate config``).
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from qadapter.cli.run_file import take

FOLDER = Path(__file__).with_name("accelerate_configs")
SHIPPED = ("multi_gpu", "fsdp2", "zero2", "zero3")


def config_path(name: str) -> Path:
    """Of a shipped file by its name, or of one's own."""
    path = FOLDER / f"{name}.yaml" if name in SHIPPED else Path(name)
    if not path.is_file():
        raise ValueError(
            f"--accelerate-config: expected {', '.join(SHIPPED)} or a file, got {name!r}"
        )
    return path


def command(arguments: Sequence[str]) -> tuple[list[str] | None, list[str]]:
    """How accelerate is to start ``qadapter train``, None where it is to run in this process; and
    the arguments that are left for it.

    Raises:
        ValueError: no such settings; ``--num-processes`` without them; fewer than two accelerators
            for one of the shipped ones.
    """
    name, left = take(arguments, "--accelerate-config", "--accelerate_config")
    count, left = take(left, "--num-processes", "--num_processes")
    if name is None or "LOCAL_RANK" in os.environ:  # or started already
        if count is not None and name is None:
            raise ValueError("--num-processes: has no effect without --accelerate-config")
        return None, left
    path = config_path(name)
    if name in SHIPPED and count is None:
        import torch

        there = torch.accelerator.device_count()
        if there < 2:
            raise ValueError(
                f"--accelerate-config {name}: for 2 accelerators or more, and torch sees {there}; "
                "leave it out to train in one process (--num-processes says otherwise)"
            )
        count = str(there)
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path)]
    if count is not None:
        start += ["--num_processes", count]
    return [*start, "-m", "qadapter.cli", "train", *left], left


def run(start: list[str], output: str | None) -> int:
    """Run it to its end; its exit status. Where that is an error, what is left of the training in
    the folder ``output`` is said last, behind what the processes and the launcher have said."""
    print("starting: " + " ".join(start), file=sys.stderr, flush=True)
    status = subprocess.run(start).returncode
    if status != 0:
        from qadapter.training.trainer import last_complete_checkpoint

        last = last_complete_checkpoint(output) if output else None
        rest = "there is no checkpoint" if last is None else f"--resume goes on from {last}"
        print(f"qadapter: error: a process has ended (above); {rest}", file=sys.stderr)
    return status
