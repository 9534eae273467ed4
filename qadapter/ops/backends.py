"""Which implementation runs, and why the others do not.

``auto`` takes, for CUDA tensors, Triton and else torch; for CPU tensors, the C++ extension and else
torch. It never takes the CUDA extension or quack-kernels, which have not been timed. A backend that
is asked for by name (``use_backend`` or ``QADAPTER_BACKEND``) and cannot serve the call is an error
that says why, never a silent fallback.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qadapter.ops import cpp, cuda, quack

NAMES = ("auto", "torch", "cpp", "triton", "cuda", "quack")
PARTIAL: dict[str, ModuleType] = {"cuda": cuda, "quack": quack}  # have not every operation

_chosen: str | None = None


@dataclass(frozen=True)
class BackendInfo:
    """One line of ``qadapter.backends()``."""

    name: str
    available: bool
    reason: str
    devices: tuple[str, ...]


def _check_name(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source}: unknown backend {name!r}, expected one of {', '.join(NAMES)}")
    return name


def current_backend() -> str:
    """The backend in force: the innermost `use_backend`, else ``QADAPTER_BACKEND``, else auto."""
    if _chosen is not None:
        return _chosen
    return _check_name(os.environ.get("QADAPTER_BACKEND", "auto") or "auto", "QADAPTER_BACKEND")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run everything inside on one backend: auto, torch, cpp, triton, cuda or quack.

    Process-wide, not per thread (autograd runs backward passes in threads of its own). Raises
    ValueError for a name that does not exist; the call that cannot be served raises RuntimeError.
    """
    global _chosen
    previous, _chosen = _chosen, _check_name(name, "use_backend")
    try:
        yield
    finally:
        _chosen = previous


def _triton_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def _triton_state() -> tuple[bool, str, tuple[str, ...]]:
    try:
        import triton
    except Exception as error:  # a broken Triton must not break this package
        return False, f"triton cannot be imported ({type(error).__name__}: {error})", ()
    version = f"triton {triton.__version__}"
    if _triton_interpreted():
        return True, f"{version}, interpreted (TRITON_INTERPRET=1): slow, for checking", ("cpu",)
    if torch.cuda.is_available():
        return True, f"{version}, {torch.cuda.get_device_name()}", ("cuda",)
    return False, f"{version} is installed, but torch sees no GPU", ()


def backends() -> list[BackendInfo]:
    """Every backend with its state, the reason for it, and the device types it serves here."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return [
        BackendInfo("torch", True, f"torch {torch.__version__}", devices),
        BackendInfo("cpp", *_state("cpp")),
        BackendInfo("triton", *_state("triton")),
        BackendInfo("cuda", *_state("cuda")),
        BackendInfo("quack", *_state("quack")),
    ]


def _state(name: str) -> tuple[bool, str, tuple[str, ...]]:
    if name == "triton":
        return _triton_state()
    available, reason = (cpp if name == "cpp" else PARTIAL[name]).available()
    return available, reason, ("cpu" if name == "cpp" else "cuda",) if available else ()


def _cpp_state() -> tuple[bool, str, tuple[str, ...]]:
    reason = cpp.why_not_loaded()
    return reason is None, reason or "", ("cpu",)


def why_not(name: str, tensor: Tensor) -> str | None:
    """None if backend ``name`` can serve ``tensor``; else the reason."""
    if name == "torch":
        return None
    device, dtype = tensor.device.type, tensor.dtype
    # cpp is asked for before every operation on a CPU: without the text about it.
    available, reason, devices = _state(name) if name != "cpp" else _cpp_state()
    if not available:
        return reason
    if device not in devices:
        return f"it serves {' and '.join(devices)} tensors here, got {device}"
    if dtype == torch.float64:
        return "it takes float32, bfloat16 and float16, got float64"
    return None


def _functions(name: str) -> ModuleType:
    """The module that has a function for each operation of backend ``name``; not for torch."""
    if name == "triton":
        from qadapter.ops import triton  # importing the kernels needs Triton

        return triton
    return cpp if name == "cpp" else PARTIAL[name]


def serving(tensor: Tensor) -> str:
    """The backend for operations on ``tensor``; RuntimeError where the one asked for cannot."""
    name = current_backend()
    if name == "auto":
        preferred = "triton" if tensor.device.type == "cuda" else "cpp"
        return preferred if why_not(preferred, tensor) is None else "torch"
    if (why := why_not(name, tensor)) is not None:
        raise RuntimeError(f"backend {name!r} cannot run this call: {why}")
    return name


def implementation(tensor: Tensor, in_torch: Callable[..., Any]) -> Callable[..., Any]:
    """What serves an operation on ``tensor``: ``in_torch``, its meaning in PyTorch, or the function
    of that name of another backend.

    An operation that cuda or quack has no kernel for runs on Triton there, else on torch; one that
    Triton or C++ has no kernel for runs on torch where ``auto`` chose, and is an error where the
    backend was asked for.
    """
    operation, name = in_torch.__name__, serving(tensor)
    if name in PARTIAL and not hasattr(PARTIAL[name], operation):
        name = "triton" if why_not("triton", tensor) is None else "torch"
    if name == "torch":
        return in_torch
    function = getattr(_functions(name), operation, None)
    if function is not None:
        return function
    if current_backend() == name:
        raise RuntimeError(f"backend {name!r} cannot run this call: it has no {operation}")
    return in_torch
