"""What a decoder layer does beside its products, in one pass each: on the CPU, by csrc/cpu.

No operations of torch.ops.qadapter: they run hundreds of times a step or token, where a dispatch
more would be felt. Gradients are for activations alone, the weights of a norm are frozen.
"""

import functools
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qadapter.ops import cpp


@functools.cache
def _operations() -> tuple[Any, Any, Any, Any, int]:
    """The operations and the vector code for them: what leads to them is looked up once."""
    extension = cpp.extension()
    return (
        extension.rms_norm_fwd.default,
        extension.rms_norm_bwd.default,
        extension.silu_mul_fwd.default,
        extension.silu_mul_bwd.default,
        cpp.isa(),
    )


def serves(x: Tensor, other: Tensor) -> bool:
    """Whether an activation and what it meets can be taken here: float32 or bfloat16, both alike,
    on the CPU, and nobody traces. The extension must be loaded."""
    return (
        type(x) is Tensor
        and x.is_cpu
        and other.is_cpu
        and x.dtype is other.dtype
        and (x.dtype is torch.bfloat16 or x.dtype is torch.float32)
        and not torch.compiler.is_compiling()
    )


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        forward, _, _, _, isa = _operations()
        return forward(x, weight, eps, isa)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        _, backward, _, _, isa = _operations()
        return backward(grads[0], x, weight, ctx.eps, isa), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * round(x / sqrt(mean(x^2) + eps)) over the last dimension, as LlamaRMSNorm.

    Arithmetic is float32; x / sqrt(..) is rounded to the dtype, and the product again. Backward
    makes the statistic again, keeps x alone, and rounds once. QADAPTER_CPU_CAPABILITY is read at
    the first call.

    Args:
        x: [..., D] float32 or bfloat16 on the CPU; differentiable once.
        weight: [D] of the same dtype, contiguous; its gradient is not taken.
        eps: Added to the mean of squares.

    Returns:
        [..., D], contiguous.

    Raises:
        RuntimeError: A dtype, device or shape that does not fit; the extension cannot be loaded.
    """
    if x.requires_grad and torch.is_grad_enabled():
        return cast(Tensor, _RmsNorm.apply(x, weight, eps))
    forward, _, _, _, isa = _operations()
    return forward(x, weight, eps, isa)


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        _, _, forward, _, isa = _operations()
        return forward(gate, up, isa)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return silu_mul_gradients(grads[0], *ctx.saved_tensors)


def silu_mul_gradients(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Of gate and up, from that of `silu_mul`, which is like them."""
    _, _, _, backward, isa = _operations()
    made: tuple[Tensor, Tensor] = backward(grad, gate, up, isa)
    return made


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """round(silu(gate)) * up.

    Arithmetic is float32; silu is rounded to the dtype, and the product again. Backward makes silu
    again, keeps gate and up alone, and rounds once. QADAPTER_CPU_CAPABILITY is read at the first
    call.

    Args:
        gate, up: [..., I], alike, float32 or bfloat16 on the CPU; differentiable once.

    Returns:
        [..., I], contiguous.

    Raises:
        RuntimeError: A dtype, device or shape that does not fit; the extension cannot be loaded.
    """
    if (gate.requires_grad or up.requires_grad) and torch.is_grad_enabled():
        return cast(Tensor, _SiluMul.apply(gate, up))
    _, _, forward, _, isa = _operations()
    return forward(gate, up, isa)


@functools.cache
def _rotary() -> tuple[Any, int]:
    return cpp.extension().rotary.default, cpp.isa()


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        operation, isa = _rotary()
        return operation(x, cos, sin, False, isa)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        operation, isa = _rotary()
        return operation(grads[0], *ctx.saved_tensors, True, isa), None, None


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + [-x2, x1] sin, [x1, x2] the halves of x: rotary position embedding.

    Values are those of transformers' apply_rotary_pos_emb bit for bit: arithmetic is float32, and
    both products and their sum are rounded to the dtype. Backward rounds once.
    QADAPTER_CPU_CAPABILITY is read at the first call.

    Args:
        x: [B, H, T, D], D even, float32 or bfloat16 on the CPU; differentiable once.
        cos, sin: [1 or B, T, D] of the same dtype, dense rows; their gradient is not taken.

    Returns:
        [B, H, T, D], in memory [B, T, H, D].

    Raises:
        RuntimeError: A dtype, device or shape that does not fit; the extension cannot be loaded.
    """
    if x.requires_grad and torch.is_grad_enabled():
        return cast(Tensor, _Rotary.apply(x, cos, sin))
    operation, isa = _rotary()
    return operation(x, cos, sin, False, isa)


@functools.cache
def _causal_softmax() -> tuple[Any, int]:
    return cpp.extension().causal_softmax_.default, cpp.isa()


def causal_softmax_(scores: Tensor, queries: int, window: int | None = None) -> None:
    """Softmax of attention scores over the keys that each query sees, in place; no gradient.

    Arithmetic is float32, rounded once; keys that are not seen get 0.

    Args:
        scores: [H, G queries, keys] bfloat16 on the CPU, contiguous. Row i is that of query
            i mod ``queries``; the last query and the last key are the same token.
        queries: How many, at most the number of keys.
        window: How many keys a query sees at most, its own among them; None for all before it.

    Raises:
        RuntimeError: A dtype, device or shape that does not fit; the extension cannot be loaded.
    """
    operation, isa = _causal_softmax()
    operation(scores, queries, scores.shape[-1] if window is None else window, isa)
