"""Shared by the Triton kernels: online softmax statistics in log2 units, and how a row is walked.

A row is walked in vectors of VEC = 16 bytes / element size, so that one vector is one 128-bit load.
Tiles are [ROWS, VEC]: the layout pass gives every thread whole vectors, so reducing along axis 1
stays inside the thread and the loop over a row has no shuffle and no barrier. Each of the ROWS
positions keeps its own running (maximum, sum); they meet once, after the loop.

Rows need not start on a 16-byte boundary (odd V). ALIGN says what the launcher found out:
    0  the streams are misaligned against each other: narrower loads, still correct
    1  every row of every stream starts on a boundary
    2  all streams are off by the same amount in a given row: the elements before the first common
       boundary (the head) and after the last whole vector (the tail) go through one small tile
"""

import contextlib
import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = math.log2(math.e)
NEG_INF = tl.constexpr(float("-inf"))
POS_INF = tl.constexpr(float("inf"))
NO_ACTION = tl.constexpr(-100)


@triton.jit
def mix_streams(zq, zb, mix_weight, SIGN: tl.constexpr):
    """x = z_q + m z_b in float32, SIGN the sign of m. -inf in either stream masks the token.

    For m > 0 the sum alone does that. For m < 0 a masked base token would become +inf, and +inf in
    the base, which poisons its row, would become a mask.
    """
    x = zq
    if SIGN != 0:
        x = zq + mix_weight * zb
        if SIGN < 0:
            x = tl.where((zq == NEG_INF) | (zb == NEG_INF), NEG_INF, x)
            x = tl.where(zb == POS_INF, float("nan"), x)
    return x


@triton.jit
def finite_or_zero(maximum):
    """Reference point of a sum: where nothing but -inf was seen, -inf - -inf must not be NaN."""
    return tl.where(maximum == NEG_INF, 0.0, maximum)


@triton.jit
def online_update(x, scale, maximum, total):
    """One tile [ROWS, VEC] into the running pairs: one exp2 per element, one rescale per vector.

    `maximum` stays in the units of x (differences are then exact to the last bit of the logits),
    `total` is sum exp2((x - maximum) * scale). NaN and +inf reach `total` and stay there: whether
    the hardware's maximum drops a NaN does not matter.
    """
    new_maximum = tl.maximum(maximum, tl.max(x, axis=1))
    origin = finite_or_zero(new_maximum)
    rescaled = total * tl.exp2((maximum - origin) * scale)
    return new_maximum, rescaled + tl.sum(tl.exp2((x - origin[:, None]) * scale), axis=1)


@triton.jit
def merge_lanes(maximum, total, scale):
    """Pairs of a vector -> one pair."""
    merged = tl.max(maximum, axis=0)
    origin = finite_or_zero(merged)
    return merged, tl.sum(total * tl.exp2((maximum - origin) * scale), axis=0)


@triton.jit
def elements_pair(x, scale):
    """A small tile of elements -> one pair."""
    maximum = tl.max(x, axis=0)
    return maximum, tl.sum(tl.exp2((x - finite_or_zero(maximum)) * scale), axis=0)


@triton.jit
def merge_pairs(max_a, total_a, max_b, total_b, scale):
    merged = tl.maximum(max_a, max_b)
    origin = finite_or_zero(merged)
    left = total_a * tl.exp2((max_a - origin) * scale)
    return merged, left + total_b * tl.exp2((max_b - origin) * scale)


@triton.jit
def row_head(row, stride, skew, vocab, ALIGN: tl.constexpr, VEC: tl.constexpr):
    """How many elements of this row come before its first 16-byte boundary."""
    head = 0
    if ALIGN == 2:
        head = ((VEC - (skew + row * stride) % VEC) % VEC).to(tl.int32)
        head = tl.minimum(head, vocab)
    return head


@triton.jit
def row_pointer(pointer, row, stride, ALIGN: tl.constexpr):
    """The first element of a row. 128-bit accesses hang on the hint here and on the one below."""
    here = pointer + row * stride
    if ALIGN == 1:
        here = tl.multiple_of(here, 16)
    return here


@triton.jit
def vectors_pointer(row_start, head, ALIGN: tl.constexpr):
    """The first whole vector of a row."""
    here = row_start + head
    if ALIGN == 2:
        here = tl.multiple_of(here, 16)
    return here


@triton.jit
def ragged_columns(head, vocab, VEC: tl.constexpr):
    """Columns of a row outside its whole vectors, a tile of 2 * VEC: (columns, which exist)."""
    index = tl.arange(0, 2 * VEC)
    tail = (vocab - head) % VEC
    in_tail = index - VEC
    columns = tl.where(index < VEC, index, vocab - tail + in_tail)
    return columns, (index < head) | ((in_tail >= 0) & (in_tail < tail))


def vector_length(dtype: torch.dtype) -> int:
    return 16 // dtype.itemsize


def row_alignment(vec: int, *streams: Tensor) -> tuple[int, int]:
    """(ALIGN, elements by which row 0 starts after a 16-byte boundary)."""
    skews = {t.data_ptr() // t.element_size() % vec for t in streams}
    strides = {t.stride(0) % vec if t.shape[0] > 1 else 0 for t in streams}
    if len(skews) > 1 or len(strides) > 1:
        return 0, 0
    skew = skews.pop()
    return (1 if skew == 0 and strides == {0} else 2), skew


def tile_shape(vocab: int, vec: int, align: int) -> tuple[int, int]:
    """(ROWS, num_warps): two vectors per thread; 256 threads for long rows, fewer for short ones.

    Two vectors of 16 bytes and stream keep 64 bytes per thread in flight in 32 to 48 registers.
    Narrow accesses need an address each: one vector per thread there, or registers spill.
    """
    per_thread = 1 if align == 0 else 2
    rows = min(256 * per_thread, triton.next_power_of_2(max(1, vocab // vec)))
    rows = max(32 * per_thread, rows)
    return rows, rows // (32 * per_thread)


def row_walk(*streams: Tensor) -> tuple[int, dict[str, int]]:
    """How kernels walk the rows of these [N, V]: (skew, the constants of the launch)."""
    vocab, vec = streams[0].shape[1], vector_length(streams[0].dtype)
    align, skew = row_alignment(vec, *streams)
    rows, warps = tile_shape(vocab, vec, align)
    ragged = align == 2 or vocab % vec != 0
    return skew, {"RAGGED": ragged, "ALIGN": align, "VEC": vec, "ROWS": rows, "num_warps": warps}


def label_pointer(labels: Tensor) -> Tensor:
    """Integer labels at a 16-byte boundary: some Triton versions load misaligned int64 wrongly."""
    return labels if labels.data_ptr() % 16 == 0 else labels.clone()


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors' own."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def processor_count(device: torch.device) -> int:
    """Streaming multiprocessors; 1 off the GPU, where there is nothing to fill."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
