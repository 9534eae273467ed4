"""Products of a low-rank adapter, added in place: csrc/cpu/lora_add.cpp, kernels/lora_add.py.

No operations of torch.ops.qadapter: they are called hundreds of times a step and have no gradient
of their own; `qadapter.model.lora_linear` composes one of them.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from qadapter.ops import backends, cpp

# Of one adapter's rows in `few_tokens_add_`, and of its ranks: kernels/lora_add.py says why.
MOST_TOKENS, MOST_RANK = 16, 32
_GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _operations() -> tuple[Any, Any, int]:
    """Both operations and the vector code for them: what leads to them is looked up once."""
    extension = cpp.extension()
    return extension.lora_add_.default, extension.lora_outer.default, cpp.isa()


def has_vectors() -> bool:
    """Whether the extension has vector code for this CPU, and not the compiler's alone."""
    return _operations()[2] > 0


def lora_add_(
    out: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    start: int,
    stop: int,
    low: Tensor | None = None,
) -> None:
    """out[start:stop] += scaling (x[start:stop] A^T) B^T in place; without gradients.

    All in float32, rounded once when it is added. What a row gives does not depend on the others.

    Args:
        out: [rows, O] or [rows, T, O], float32 or bfloat16 on the CPU; changed.
        x: [rows, K] or [rows, T, K] of out's dtype.
        lora_a: A [r, K], float32 or bfloat16, whatever x is.
        lora_b: B [O, r] of A's dtype.
        scaling: The factor.
        start: The first row that the adapter is for.
        stop: The row behind the last one.
        low: float32 [tokens, r], contiguous, which takes x A^T of these rows; None where it is not
            wanted.

    Raises:
        RuntimeError: A dtype, device, shape or range that does not fit; the extension cannot be
            loaded.
    """
    add, _, isa = _operations()
    add(out, x, lora_a, lora_b, scaling, start, stop, low, isa)


def on_gpu(like: Tensor) -> bool:
    """Whether `few_tokens_add_` serves what lies where ``like`` does."""
    if like.device.type != "cuda" or backends.current_backend() == "torch":
        return False
    return backends.why_not("triton", like) is None


def few_tokens_add_(
    out: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    start: int,
    stop: int,
) -> bool:
    """As `lora_add_`, on a GPU in one launch; False, and nothing done, where its shape won't pay.

    float32, bfloat16 and float16, out and x alike; dense in the last dimension.
    """
    if any(t.dtype not in _GPU_DTYPES for t in (out, lora_a, lora_b)):
        return False
    tokens = (stop - start) * x.shape[1:-1].numel()
    if tokens > MOST_TOKENS or not 0 < lora_a.shape[0] <= MOST_RANK or not out.is_contiguous():
        return False
    from qadapter.kernels import lora_add  # importing the kernels needs Triton

    rows = out[start:stop].view(tokens, out.shape[-1])
    inputs = x[start:stop].reshape(tokens, x.shape[-1])
    lora_add.lora_add_(rows, inputs, lora_a, lora_b, scaling)
    return True


@functools.cache
def _backward() -> tuple[Any, int]:
    return cpp.extension().lora_bwd_.default, cpp.isa()


def lora_backward_(
    dx: Tensor,
    grad: Tensor,
    x: Tensor,
    low: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """What a low-rank adapter adds to a layer's backward; without gradients of its own.

        dx += scaling (grad B) A      dA = scaling (grad B)^T x      dB = scaling grad^T low

    All in float32; dx is rounded once when it is added to.

    Args:
        dx: [N, K] of grad's dtype, changed; [N, 0] where it is not wanted.
        grad: [N, O], float32 or bfloat16 on the CPU: of the layer's output.
        x: [N, K] of grad's dtype: the layer's input.
        low: float32 [N, r], contiguous: x A^T.
        lora_a, lora_b: [r, K] and [O, r], float32 or bfloat16.
        scaling: The factor.

    Returns:
        dA [r, K] and dB [O, r], float32.

    Raises:
        RuntimeError: A dtype, device or shape that does not fit; the extension cannot be loaded.
    """
    backward, isa = _backward()
    made: tuple[Tensor, Tensor] = backward(dx, grad, x, low, lora_a, lora_b, scaling, isa)
    return made


def lora_outer(low: Tensor, x: Tensor, scaling: float) -> Tensor:
    """scaling low^T x, float32 [r, K]: summed in float32, whatever x is; without gradients.

    Args:
        low: float32 [N, r], contiguous, on the CPU.
        x: [N, K], float32 or bfloat16.
        scaling: The factor.

    Raises:
        RuntimeError: A dtype, device or shape that does not fit; the extension cannot be loaded.
    """
    _, outer, isa = _operations()
    return outer(low, x, scaling, isa)
