"""What the operations of torch.ops.qadapter share: the library, and checks that read tensors.

Operations are defined in this room alone. Each is one opaque call for torch.compile, and picks its
implementation (`backends`) when it runs. Values that can only be checked by reading a tensor
(actions in range, cu_seqlens that fit) are checked here for CPU tensors; on a GPU that would stall
the stream, so there a wrong value turns into NaN instead.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("qadapter", "DEF")

COMPOSITION = "float alpha_0, float alpha_tilde, float center"
PREFERENCE = "float gamma, float reg_coef, float bt_scale, bool value_next, bool length_mean"


def define(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> None:
    """Add an operation for every device, for torch.compile (``fake``), and its gradient if any."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qadapter::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            f"qadapter::{name}", backward, setup_context=setup_context, lib=_LIBRARY
        )


def check_actions(actions: Tensor, vocab: int) -> None:
    if actions.device.type != "cpu" or actions.numel() == 0:
        return
    bad = (actions != -100) & ((actions < 0) | (actions >= vocab))
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"actions[{row}] = {int(actions[row])} is not a token id: expected 0 <= id < {vocab} "
            "(the size of the vocabulary), or -100 for a row without action"
        )


def check_cu_seqlens(cu_seqlens: Tensor, num_rows: int) -> None:
    if cu_seqlens.device.type != "cpu" or cu_seqlens.numel() == 0:
        return
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != num_rows:
        raise ValueError(
            f"cu_seqlens runs from {first} to {last}, expected from 0 to the number of rows, "
            f"{num_rows}"
        )
    if (cu_seqlens[1:] < cu_seqlens[:-1]).any():
        raise ValueError("cu_seqlens decreases; expected the running sum of sequence lengths")


def dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def rows_dense(logits: Tensor | None) -> Tensor | None:
    """Kernels want stride 1 along the vocabulary; any row stride is fine."""
    if logits is None or logits.shape[1] <= 1 or logits.stride(1) == 1:
        return logits
    # Not contiguous(): a view without rows counts as contiguous, whatever its strides.
    return logits.clone(memory_format=torch.contiguous_format)


def no_second_derivative(ctx: Any, *_: Any) -> Any:
    raise RuntimeError("qadapter: second derivatives are not implemented (create_graph=True)")


def statistics(like: Tensor, *shape: int) -> Tensor:
    """An empty tensor for statistics of ``like``: float32, or float64 for float64."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return like.new_empty(shape, dtype=dtype)
