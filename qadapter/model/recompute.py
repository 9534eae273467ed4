"""Less to keep for backward: what costs no matrix product is computed again instead of stored.

The trunk is frozen, so backward needs few of the activations that its layers store. Two kinds cost
next to nothing to make again, and are half of the memory of a step through a Llama-like trunk:

    RMSNorm            keeps its input (2 bytes an element in bfloat16) instead of what eager
                       PyTorch keeps of its float32 steps (4)
    act(gate) * up     keeps gate and up instead of gate, act(gate) and up

The modules' own code runs, twice, so values are bit for bit those of the unchanged model. Under
torch.compile, whose partitioner decides this by itself, and without a gradient nothing changes.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _Recompute(torch.autograd.Function):
    """function(*tensors), whose inputs alone are kept."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*tensors)
        return function(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        tensors = [
            tensor.detach().requires_grad_(needed)
            for tensor, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        ]
        with torch.enable_grad():
            output = ctx.function(*tensors)
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        found = iter(torch.autograd.grad(output, wanted, grads[0]))
        return (None, *(next(found) if tensor.requires_grad else None for tensor in tensors))


def _recomputed(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    needed = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if not needed or torch.compiler.is_compiling():
        return function(*tensors)
    return _Recompute.apply(function, *tensors)


def _norm_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    original: Any = type(self).forward
    if kwargs or len(args) != 1:
        return original(self, *args, **kwargs)
    return _recomputed(lambda hidden: original(self, hidden), *args)


def _gated_forward(self: Any, hidden: Tensor) -> Tensor:
    product = _recomputed(
        lambda gate, up: self.act_fn(gate) * up, self.gate_proj(hidden), self.up_proj(hidden)
    )
    return self.down_proj(product)


def _is_frozen_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm") and not any(
        parameter.requires_grad for parameter in module.parameters()
    )


def _is_gated_mlp(module: nn.Module) -> bool:
    """A gated MLP, told by what it computes and not by its class."""
    parts = ("gate_proj", "up_proj", "down_proj", "act_fn")
    if not all(isinstance(getattr(module, part, None), nn.Module) for part in parts):
        return False
    weight = next(module.parameters(), None)
    width = getattr(module.gate_proj, "in_features", None)
    if weight is None or not isinstance(width, int):
        return False  # quantised, in a form of its own
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 2, width, generator=generator)
    hidden = hidden.to(weight.device, weight.dtype if weight.is_floating_point() else None)
    try:
        with torch.no_grad():
            return torch.equal(module(hidden), _gated_forward(module, hidden))
    except Exception:  # another signature, other sizes: not one of those
        return False


def recompute_cheap(model: nn.Module) -> int:
    """Change the modules of ``model`` named above in place; how many. ``model`` is in eval mode."""
    count = 0
    for module in model.modules():
        if "forward" in vars(module):
            continue  # somebody else's replacement
        if _is_frozen_norm(module):
            module.forward = MethodType(_norm_forward, module)
        elif _is_gated_mlp(module):
            module.forward = MethodType(_gated_forward, module)
        else:
            continue
        count += 1
    return count
