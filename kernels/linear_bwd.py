"""The gradient of the hidden states, from what the linear operation's forward left.

    grad = coef_p u + c W_a,   c = (coef_p p_a + coef_a) slope_a, 0 for a row without an action

computed in float32 and rounded once. One program per row: the row of W is gathered where it lies,
so nothing exists between the launch and its result.

Bytes per element: 6 in 16 bits (u, W_a, grad), 12 in float32. N = 8192, D = 4096, 16 bits: 201 MB,
67 us at 3.0 TB/s, in one launch. Predicted: within a tenth of that, as every row of W is D elements
long and lies together. Not measured on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qadapter.kernels.common import NO_ACTION, label_pointer, on_device

BLOCK = 1024  # columns at a time: 8 a thread, 128 bits of 16-bit numbers
WARPS = 4


@triton.jit(do_not_specialize=["vocab"])
def linear_bwd_kernel(
    u_ptr,
    weight_ptr,
    actions_ptr,
    p_action_ptr,
    slope_ptr,
    coef_p_ptr,
    coef_a_ptr,
    grad_ptr,
    u_stride,
    weight_stride,
    dim,
    vocab,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    action = tl.load(actions_ptr + row)
    present = action != NO_ACTION
    coef_p = tl.load(coef_p_ptr + row)
    # p_a of an action that is no token is NaN, and so is this row; W is read inside all the same.
    of_action = coef_p * tl.load(p_action_ptr + row) + tl.load(coef_a_ptr + row)
    of_action = tl.where(present, of_action * tl.load(slope_ptr + row), 0.0)
    action = tl.where((action >= 0) & (action < vocab), action, 0)
    of_weight = tl.where(present, dim, 0)  # a row without an action reads none of W
    u_row = u_ptr + row * u_stride
    weight_row = weight_ptr + action * weight_stride
    grad_row = grad_ptr + row * dim
    for start in range(0, dim, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        exists = columns < dim
        u = tl.load(u_row + columns, mask=exists, other=0.0).to(tl.float32)
        w = tl.load(weight_row + columns, mask=columns < of_weight, other=0.0).to(tl.float32)
        grad = coef_p * u + of_action * w
        tl.store(grad_row + columns, grad.to(grad_ptr.dtype.element_ty), mask=exists)


def linear_bwd(
    u: Tensor,
    weight: Tensor,
    actions: Tensor,
    p_action: Tensor,
    slope_action: Tensor,
    coef_p: Tensor,
    coef_a: Tensor,
) -> Tensor:
    """grad [N, D] in the dtype of u, contiguous."""
    num_rows, dim = u.shape
    grad = torch.empty((num_rows, dim), dtype=u.dtype, device=u.device)
    if grad.numel() == 0:
        return grad
    with on_device(u.device):
        linear_bwd_kernel[(num_rows,)](
            u,
            weight,
            label_pointer(actions),
            p_action,
            slope_action,
            coef_p,
            coef_a,
            grad,
            u.stride(0),
            weight.stride(0),
            dim,
            weight.shape[0],
            BLOCK=min(BLOCK, triton.next_power_of_2(dim)),
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    return grad
