"""`qadapter::sample` in Triton: two launches, with filters and without.

    sample_blocks    grid (B, V / 2048)    one read of the logits -> maximum and sum per group
    sample_draw      grid (B,)             the draw                  where nothing is filtered
    sample_filter    grid (B,)             the filters and the draw  otherwise

Bytes: each logits tensor once, 4 V per row for two 16-bit streams, plus what the second launch
reads again: one group, or the groups that can hold a kept token. Floor at 3.0 TB/s for B = 64,
V = 128256, bf16, two streams: 11 us. Workspace per row: 8 V / GROUP bytes, with filters twice that
and 8 KB. Grids depend on shapes alone and nothing is read back, so the calls can be captured in a
CUDA graph. A number for all rows (scale, base_weight, seed, position) is handed over by value, so
that QF.sample launches these two kernels and nothing else, but for the seeds that it draws where
none is given: up to four fills before, some 2 us each where launches are what a step waits for.
Not measured on a GPU.
"""

import math
import struct

import torch
import triton
from torch import Tensor

from qadapter.kernels.common import on_device
from qadapter.kernels.sample_blocks import TILE, WARPS, sample_blocks_kernel
from qadapter.kernels.sample_draw import sample_draw_kernel
from qadapter.kernels.sample_filter import (
    CANDIDATES,
    FILTER_TILE,
    FILTER_WARPS,
    sample_filter_kernel,
)

# Tokens per group, as long as a row has no more groups than one program holds in registers.
PLAIN_GROUP, MOST_PLAIN_GROUPS = 256, 1024
FILTER_GROUP, MOST_FILTER_GROUPS = 32, 4096
DRAW_WARPS = 4


def group_size(vocab: int, filtered: bool) -> int:
    """A power of two that depends on V alone, never on the batch."""
    smallest, most = FILTER_GROUP, MOST_FILTER_GROUPS
    if not filtered:
        smallest, most = PLAIN_GROUP, MOST_PLAIN_GROUPS
    return max(smallest, triton.next_power_of_2(triton.cdiv(vocab, most)))


def rows_aligned(logits: Tensor) -> bool:
    """Whether every 16-byte vector of a row is whole and on its boundary.

    The stride counts for a single row, too: alone it must be summed in the order of its batch.
    """
    step = logits.stride(0) * logits.element_size()
    return logits.shape[1] % 16 == 0 and step % 16 == 0 and logits.data_ptr() % 16 == 0


def _bits(value: float) -> int:
    """A float64 as an integer argument: Triton rounds floating arguments to float32."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def _number(values: Tensor) -> Tensor | int:
    """A number that lies on the host as itself, or its bits: the kernels take it by value."""
    if values.is_cpu and values.shape[0] == 1:
        number = values.item()
        return _bits(number) if isinstance(number, float) else int(number)
    return values


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
    """`qadapter.ops.sample` has the arguments."""
    batch, vocab = q_logits.shape
    device = q_logits.device
    tokens = torch.empty(batch, dtype=torch.int64, device=device)
    logprobs = torch.empty(batch, dtype=torch.float32, device=device)
    if batch == 0:
        return tokens, logprobs
    by_k, by_p, by_min = 0 < top_k < vocab, top_p < 1.0, min_p > 0.0
    filtered = by_k or by_p or by_min
    base = q_logits if base_logits is None else base_logits  # a pointer that is never followed
    has_base = base_logits is not None
    aligned = rows_aligned(q_logits) and rows_aligned(base)
    group = group_size(vocab, filtered)
    groups = triton.cdiv(vocab, group)
    group_max = torch.empty((batch, groups), dtype=torch.float32, device=device)
    group_sum = torch.empty_like(group_max)
    strides = (base.stride(0), q_logits.stride(0))
    steps = tuple(int(t.shape[0] > 1) for t in (scale, base_weight, position))
    shared_seed = seed.shape[0] != batch
    with on_device(device):
        numbers = tuple(_number(t) for t in (scale, base_weight, seed, position))
        sample_blocks_kernel[(batch, triton.cdiv(vocab, TILE))](
            base,
            q_logits,
            *numbers[:2],
            group_max,
            group_sum,
            *strides,
            *steps[:2],
            vocab,
            groups,
            HAS_BASE=has_base,
            ALIGNED=aligned,
            GROUP=group,
            ROWS=max(1, TILE // group),
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
        pointers = (base, q_logits, *numbers, group_max, group_sum)
        padded = triton.next_power_of_2(groups)
        if not filtered:
            sample_draw_kernel[(batch,)](
                *pointers,
                tokens,
                logprobs,
                *strides,
                *steps,
                vocab,
                groups,
                HAS_BASE=has_base,
                GROUP=group,
                GROUPS=padded,
                SHARED_SEED=shared_seed,
                GREEDY=greedy,
                num_warps=DRAW_WARPS,
                enable_fp_fusion=False,
            )
            return tokens, logprobs
        workspace = torch.empty(
            (batch, 2 * groups + CANDIDATES.value), dtype=torch.int32, device=device
        )
        sample_filter_kernel[(batch,)](
            *pointers,
            workspace,
            tokens,
            logprobs,
            *strides,
            *steps,
            vocab,
            groups,
            top_k,
            _bits(top_p),
            _bits(math.log(min_p) if by_min else 0.0),
            HAS_BASE=has_base,
            ALIGNED=aligned,
            BY_K=by_k,
            BY_P=by_p,
            BY_MIN=by_min,
            GROUP=group,
            GROUPS=padded,
            ROWS=max(1, FILTER_TILE // group),
            SHARED_SEED=shared_seed,
            GREEDY=greedy,
            num_warps=FILTER_WARPS,
            enable_fp_fusion=False,
        )
    return tokens, logprobs
