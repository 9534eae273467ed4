"""The language-model head of the linear operation: its products, bias and scalars; its chunks.

Logits leave a product as float32 and are never rounded to 16 bits. CUDA multiplies 16-bit numbers
into float32 (`out_dtype`, in torch since 2.8), in both directions: with a 16-bit result torch may
split the V terms of p @ W among blocks and add up what was rounded to 16 bits already. The float32
result and its rounding are 10 bytes an element of u (N = 8192, D = 4096: 0.11 ms at 3.0 TB/s).

Hidden states and weights of different types, and the CPU under Triton's interpreter, widen the
weight tile by tile: 2 + 4 bytes per element of W and chunk, 2.1 ms at 3.0 TB/s for V = 128256,
D = 4096, and products in float32, which on a GPU are many times slower than those of 16 bits. That
is said once; casting either to the other's type would change the values. Not measured on a GPU.
"""

import functools
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

TILE_ELEMENTS = 1 << 24  # of a widened weight: 64 MiB
BUFFER_BYTES = 1 << 30  # of float32 logits that exist at a time
SIZE_STEP = BUFFER_BYTES // 4  # large buffers are multiples of it
NEG_INF = float("-inf")


@dataclass(frozen=True)
class Head:
    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float

    def scalars(self) -> tuple[float, float, float]:
        inverse = 1.0 / self.softcap if self.softcap != 0.0 else 0.0
        return float(self.logit_scale), float(self.softcap), inverse

    def scaled_bias(self, factor: float, stride: int) -> Tensor:
        """logit_scale * factor * bias in float32, as long as a row; masked tokens stay masked."""
        if self.bias is None:
            return torch.empty(1, dtype=torch.float32, device=self.weight.device)  # not read
        wide = torch.zeros(stride, dtype=torch.float32, device=self.weight.device)
        bias = self.bias.float()
        scaled = bias * (self.logit_scale * factor)
        wide[: bias.shape[0]] = torch.where(bias == NEG_INF, NEG_INF, scaled)
        return wide

    def tiles(self) -> list[slice]:
        step = max(64, TILE_ELEMENTS // max(1, self.weight.shape[1]))
        return [slice(i, i + step) for i in range(0, self.weight.shape[0], step)]

    def product(self, hidden: Tensor, out: Tensor) -> None:
        """out = hidden W^T, float32 that was never anything narrower."""
        weight = self.weight
        if hidden.dtype == weight.dtype == torch.float32:
            torch.mm(hidden, weight.t(), out=out)
        elif hidden.dtype == weight.dtype and weight.is_cuda:
            torch.mm(hidden, weight.t(), out_dtype=torch.float32, out=out)
        else:
            if weight.is_cuda and hidden.dtype != weight.dtype:
                warn_of_mixed_dtypes(hidden.dtype, weight.dtype)
            wide = hidden.float()
            for tile in self.tiles():
                torch.mm(wide, weight[tile].float().t(), out=out[:, tile])

    def pull_back(self, p: Tensor, out: Tensor) -> None:
        """out = p @ W, sums in float32, rounded once."""
        weight = self.weight
        if p.dtype == out.dtype == torch.float32:
            torch.mm(p, weight, out=out)
        elif p.dtype == torch.float32:
            out.copy_(torch.mm(p, weight))
        elif weight.is_cuda:
            # Never the weight's own type, whose sums torch may round on the way.
            out.copy_(torch.mm(p, weight, out_dtype=torch.float32))
        else:
            wide = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
            for tile in self.tiles():
                wide.addmm_(p[:, tile].float(), weight[tile].float())
            out.copy_(wide)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def rows_per_chunk(num_rows: int, stride: int, buffers: int, chunk_size: int) -> int:
    """Rows of a chunk: multiples of 128 that share the work evenly, where nothing else is asked."""
    if chunk_size > 0:
        return min(chunk_size, num_rows)
    most = BUFFER_BYTES // (4 * stride * buffers)
    if most < 128:
        return max(1, min(most, num_rows))
    chunks = _ceil_div(num_rows, most // 128 * 128)
    return min(num_rows, _ceil_div(_ceil_div(num_rows, chunks), 128) * 128)


def chunk_buffers(
    rows: int, stride: int, buffers: int, chunk_size: int, device: torch.device
) -> list[Tensor]:
    """``buffers`` float32 [rows, stride] in one piece of memory, of one size for all long calls.

    Rows of a chunk vary with N. Memory of as many sizes would be cut up by torch's allocator, so
    what is larger than `SIZE_STEP` is a multiple of it; what a caller asked for is taken exactly.
    """
    needed = rows * stride * buffers
    step = SIZE_STEP // 4
    size = needed if chunk_size > 0 or needed <= step else _ceil_div(needed, step) * step
    memory = torch.empty(size, dtype=torch.float32, device=device)[:needed]
    return list(memory.view(buffers, rows, stride))


@functools.cache
def warn_of_mixed_dtypes(hidden: torch.dtype, weight: torch.dtype) -> None:
    """Once for each pair of types."""
    warnings.warn(
        f"qadapter: hidden states are {hidden} and the head is {weight}: their products run in "
        "float32, which on a GPU takes many times as long. Cast one to the other's type, or run "
        "the model under torch.autocast",
        stacklevel=2,
    )


def aligned_rows(hidden: Tensor) -> Tensor:
    """Rows on 16-byte boundaries where D allows it: both streams then take the same product."""
    size = hidden.element_size()
    if hidden.data_ptr() % 16 == 0 and hidden.stride(0) * size % 16 == 0:
        return hidden
    return hidden.clone(memory_format=torch.contiguous_format)


def weights_view(buffer: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, stride]: where the kernel writes p, the upper half of each row if p has 16 bits."""
    return buffer.view(dtype)[:, -buffer.shape[1] :]
