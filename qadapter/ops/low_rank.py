"""Products of a low-rank adapter, added in place, on the CPU: by csrc/cpu/lora_add.cpp.

No operations of torch.ops.qadapter: they are called hundreds of times a step and have no gradient
of their own; `qadapter.model.lora_linear` composes one of them.
"""

import functools
from typing import Any

from torch import Tensor

from qadapter.ops import cpp


@functools.cache
def _operations() -> tuple[Any, Any, int]:
    """Both operations and the vector code for them: what leads to them is looked up once."""
    extension = cpp.extension()
    return extension.lora_add_.default, extension.lora_outer.default, cpp.isa()


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
