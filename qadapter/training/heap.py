"""Memory in training: what a step frees is kept for the next one, and what was there before it is
not looked through for garbage."""

import ctypes
import gc
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

# Of malloc.h. Chunks above the first are mapped and given back one by one; 32 MiB is the most that
# glibc takes. -1: the top of the heap is never given back.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MOST_ON_HEAP = 32 << 20

GIVE_BACK_EVERY = 10
"""Updates. Giving back 3.5 GB took 0.03 s; the next update has a fault for each page again."""


def keep_freed_memory() -> bool:
    """Have malloc keep freed memory instead of giving it back to the system; whether it does.

    A training step makes and frees gigabytes of tensors; pages that were given back are cleared and
    mapped again, a fault each. The price is that the process stays as large as it was at its peak.
    Where the environment has settings of its own (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_ or
    GLIBC_TUNABLES of these names), and with other C libraries, nothing is changed.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    names = ("trim_threshold", "mmap_threshold")
    if any(f"MALLOC_{name.upper()}_" in os.environ or name in tunables for name in names):
        return False
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    kept = mallopt(_M_MMAP_THRESHOLD, _MOST_ON_HEAP) == 1
    return mallopt(_M_TRIM_THRESHOLD, -1) == 1 and kept


class FreedMemory(TrainerCallback):
    """What an update frees is kept for the next one, as `keep_freed_memory` says, and what is free
    after every tenth is given back: batches of ever other sizes, between which oneDNN keeps the
    kernels that it makes for each size, split the heap until it is several times what they need.
    """

    def __init__(self) -> None:
        self.kept = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.kept = keep_freed_memory()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.kept and state.global_step % GIVE_BACK_EVERY == 0:
            ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def objects_left_alone() -> Iterator[None]:
    """Meanwhile Python's garbage collector does not go through the objects that exist now.

    torch, transformers and a model are many objects, none of them garbage, and what a step makes
    has the collector come by.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
