"""Which implementation runs, and why the others do not.

``auto`` takes, for CUDA tensors, Triton and else torch; for CPU tensors, the C++ extension and else
torch. It never takes the CUDA extension, whose kernels have not been timed. A backend that is asked
for by name (``use_backend`` or ``QADAPTER_BACKEND``) and cannot serve the call is an error that
says why, never a silent fallback.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

NAMES = ("auto", "torch", "cpp", "triton", "cuda")

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
    """Run everything inside on one backend: auto, torch, cpp, triton or cuda.

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


def _cpp_state() -> tuple[bool, str, tuple[str, ...]]:
    from qadapter import _cpp

    available, reason = _cpp.available()
    if not available:
        return False, reason, ()
    return True, f"vector code: {_cpp.capability()}", ("cpu",)


def _cuda_state() -> tuple[bool, str, tuple[str, ...]]:
    from qadapter import _cuda

    available, reason = _cuda.available()
    return available, reason, ("cuda",) if available else ()


def backends() -> list[BackendInfo]:
    """Every backend with its state, the reason for it, and the device types it serves here."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return [
        BackendInfo("torch", True, f"torch {torch.__version__}", devices),
        BackendInfo("cpp", *_cpp_state()),
        BackendInfo("triton", *_triton_state()),
        BackendInfo("cuda", *_cuda_state()),
    ]


def why_not(name: str, tensor: Tensor) -> str | None:
    """None if backend ``name`` can serve ``tensor``; else the reason."""
    device, dtype = tensor.device.type, tensor.dtype
    if name == "torch":
        return None
    states = {"cpp": _cpp_state, "triton": _triton_state, "cuda": _cuda_state}
    available, reason, devices = states[name]()
    if not available:
        return reason
    if device not in devices:
        return f"it serves {' and '.join(devices)} tensors here, got {device}"
    if dtype == torch.float64:
        return "it takes float32, bfloat16 and float16, got float64"
    return None


def _triton_functions() -> ModuleType:
    from qadapter import _triton

    return _triton


def implementation(tensor: Tensor) -> ModuleType:
    """The module whose residual_fwd, residual_bwd and preference_fwd serve ``tensor``."""
    from qadapter import _cpp, _cuda, _torch

    name = current_backend()
    if name == "auto":
        preferred = "triton" if tensor.device.type == "cuda" else "cpp"
        name = preferred if why_not(preferred, tensor) is None else "torch"
    elif (why := why_not(name, tensor)) is not None:
        raise RuntimeError(f"backend {name!r} cannot run this call: {why}")
    if name == "triton":
        return _triton_functions()
    return {"cpp": _cpp, "cuda": _cuda}.get(name, _torch)
