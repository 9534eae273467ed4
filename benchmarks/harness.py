"""What every benchmark needs: the machine's ceilings, interleaved timings, peak memory.

Times of competing functions are taken in turns in one process, so that other load on the machine
and changes of clock hit all of them alike. On a machine that is shared, trust the ratios, not the
milliseconds, and the best times more than the medians.
"""

import contextlib
import ctypes
import functools
import gc
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CEILING_SIZES = {"cpu": (512, 1024), "cuda": (2048, 4096)}  # MiB to read, side of the products
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

    @staticmethod
    def of(samples: list[float]) -> "Timing":
        ordered = sorted(samples)
        last = len(ordered) - 1
        return Timing(
            statistics.median(ordered),
            ordered[round(0.2 * last)],
            ordered[round(0.8 * last)],
            ordered[0],
        )


@dataclass(frozen=True)
class Prepared:
    """A function with something to do before every call that is not to be timed."""

    before: Callable[[], Any]
    function: Callable[[], Any]

    def __call__(self) -> Any:
        return self.function()


def prepare(function: Callable[[], Any]) -> None:
    if isinstance(function, Prepared):
        function.before()


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


def interleaved(
    functions: dict[str, Callable[[], Any]],
    *,
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
    order is no matter then.
    ``clock="cpu"`` counts the processor time of this process. With one thread that tells what the
    work costs however busy the machine is; with more it also counts threads that spin in a barrier.
    ``cold`` reads other memory before every timed call, `COLD` times the cache, so that inputs come
    from memory as they would if they were rotated through that many copies. On a GPU that is always
    done.
    """
    for function in functions.values():
        for _ in range(warmup):
            prepare(function)
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
                    prepare(function)
                    function()
                prepare(function)
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
    functions: dict[str, Callable[[], Any]] = read_function(source)
    reads = list(functions)
    functions["copy"] = lambda: target.copy_(source)
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


def _size(text: str) -> int:
    """Bytes of what Linux writes as 32768K."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text)


@functools.cache
def cache_bytes() -> int:
    """Of this machine's largest CPU cache; 32 MiB where that is not to be found out."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((_size(path.read_text().strip()) for path in sizes), default=32 << 20)


def _kernel_bytes(path: str, field: str) -> int:
    """What Linux says in a line like "VmRSS:  32768 kB"."""
    for line in Path(path).read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise OSError(f"{path} has no {field}")


def _resident(field: str) -> int:
    return _kernel_bytes("/proc/self/status", field)


def total_memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free_memory(device: str) -> int:
    """Bytes that can still be had."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return _kernel_bytes("/proc/meminfo", "MemAvailable")


def _return_free_memory() -> None:
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@dataclass
class Peak:
    mebibytes: float = 0.0


@contextlib.contextmanager
def peak_memory(device: str, interval: float = 0.001) -> Iterator[Peak]:
    """Memory above the level at entry: torch's own count on a GPU, the resident size on a CPU.

    The resident size is the kernel's high-water mark, or sampled where that cannot be reset.
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
    _return_free_memory()
    before, highest, done = _resident("VmRSS"), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(interval):
            highest = max(highest, _resident("VmRSS"))

    thread = None
    if not _reset_high_water_mark():
        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
    try:
        yield peak
    finally:
        if thread is not None:
            done.set()
            thread.join()
        else:
            highest = _resident("VmHWM")
        peak.mebibytes = max(0, highest - before) / 2**20
