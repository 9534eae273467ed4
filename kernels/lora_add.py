"""One adapter's low-rank update in decoding, in one launch a module.

    out_i += s B (A x_i)      row i of the adapter's, A [r, K], B [O, r]; in float32, rounded once

PEFT takes it apart into a cast, two thin products, a product with s and a sum: five launches, each
of which waits for the one before. Here program (i, t) makes A x_i whole, and of B's rows those of
its tile of outputs. That reads A once a program, from L2, and asks for no exchange between
programs; B and out are under way before A is needed.

Bytes from memory: A, B, x and out once, 2 r (K + O) + 4 O + 2 K in 16 bits, 0.16 MB at r = 8 and
K = O = 4096: 0.05 us at 3.0 TB/s. From L2: r K elements a program, 64 KB, of O / 256 programs a
row, 0.6 us at 64 bytes a cycle and processor. What it costs is a launch and a chain of three loads
and a reduction: 3 us predicted, against 5 launches of 2 us. An 8B with LoRA on q and v has 64
modules: 0.4 ms less of the 5.4 ms that reading its 16 GB takes. Not measured on a GPU.

Past some rows the repeated reads of A cost more than the launches: 16 rows are 16 MB from L2, 3 us
at 5 TB/s, and the most that `qadapter.ops.low_rank` hands over. Prompts take products of libraries.
"""

import triton
import triton.language as tl
from torch import Tensor

from qadapter.kernels.common import on_device

TILE = 16384  # elements of A at a time: 32 a thread
OUTPUTS = 256  # a program
WARPS = 16


@triton.jit(do_not_specialize=["rank"])
def lora_add_kernel(
    x_ptr,
    lora_a_ptr,
    lora_b_ptr,
    out_ptr,
    x_stride,
    out_stride,
    scaling,
    dim,
    width,
    rank,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    ranks = tl.arange(0, RANK)
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    here = out_ptr + row * out_stride + outputs
    before = tl.load(here, mask=outputs < width, other=0.0).to(tl.float32)
    both = (outputs < width)[:, None] & (ranks < rank)[None, :]
    up = tl.load(lora_b_ptr + outputs[:, None] * rank + ranks[None, :], mask=both, other=0.0)
    low = tl.zeros([RANK], tl.float32)
    for start in range(0, dim, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        exists = columns < dim
        x = tl.load(x_ptr + row * x_stride + columns, mask=exists, other=0.0).to(tl.float32)
        inside = (ranks < rank)[:, None] & exists[None, :]
        down = tl.load(lora_a_ptr + ranks[:, None] * dim + columns[None, :], mask=inside, other=0.0)
        low += tl.sum(down.to(tl.float32) * x[None, :], axis=1)
    delta = tl.sum(up.to(tl.float32) * low[None, :], axis=1) * tl.cast(scaling, tl.float32)
    tl.store(here, (before + delta).to(out_ptr.dtype.element_ty), mask=outputs < width)


def lora_add_(out: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> None:
    """out [N, O] += scaling (x [N, K] A^T) B^T, rows dense; few ranks, few rows."""
    num_rows, width = out.shape
    rank, dim = lora_a.shape
    if out.numel() == 0:
        return
    padded = triton.next_power_of_2(rank)
    block = min(TILE // padded, triton.next_power_of_2(dim))
    outputs = min(OUTPUTS, triton.next_power_of_2(width))
    with on_device(out.device):
        lora_add_kernel[(num_rows, triton.cdiv(width, outputs))](
            x,
            lora_a.contiguous(),
            lora_b.contiguous(),
            out,
            x.stride(0),
            out.stride(0),
            scaling,
            dim,
            width,
            rank,
            RANK=padded,
            BLOCK=block,
            OUTPUTS=outputs,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
