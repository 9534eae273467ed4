"""Weights in large pages, on a Linux machine without a GPU.

transformers maps a checkpoint's file, and files lie in pages of 4 KB. A decode step reads every
weight once, which is a miss of the TLB every 4 KB; on a virtual machine each is a walk through two
tables. On the machine of docs/decoding.md a bare read of SmolLM2-135M's layers took six times as
long from the file's pages as from pages of 2 MB. So the weights are copied once, when they are
loaded, into memory that the kernel is asked to give large pages for. Values are the same.
"""

import mmap
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from qadapter.model.checkpoint import is_ordinary

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


def settle(model: nn.Module) -> int:
    """Move the ordinary weights of ``model`` on the CPU into large pages; how many bytes.

    0, and nothing done, where the system gives none, where it has less than half as much memory to
    spare as it would need beside the copy, where weights are few, and where there is a GPU that
    they may be meant for. Parameters stay the same objects, tied ones stay tied.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE") or mode() not in ("always", "madvise"):
        return 0
    if torch.cuda.is_available():
        return 0
    of_one: dict[int, list[nn.Parameter]] = {}  # by where they lie
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.is_contiguous() and is_ordinary(parameter):
            of_one.setdefault(parameter.data_ptr(), []).append(parameter)
    alike = [same for same in of_one.values() if len({p.shape for p in same}) == 1]
    size = sum(-(-same[0].nbytes // _LINE) * _LINE for same in alike)
    if size < LEAST or _available() < 1.5 * size:
        return 0
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # memory shared with children has small pages
    room = mmap.mmap(-1, size + LARGE, flags=private)
    room.madvise(mmap.MADV_HUGEPAGE)
    at = -torch.frombuffer(room, dtype=torch.uint8).data_ptr() % LARGE
    for same in alike:
        old = same[0]
        # A storage of its own, around this part: whoever saves or shares it gets no more.
        new = torch.frombuffer(room, dtype=old.dtype, count=old.numel(), offset=at).view(old.shape)
        new.copy_(cast(Tensor, old.detach()))
        for parameter in same:
            parameter.data = new
        at += -(-new.nbytes // _LINE) * _LINE
    return size
