"""Products of a few rows, which decoding takes hundreds of times a token: on the CPU, by csrc/cpu.

No operations of torch.ops.qadapter: they are called where a dispatch would be felt, take
microseconds, and have no gradient.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from qadapter.ops import cpp

# The most rows for which rows_linear was measured to be faster than torch's product (oneDNN's or
# MKL's), by `cpp.capability`. CPUs with AMX were not measured.
_ROWS_LIMITS = {
    "amx": {torch.bfloat16: 64, torch.float32: 32},
    "avx512_bf16": {torch.bfloat16: 64, torch.float32: 32},
    "avx512": {torch.bfloat16: 64, torch.float32: 32},
    "avx2": {torch.bfloat16: 64, torch.float32: 32},
    "plain": {torch.bfloat16: 16, torch.float32: 2},
}


@functools.cache
def _operations() -> tuple[Any, Any, int]:
    """Both operations and the vector code for them: what leads to them is looked up once."""
    extension = cpp.extension()
    return extension.rows_linear.default, extension.lora_add_.default, cpp.isa()


@functools.cache
def rows_linear_limit(dtype: torch.dtype) -> int:
    """The most rows for which `rows_linear` is the faster product; 0 where it never is."""
    if cpp.why_not_loaded() is not None:
        return 0
    return _ROWS_LIMITS[cpp.CAPABILITIES[_operations()[2]]].get(dtype, 0)


def rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T (+ bias) for few rows x, as nn.functional.linear; without gradients.

    Sums are float32 and rounded once. What a row gives does not depend on the other rows.
    QADAPTER_CPU_CAPABILITY is read at the first call.

    Args:
        x: [..., K] float32 or bfloat16 on the CPU.
        weight: [O, K] of the same dtype, unit stride in the last dimension.
        bias: [O] of the same dtype, contiguous.

    Returns:
        [..., O], contiguous.

    Raises:
        RuntimeError: A dtype, device or shape that does not fit; the extension cannot be loaded.
    """
    linear, _, isa = _operations()
    return linear(x, weight, bias, isa)


def lora_add_(
    out: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    start: int,
    stop: int,
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

    Raises:
        RuntimeError: A dtype, device, shape or range that does not fit; the extension cannot be
            loaded.
    """
    _, lora, isa = _operations()
    lora(out, x, lora_a, lora_b, scaling, start, stop, isa)
