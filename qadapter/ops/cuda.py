"""The CUDA C++ backend: loads the CUDA extension, and gives it the signatures all backends share.

The extension (csrc/cuda, built by setup.py) registers its operations as `torch.ops.qadapter_cuda`.
It takes float32, bfloat16 and float16 on NVIDIA GPUs from sm_80 on. None of its kernels has been
timed against its Triton twin, so nothing selects it but its name. What it has no function for here
runs on Triton, or on torch where that is missing (`backends.implementation`).
"""

import contextlib
import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from qadapter.ops.cpp import build_note

STATE = "built, unmeasured: off by default, QADAPTER_BACKEND=cuda selects it"


@functools.cache
def why_not_loaded() -> str | None:
    """Loads the extension once; the reason if that fails."""
    try:
        importlib.import_module("qadapter._C_cuda")
    except ModuleNotFoundError as error:
        if error.name != "qadapter._C_cuda":
            return f"the CUDA extension cannot be loaded ({error})"
        return f"the CUDA extension is not built{build_note('cuda')}"
    except Exception as error:  # built for another torch, another platform
        return f"the CUDA extension cannot be loaded ({type(error).__name__}: {error})"
    return None


def available() -> tuple[bool, str]:
    """Whether kernels can run here, and the state or the reason."""
    if (reason := why_not_loaded()) is not None:
        return False, reason
    if not torch.cuda.is_available():
        return False, f"{STATE}; torch sees no GPU"
    unusable = torch.ops.qadapter_cuda.unusable(torch.cuda.current_device())
    if unusable:
        return False, f"{STATE}; on {torch.cuda.get_device_name()}: {unusable}"
    return True, f"{STATE}; {torch.cuda.get_device_name()}"


def extension() -> Any:
    """`torch.ops.qadapter_cuda`; RuntimeError with the reason where it cannot be loaded."""
    if (reason := why_not_loaded()) is not None:
        raise RuntimeError(reason)
    return torch.ops.qadapter_cuda


def _on(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Kernels are launched on the current device, which need not be the tensor's own."""
    if tensor.device.type != "cuda":  # the kernels compiled for a host, in tests
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def _stream(tensor: Tensor) -> int:
    if tensor.device.type != "cuda":
        return 0
    return torch.cuda.current_stream(tensor.device).cuda_stream


def residual_fwd(
    base_logits: Tensor | None, q_logits: Tensor, *arguments: Any, splits: int = 0
) -> Any:
    """``splits`` blocks per row; 0 chooses for the GPU."""
    with _on(q_logits):
        operation = extension().residual_fwd
        return operation(base_logits, q_logits, *arguments, splits, _stream(q_logits))


def residual_bwd(base_logits: Tensor | None, q_logits: Tensor, *arguments: Any) -> Tensor:
    with _on(q_logits):
        operation = extension().residual_bwd
        return operation(base_logits, q_logits, *arguments, _stream(q_logits))


def linear_fwd(
    base_hidden: Tensor | None, q_hidden: Tensor, *arguments: Any, cluster: int = -1
) -> tuple[Tensor, ...]:
    """``cluster`` blocks per row, 0 for the kernel without clusters; -1 chooses for the GPU."""
    from qadapter.ops import linear_cuda

    kernel = extension().linear_chunk

    def chunk_kernel(*chunk: Any) -> None:
        kernel(*chunk, cluster, _stream(q_hidden))

    with _on(q_hidden):
        return linear_cuda.linear_fwd(chunk_kernel, base_hidden, q_hidden, *arguments)


def sample(base_logits: Tensor | None, q_logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    with _on(q_logits):
        return extension().sample(base_logits, q_logits, *arguments, _stream(q_logits))
