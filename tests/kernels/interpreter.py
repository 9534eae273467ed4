"""Where the Triton kernels run: compiled on a GPU, otherwise in Triton's interpreter.

The interpreter has to be chosen before the kernels are imported and would change what other tests
see. So on a machine without a GPU a test file starts itself again, in a process of its own with
TRITON_INTERPRET=1, and its tests are only collected there.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
ROOT = Path(__file__).resolve().parents[2]


def run_interpreted(file: str) -> None:
    environment = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=3600, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
