"""The language-model head of the linear operation: its products, its bias, its scalars.

Logits leave a product as float32 and are never rounded to 16 bits. CUDA multiplies 16-bit numbers
into float32 (`out_dtype`, in torch since 2.8); hidden states and weights of different types, and
the CPU under Triton's interpreter, widen the weight tile by tile instead: 2 + 4 bytes per element
of W and chunk, 2.1 ms at 3.0 TB/s for V = 128256, D = 4096. Not measured on a GPU.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

TILE_ELEMENTS = 1 << 24  # of a widened weight: 64 MiB
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
            wide = hidden.float()
            for tile in self.tiles():
                torch.mm(wide, weight[tile].float().t(), out=out[:, tile])

    def pull_back(self, p: Tensor, out: Tensor) -> None:
        """out = p @ W, sums in float32, rounded once."""
        weight = self.weight
        if p.dtype == out.dtype and (weight.is_cuda or out.dtype == torch.float32):
            torch.mm(p, weight, out=out)
        elif p.dtype == torch.float32:
            out.copy_(torch.mm(p, weight))
        elif weight.is_cuda:
            out.copy_(torch.mm(p, weight, out_dtype=torch.float32))
        else:
            wide = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
            for tile in self.tiles():
                wide.addmm_(p[:, tile].float(), weight[tile].float())
            out.copy_(wide)
