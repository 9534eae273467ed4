"""Weights in large pages, on a Linux machine without a GPU.

transformers maps a checkpoint's file, and files lie in pages of 4 KB. A decode step reads every
weight once, which is a miss of the TLB every 4 KB; on a virtual machine each is a walk through two
tables. On the machine of docs/decoding.md a bare read of SmolLM2-135M's layers took six times as
long from the file's pages as from pages of 2 MB. So the weights are copied once, when they are
loaded, into memory that the kernel is asked to give large pages for. Values are the same.
"""

import math
import mmap
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
MEMORY = Path("/proc/meminfo")
LARGE = 2 << 20  # bytes of a page
LEAST = 16 << 20  # bytes of weights that are worth it
_LINE = 64  # weights begin at multiples of it


def mode(file: Path | None = None) -> str:
    """When the system gives large pages: "always", "madvise" or "never"; "" if it does not tell."""
    try:
        _, _, rest = (file or MODE).read_text(encoding="ascii").partition("[")
    except OSError:
        return ""
    return rest.partition("]")[0]


def _available() -> int:
    """Bytes of memory that can be had, what files hold there among it; 0 if nobody tells."""
    try:
        lines = MEMORY.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    sizes = dict(line.split(":", 1) for line in lines)
    return 1024 * int(sizes.get("MemAvailable", "0 kB").split()[0])


def wanted() -> bool:
    """Whether tensors on the CPU can be had in large pages by asking for them."""
    return hasattr(mmap, "MADV_HUGEPAGE") and mode() in ("always", "madvise")


class Memory:
    """Memory in large pages, handed out in pieces; it goes when the last tensor around it does."""

    def __init__(self, size: int) -> None:
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # what children share has small pages
        self._room = mmap.mmap(-1, size + LARGE, flags=private)
        self._room.madvise(mmap.MADV_HUGEPAGE)
        self._at = -torch.frombuffer(self._room, dtype=torch.uint8).data_ptr() % LARGE
        self._end = self._at + size

    def piece(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        """An uninitialised tensor, with a storage of its own; None where not enough is left."""
        count = math.prod(shape)
        at, end = self._at, self._at + rounded(count * dtype.itemsize)
        if count == 0 or end > self._end:
            return None
        self._at = end
        return torch.frombuffer(self._room, dtype=dtype, count=count, offset=at).view(shape)


def rounded(size: int) -> int:
    """What a piece of ``size`` bytes takes."""
    return -(-size // _LINE) * _LINE


def settle(model: nn.Module) -> int:
    """Move the ordinary weights of ``model`` on the CPU into large pages; how many bytes.

    0, and nothing done, where the system gives none, where it has less than half as much memory to
    spare as it would need beside the copy, where weights are few, and where there is a GPU that
    they may be meant for. Parameters stay the same objects, tied ones stay tied.
    """
    from qadapter.model.checkpoint import is_ordinary  # PEFT's; `qadapter env` goes without

    if not wanted() or torch.cuda.is_available():
        return 0
    of_one: dict[int, list[nn.Parameter]] = {}  # by where they lie
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.is_contiguous() and is_ordinary(parameter):
            of_one.setdefault(parameter.data_ptr(), []).append(parameter)
    alike = [same for same in of_one.values() if len({p.shape for p in same}) == 1]
    size = sum(rounded(same[0].nbytes) for same in alike)
    if size < LEAST or _available() < 1.5 * size:
        return 0
    memory = Memory(size)
    for same in alike:
        new = memory.piece(same[0].shape, same[0].dtype)
        if new is not None:  # of no elements
            new.copy_(same[0].detach())
            for parameter in same:
                parameter.data = new
    return size
