"""Freed memory is kept where the environment does not say otherwise; old objects are no garbage."""

import gc
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from qadapter.training import heap

# Faults of the second of two rounds that touch 20 blocks of 4 MiB and free them.
SCRIPT = """
import ctypes, json, resource, runpy, sys, types
sys.modules["transformers"] = types.SimpleNamespace(TrainerCallback=object)
heap = runpy.run_path(sys.argv[1])
freed = heap["FreedMemory"]()
freed.on_train_begin(None, None, None)
kept = freed.kept
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
faults = []
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc(4 << 20) for _ in range(20)]
    for block in blocks:
        ctypes.memset(block, 1, 4 << 20)
    for block in blocks:
        libc.free(block)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
def resident(step):
    freed.on_step_end(None, types.SimpleNamespace(global_step=step), None)
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
sizes = resident(heap["GIVE_BACK_EVERY"] - 1), resident(heap["GIVE_BACK_EVERY"])
print(json.dumps([kept, faults, sizes]))
"""


def run(**settings):
    own = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
    environment = {k: v for k, v in os.environ.items() if k not in own} | settings
    command = [sys.executable, "-S", "-c", SCRIPT, str(Path(heap.__file__))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_freed_memory_is_kept():
    kept, (first, second), (before, after) = run()
    assert kept
    assert first > 20 * second
    assert before - after > 60 << 20  # until it is given back


@pytest.mark.parametrize(
    "settings",
    [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536"}],
)
def test_settings_of_the_environment_stay(settings):
    kept, (first, second), _ = run(**settings)
    assert not kept
    assert first < 20 * second or first < 1000  # huge pages everywhere: few faults at all


def test_older_objects_are_left_alone_meanwhile():
    before = gc.get_freeze_count()
    with heap.objects_left_alone():
        assert gc.get_freeze_count() > before + 1000
    assert gc.get_freeze_count() == 0
