"""Products of a few rows, which decoding takes hundreds of times a token: on the CPU, by csrc/cpu.

No operation of torch.ops.qadapter: it is called where a dispatch would be felt, takes
microseconds, and has no gradient.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from qadapter.ops import cpp

# The most rows for which rows_linear was measured to be faster than torch's product (oneDNN's or
# MKL's), by `cpp.capability`.
_ROWS_LIMITS = {
    "amx": {torch.bfloat16: 256, torch.float32: 32},
    "avx512_bf16": {torch.bfloat16: 64, torch.float32: 32},
    # oneDNN has no bfloat16 product there that is worth the name.
    "avx512": {torch.bfloat16: 4096, torch.float32: 32},
    "avx2": {torch.bfloat16: 4096, torch.float32: 32},
    cpp.CAPABILITIES[0]: {torch.bfloat16: 16, torch.float32: 2},  # on x86-64
}


@functools.cache
def _operation() -> tuple[Any, int]:
    """The operation and the vector code for it: what leads to them is looked up once."""
    return cpp.extension().rows_linear.default, cpp.isa()


@functools.cache
def rows_linear_limit(dtype: torch.dtype) -> int:
    """The most rows for which `rows_linear` is the faster product; 0 where it never is."""
    if cpp.why_not_loaded() is not None:
        return 0
    return _ROWS_LIMITS[cpp.CAPABILITIES[_operation()[1]]].get(dtype, 0)


def rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T (+ bias) for few rows x, as nn.functional.linear; without gradients.

    Sums are float32 and rounded once. What a row gives does not depend on the other rows, and on
    their number only where AMX takes over, above 4 rows in bfloat16.
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
    linear, isa = _operation()
    return linear(x, weight, bias, isa)
