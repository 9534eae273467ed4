"""Causal attention of a whole pack of sequences in one call: csrc/cpu/varlen_attention.cpp.

No operation of torch.ops.qadapter: it is called twice a layer and step, by
`qadapter.model.packed_attention`, and serves bfloat16 on a CPU with AVX512_BF16
or AMX alone.
"""

import functools
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qadapter.ops import cpp


@functools.cache
def _operations() -> tuple[Any, Any, int]:
    """Both operations and the vector code for them: what leads to them is looked up once."""
    extension = cpp.extension()
    forward, backward = extension.varlen_attention_fwd_, extension.varlen_attention_bwd_
    return forward.default, backward.default, cpp.isa()


@functools.cache
def _has_kernel() -> bool:
    return cpp.why_not_loaded() is None and cpp.capability() in ("avx512_bf16", "amx")


def serves(query: Tensor, value: Tensor) -> bool:
    """Whether `varlen_attention` takes heads like these, [B, H, T, D]; nobody traces."""
    return (
        type(query) is Tensor
        and query.is_cpu
        and query.dtype is value.dtype is torch.bfloat16
        and query.shape[-1] == value.shape[-1]
        and query.shape[-1] % 32 == 0
        and query.numel() > 0
        and not torch.compiler.is_compiling()
        and _has_kernel()
    )


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _token_rows(like: Tensor) -> Tensor:
    """New, of [H, T, D] in memory [T, H, D]: what the layer's products take without a copy."""
    heads, tokens, dim = like.shape
    return like.new_empty(tokens, heads, dim).transpose(0, 1)


class _VarlenAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sequences: Tensor, scaling: float, window: int
    ) -> Tensor:
        out = _token_rows(q)
        lse = q.new_empty(q.shape[:2], dtype=torch.float32)
        forward, _, isa = _operations()
        forward(out, lse, q, k, v, sequences, scaling, window, isa)
        ctx.save_for_backward(q, k, v, lse, sequences)
        ctx.scaling, ctx.window = scaling, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k, v, lse, sequences = ctx.saved_tensors
        grads = _token_rows(q), _token_rows(k), _token_rows(v)
        _, backward, isa = _operations()
        grad = _dense_rows(grad)
        backward(*grads, grad, q, k, v, lse, sequences, ctx.scaling, ctx.window, isa)
        return *grads, None, None, None


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, sequences: Tensor, scaling: float, window: int | None = None
) -> Tensor:
    """softmax(scaling q k^T) v of each sequence, over the keys that each query sees.

    Scores are float32; probabilities, and the gradients of scores, are rounded to bfloat16 once.
    What a sequence gives depends on no other, except that gradients of a shared prompt's keys and
    values are sums, in float32 and the order of the sequences.

    Args:
        q: [H, T, D] bfloat16 on the CPU, D a multiple of 32; differentiable once.
        k, v: [Hk, T, D], H a multiple of Hk; differentiable once.
        sequences: int64 [S, 2]: for each sequence how many tokens of a prompt it shares, and how
            many tokens it has of its own, which follow each other in the pack. One that shares 0
            tokens begins a group; the others share its first tokens.
        scaling: The factor of scores.
        window: How many keys a query sees at most, its own among them; None for all before it.

    Returns:
        [H, T, D], in memory [T, H, D].

    Raises:
        RuntimeError: A dtype, device or shape that does not fit, sequences that are not those of
            the pack; a CPU without AVX512_BF16 and AMX; the extension cannot be loaded.
    """
    most = max(1, q.shape[1]) if window is None else window
    q, k, v = (_dense_rows(x) for x in (q, k, v))
    return cast(Tensor, _VarlenAttention.apply(q, k, v, sequences, scaling, most))
