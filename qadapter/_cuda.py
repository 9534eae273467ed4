"""The CUDA C++ backend: loads the CUDA extension, and gives it the signatures all backends share.

The extension (csrc/cuda, built by setup.py) registers its operations as `torch.ops.qadapter_cuda`.
It takes float32, bfloat16 and float16 on NVIDIA GPUs from sm_80 on. None of its kernels has been
timed against its Triton twin, so nothing selects it but its name. The operations that it has no
kernels for run on Triton, or on torch where that is missing.
"""

import contextlib
import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qadapter._cpp import build_note

STATE = "built, unmeasured: off by default, QADAPTER_BACKEND=cuda selects it"


@functools.cache
def _load() -> str | None:
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
    if (reason := _load()) is not None:
        return False, reason
    if not torch.cuda.is_available():
        return False, f"{STATE}; torch sees no GPU"
    unusable = torch.ops.qadapter_cuda.unusable(torch.cuda.current_device())
    if unusable:
        return False, f"{STATE}; on {torch.cuda.get_device_name()}: {unusable}"
    return True, f"{STATE}; {torch.cuda.get_device_name()}"


def _ops() -> Any:
    if (reason := _load()) is not None:
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


def _others(tensor: Tensor) -> ModuleType:
    """Who serves what this backend has no kernel for."""
    from qadapter import _torch
    from qadapter.backends import why_not

    if why_not("triton", tensor) is not None:
        return _torch
    from qadapter import _triton

    return _triton


def residual_fwd(
    base_logits: Tensor | None,
    q_logits: Tensor,
    actions: Tensor,
    base_lse: Tensor | None,
    base_logp: Tensor | None,
    alpha_0: float,
    alpha_tilde: float,
    center: float,
    *,
    splits: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``splits`` blocks per row; 0 chooses for the GPU."""
    with _on(q_logits):
        return _ops().residual_fwd(
            base_logits,
            q_logits,
            actions,
            base_lse,
            base_logp,
            alpha_0,
            alpha_tilde,
            center,
            splits,
            _stream(q_logits),
        )


def residual_bwd(
    base_logits: Tensor | None,
    q_logits: Tensor,
    actions: Tensor,
    shift: Tensor,
    log_sum: Tensor,
    coef_p: Tensor,
    coef_a: Tensor,
    alpha_0: float,
    alpha_tilde: float,
    center: float,
) -> Tensor:
    with _on(q_logits):
        return _ops().residual_bwd(
            base_logits,
            q_logits,
            actions,
            shift,
            log_sum,
            coef_p,
            coef_a,
            alpha_0,
            alpha_tilde,
            center,
            _stream(q_logits),
        )


def preference_fwd(q: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return _others(q).preference_fwd(q, *arguments)


def linear_fwd(
    base_hidden: Tensor | None, q_hidden: Tensor, *arguments: Any, cluster: int = -1
) -> tuple[Tensor, ...]:
    """``cluster`` blocks per row, 0 for the kernel without clusters; -1 chooses for the GPU."""
    from qadapter import _cuda_linear

    kernel = _ops().linear_chunk

    def chunk_kernel(*chunk: Any) -> None:
        kernel(*chunk, cluster, _stream(q_hidden))

    with _on(q_hidden):
        return _cuda_linear.linear_fwd(chunk_kernel, base_hidden, q_hidden, *arguments)


def sample(
    base_logits: Tensor | None,
    q_logits: Tensor,
    scale: Tensor,
    base_weight: Tensor,
    seed: Tensor,
    position: Tensor,
    greedy: bool,
    top_k: int,
    top_p: float,
    min_p: float,
) -> tuple[Tensor, Tensor]:
    with _on(q_logits):
        return _ops().sample(
            base_logits,
            q_logits,
            scale,
            base_weight,
            seed,
            position,
            greedy,
            top_k,
            top_p,
            min_p,
            _stream(q_logits),
        )
