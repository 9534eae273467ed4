"""What every benchmark needs: the machine's ceilings, interleaved timings, peak memory.

Times of competing functions are taken in turns in one process, so that other load on the machine
and changes of clock hit all of them alike. On a machine that is shared, trust the ratios, not the
milliseconds, and the best times more than the medians.
"""

import contextlib
import ctypes
import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# MiB to read, side of the products
CEILING_SIZES = {"cpu": (512, 1024), "cuda": (2048, 4096), "quick": (16, 64)}
COLD = 4  # caches to read between calls, so that no input is left in one


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Timing:
    """Milliseconds."""

    median: float
    p20: float
    p80: float
    best: float
    runs: int = 0

    @staticmethod
    def of(samples: list[float]) -> "Timing":
        found = np.quantile(samples, (0.5, 0.2, 0.8, 0), method="nearest")
        return Timing(statistics.median(samples), *found[1:].tolist(), runs=len(samples))


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def _time_once(
    function: Callable[[], Any], device: str, clock: Callable[[], float], scratch: Tensor | None
) -> float:
    if scratch is not None:  # leaves none of the inputs in the cache
        torch.sum(scratch)
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = function()
        end.record()
        end.synchronize()
        del result
        return start.elapsed_time(end)
    start_time = clock()
    result = function()
    elapsed = (clock() - start_time) * 1e3
    del result
    return elapsed


def once(
    function: Callable[[], Any], before: Callable[[], Any] | None, device: str, clock: str
) -> Timing:
    """The time of a single call."""
    if before is not None:
        before()
    synchronize(device)
    return Timing.of([_time_once(function, device, CLOCKS[clock], None)])


def interleaved(
    functions: dict[str, Callable[[], Any]],
    *,
    before: Mapping[str, Callable[[], Any]] | None = None,
    device: str = "cpu",
    rounds: int = 15,
    seconds: float = 60.0,
    warmup: int = 2,
    least: int = 5,
    settle_ms: float = float("inf"),
    clock: str = "wall",
    cold: bool = False,
) -> dict[str, Timing]:
    """Times the functions in turns, ``rounds`` times or for ``seconds``, but ``least`` times.

    In each turn a function runs twice and the second run counts, as in a loop that repeats it. One
    that took longer than ``settle_ms`` the time before runs once: what the first run would put in
    order is no matter then. ``before`` has what must be done ahead of every call of a function and
    is not timed.
    ``clock="cpu"`` counts the processor time of this process. With one thread that tells what the
    work costs however busy the machine is; with more it also counts threads that spin in a barrier.
    ``cold`` reads other memory before every timed call, `COLD` times the cache, so that inputs come
    from memory as they would if they were rotated through that many copies. On a GPU that is always
    done.
    """

    first = before or {}

    def prepare(name: str) -> None:
        if name in first:
            first[name]()

    for name, function in functions.items():
        for _ in range(warmup):
            prepare(name)
            function()
    synchronize(device)
    scratch = None
    if device == "cuda" or cold:
        size = 1 << 28 if device == "cuda" else COLD * cache_bytes()
        scratch = torch.zeros(size // 4, dtype=torch.float32, device=device)
    samples: dict[str, list[float]] = {name: [] for name in functions}
    gc.collect()
    gc.disable()
    try:
        started = time.perf_counter()
        for i in range(rounds):
            for name, function in functions.items():
                # Once untimed: what ran before has left its own memory behind, and the first
                # touch of pages that the system took back would be charged to this function.
                if not samples[name] or samples[name][-1] < settle_ms:
                    prepare(name)
                    function()
                prepare(name)
                samples[name].append(_time_once(function, device, CLOCKS[clock], scratch))
            if i + 1 >= least and time.perf_counter() - started > seconds:
                break
    finally:
        gc.enable()
    return {name: Timing.of(values) for name, values in samples.items()}


@dataclass(frozen=True)
class Ceilings:
    """GB/s and TFLOP/s that this machine reaches at best."""

    read_gb_s: float
    copy_gb_s: float  # bytes read plus bytes written
    gemm_tflop_s: dict[str, float]


def read_function(tensor: Tensor) -> dict[str, Callable[[], Any]]:
    """Ways to read a tensor once; the fastest is the ceiling."""
    ways: dict[str, Callable[[], Any]] = {"sum": lambda: torch.sum(tensor)}
    if tensor.device.type == "cpu":
        from qadapter.ops import cpp

        if cpp.available()[0]:
            ways["probe"] = lambda: torch.ops.qadapter_C.read_probe(tensor)
    return ways


def ceilings(device: str, megabytes: int = 512, gemm: int = 1024, clock: str = "wall") -> Ceilings:
    source = torch.ones(megabytes << 18, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    reads = read_function(source)
    functions = {**reads, "copy": lambda: target.copy_(source)}
    flops = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(gemm, 2 * gemm, dtype=dtype, device=device)
        b = torch.randn(8 * gemm, 2 * gemm, dtype=dtype, device=device)
        functions[f"gemm {dtype}"] = lambda a=a, b=b: a @ b.T
        flops[f"gemm {dtype}"] = 2 * a.numel() * b.shape[0]
    times = interleaved(functions, device=device, rounds=9, clock=clock)
    size = source.nbytes
    return Ceilings(
        read_gb_s=size / min(times[name].best for name in reads) / 1e6,
        copy_gb_s=2 * size / times["copy"].best / 1e6,
        gemm_tflop_s={
            name.removeprefix("gemm torch."): count / times[name].best / 1e9
            for name, count in flops.items()
        },
    )


@functools.cache
def cache_bytes() -> int:
    """Of this machine's largest CPU cache; 32 MiB where that is not to be found out."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    texts = [path.read_text().strip() for path in sizes]  # such as 32768K
    return max((int(text[:-1]) * units[text[-1]] for text in texts), default=32 << 20)


def free_memory(device: str) -> int:
    """Bytes that can still be had."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    import psutil  # a machine that is there for its GPU need not have it

    return psutil.virtual_memory().available


@dataclass
class Peak:
    mebibytes: float = 0.0


def _resident(field: str) -> int:
    """Bytes, of a line of Linux like "VmHWM:  32768 kB"."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


@contextlib.contextmanager
def peak_memory(device: str) -> Iterator[Peak]:
    """Memory above the level at entry: torch's own count on a GPU, the resident size on a CPU.

    The resident size is the kernel's high-water mark; where that cannot be reset it is NaN.
    """
    peak = Peak()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        torch.cuda.synchronize()
        peak.mebibytes = (torch.cuda.max_memory_allocated() - before) / 2**20
        return
    with contextlib.suppress(OSError, AttributeError):  # glibc only: return what is free
        ctypes.CDLL(None).malloc_trim(0)
    before = _resident("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        peak.mebibytes = float("nan")
        yield peak
        return
    yield peak
    peak.mebibytes = max(0, _resident("VmHWM") - before) / 2**20
