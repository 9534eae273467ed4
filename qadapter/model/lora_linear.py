"""A LoRA on a frozen linear layer in one autograd node, for training on the CPU.

    y = x W^T + b + s (x A^T) B^T

PEFT takes it apart into a cast of x, two thin products, a product with s, a mixed sum and a cast
back: with a float32 adapter on a bfloat16 layer seven tensors of the layer's size in the forward
and more in the backward, kept for it or made anew, and products that no library is made for. Here
the low-rank part is added to the layer's output in place (csrc/cpu/lora_add.cpp), rounded once as
PEFT rounds it, and of all its intermediates x A^T alone, float32 [N, r], is kept:

    dx = g W + s (g B) A        dA = s (g B)^T x        dB = s g^T (x A^T)

with float32 sums throughout. Without vector code (AVX2 or more) the products of float32 layers are
PyTorch's, and those that add to a tensor of the layer's size do so in place, which saves PEFT's
five passes over such tensors. A gated MLP of such layers is one node: the gradients of its input
add up in one tensor.
"""

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from qadapter.ops import cpp, layer_rows, low_rank

_ADAPTER_DTYPES = {  # by the layer's
    torch.bfloat16: (torch.float32, torch.bfloat16),
    torch.float32: (torch.float32,),
}


# W, b, A, B and s of a layer.
Parts = tuple[Tensor, Tensor | None, Tensor, Tensor, float]


def _by_torch(x: Tensor) -> bool:
    return x.dtype is torch.float32 and not low_rank.has_vectors()


def _output(x: Tensor, parts: Parts) -> tuple[Tensor, Tensor]:
    """A layer's output, and x A^T."""
    weight, bias, lora_a, lora_b, scaling = parts
    out = linear(x, weight, bias)
    x_rows, out_rows = _rows(x), out.view(-1, out.shape[-1])
    if _by_torch(x):
        low = x_rows @ lora_a.t()
        out_rows.addmm_(low, lora_b.t(), alpha=scaling)
    else:
        low = lora_a.new_empty((x_rows.shape[0], lora_a.shape[0]), dtype=torch.float32)
        low_rank.lora_add_(out_rows, x_rows, lora_a, lora_b, scaling, 0, len(x_rows), low)
    return out, low


def _gradients(
    grads: Tensor, x_rows: Tensor, parts: Parts, low: Tensor, dx: Tensor | None, wanted: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, A and B, in rows; that of x is added to ``dx`` where one is given, and has no columns
    where it is not wanted."""
    weight, _, lora_a, lora_b, scaling = parts
    if dx is not None:
        dx.addmm_(grads, weight)
    else:
        dx = grads @ weight if wanted else grads.new_empty((len(grads), 0))
    if _by_torch(x_rows):
        grad_low = (grads @ lora_b).mul_(scaling)
        if wanted:
            dx.addmm_(grad_low, lora_a)
        da, db = grad_low.t() @ x_rows, (grads.t() @ low).mul_(scaling)
    else:
        da, db = low_rank.lora_backward_(dx, grads, x_rows, low, lora_a, lora_b, scaling)
    if lora_a.dtype != torch.float32:
        da, db = da.to(lora_a.dtype), db.to(lora_b.dtype)
    return dx, da, db


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
    ) -> Tensor:
        out, low = _output(x, (weight, bias, lora_a, lora_b, scaling))
        ctx.save_for_backward(x, weight, lora_a, lora_b, low)
        ctx.scaling = scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, lora_a, lora_b, low = ctx.saved_tensors
        parts = (weight, None, lora_a, lora_b, ctx.scaling)
        wanted = ctx.needs_input_grad[0]
        dx, da, db = _gradients(_rows(grad), _rows(x), parts, low, None, wanted)
        return dx.view(x.shape) if wanted else None, None, None, da, db, None


class _GatedLora(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)), three such layers: the gradients of x add up in one tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: tuple[Parts, ...], *factors: Tensor) -> Tensor:
        gate_parts, up_parts, down_parts = layers
        gate, low_gate = _output(x, gate_parts)
        up, low_up = _output(x, up_parts)
        product = layer_rows.silu_mul(gate, up)
        out, low_down = _output(product, down_parts)
        ctx.save_for_backward(
            x, gate, up, product, low_gate, low_up, low_down, *factors, *(p[0] for p in layers)
        )
        ctx.scalings = [parts[4] for parts in layers]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, gate, up, product, low_gate, low_up, low_down, *rest = ctx.saved_tensors
        factors, weights = rest[:6], rest[6:]
        of_gate, of_up, of_down = (
            (weight, None, factors[2 * i], factors[2 * i + 1], ctx.scalings[i])
            for i, weight in enumerate(weights)
        )
        x_rows = _rows(x)
        d_product, *down = _gradients(_rows(grad), _rows(product), of_down, low_down, None)
        d_gate, d_up = layer_rows.silu_mul_gradients(d_product.view(gate.shape), gate, up)
        wanted = ctx.needs_input_grad[0]
        dx, *of_a_and_b = _gradients(_rows(d_gate), x_rows, of_gate, low_gate, None, wanted)
        dx, *more = _gradients(_rows(d_up), x_rows, of_up, low_up, dx if wanted else None, wanted)
        return (dx.view(x.shape) if wanted else None), None, *of_a_and_b, *more, *down


def gated(x: Tensor, gate: Any, up: Any, down: Any) -> Tensor | None:
    """down(silu(gate(x)) * up(x)) in one node, where `fuse_lora` changed all three layers and each
    would be served by itself; None elsewhere, and without gradients."""
    layers = (gate, up, down)
    if not torch.is_grad_enabled() or not all(map(is_fused, layers)):
        return None
    if any(_is_watched(layer) for layer in layers):
        return None
    parts = tuple(found for layer in layers if (found := _parts(layer, x)) is not None)
    if len(parts) < len(layers):
        return None
    factors = [factor for one in parts for factor in one[2:4]]
    return _GatedLora.apply(x, parts, *factors)


def _rows(tensor: Tensor) -> Tensor:
    """[.., K] as [N, K] with dense rows."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _forward(self: LoraLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    parts = None if args or kwargs else _parts(self, x)
    if parts is None:
        original: Any = type(self).forward
        return original(self, x, *args, **kwargs)
    return _LoraLinear.apply(x, *parts)


def _parts(layer: Any, x: Tensor) -> Parts | None:
    """W, b, A, B and s where the layer is a plain LoRA that the kernels serve."""
    if layer.disable_adapters or layer.merged or x.device.type != "cpu" or x.numel() == 0:
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1 or names[0] in layer.lora_variant:
        return None
    name, base = names[0], layer.base_layer
    a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    weights = (base.weight, a.weight, b.weight)
    if (
        a.weight.dtype not in _ADAPTER_DTYPES.get(x.dtype, ())
        or base.weight.dtype != x.dtype
        or b.weight.dtype != a.weight.dtype
        or b.bias is not None
        or base.weight.requires_grad
        or (base.bias is not None and base.bias.requires_grad)
        or not (isinstance(dropout, nn.Identity) or not dropout.training or dropout.p == 0)
        # A subclass (a shard, a quantised weight) has products of its own.
        or any(type(weight) is not nn.Parameter for weight in weights)
        or any(_has_hooks(module) for module in (base, a, b))
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
    ):
        return None
    return base.weight, base.bias, a.weight, b.weight, float(layer.scaling[name])


def _is_watched(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _has_hooks(module: nn.Module) -> bool:
    return _is_watched(module) or "forward" in vars(module)


def is_fused(module: nn.Module) -> bool:
    return getattr(vars(module).get("forward"), "__func__", None) is _forward


def fuse_lora(model: nn.Module) -> int:
    """Change the plain LoRA layers of ``model`` in place; how many.

    What each call finds decides: dropout at work, several active adapters, a merged or a
    disabled one, another device or dtype, autocast and torch.compile take PEFT's own way.
    """
    if cpp.why_not_loaded() is not None:
        return 0
    count = 0
    for module in model.modules():
        plain = type(module) is LoraLinear and type(module.base_layer) is nn.Linear
        if plain and "forward" not in vars(module):
            module.forward = MethodType(_forward, module)
            count += 1
    return count
