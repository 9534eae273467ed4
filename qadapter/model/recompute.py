"""Less to keep for backward, and fewer passes: what costs no matrix product.

The trunk is frozen, so backward needs few of the activations that its layers store. Two kinds cost
next to nothing to make again, and are half of the memory of a step through a Llama-like trunk:

    RMSNorm            keeps its input (2 bytes an element in bfloat16) instead of what eager
                       PyTorch keeps of its float32 steps (4)
    act(gate) * up     keeps gate and up instead of gate, act(gate) and up

Where the C++ extension is there, RMSNorm as Llama has it and silu(gate) * up run by
`qadapter.ops.layer_rows`, with and without a gradient: float32 and bfloat16 on the CPU, rounded
where the module's own code rounds. Values are then the module's up to the order of its float32
sums and its exponential: in bfloat16 nearly all equal, in float32 most of them within a unit in
the last place. Gradients round less often. Whether a norm is one of those is tried, on random rows
and weights.

All else runs the modules' own code, twice, so values are bit for bit those of the unchanged model.
Under torch.compile, whose partitioner decides this by itself, nothing changes.
"""

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qadapter.model import lora_linear
from qadapter.ops import cpp, layer_rows


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


def eps_of(norm: nn.Module) -> Any:
    """What a norm adds to the mean of squares."""
    own = vars(norm)
    return own["variance_epsilon"] if "variance_epsilon" in own else own["eps"]


def _fused_norm_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if len(args) == 1 and not kwargs:
        weight: Any = self._parameters["weight"]  # self.weight is a search
        if not weight.requires_grad and layer_rows.serves(args[0], weight):
            return layer_rows.rms_norm(args[0], weight, eps_of(self))
    return _norm_forward(self, *args, **kwargs)


def _gated_forward(self: Any, hidden: Tensor) -> Tensor:
    product = _recomputed(
        lambda gate, up: self.act_fn(gate) * up, self.gate_proj(hidden), self.up_proj(hidden)
    )
    return self.down_proj(product)


def _fused_gated_forward(self: nn.Module, hidden: Tensor) -> Tensor:
    modules: Any = self._modules
    layers = (modules["gate_proj"], modules["up_proj"], modules["down_proj"])
    if (output := lora_linear.gated(hidden, *layers)) is not None:
        return output
    gate, up = modules["gate_proj"](hidden), modules["up_proj"](hidden)
    if layer_rows.serves(gate, up) and type(up) is Tensor:
        product = layer_rows.silu_mul(gate, up)
    else:
        product = _recomputed(lambda gate, up: modules["act_fn"](gate) * up, gate, up)
    return modules["down_proj"](product)


def _is_frozen_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm") and not any(
        parameter.requires_grad for parameter in module.parameters()
    )


@torch.no_grad()
def _is_llama_norm(norm: nn.Module) -> bool:
    """Whether `layer_rows.rms_norm` gives what a norm does, in each dtype up to a rounding."""
    weight = norm._parameters.get("weight")
    if weight is None or weight.ndim != 1 or len(list(norm.parameters())) != 1:
        return False
    if weight.shape[0] < 2:  # may stand for any number of columns
        return False
    if cpp.why_not_loaded() is not None or not weight.is_cpu:
        return False
    generator = torch.Generator().manual_seed(0)
    try:
        trial: Any = copy.deepcopy(norm)
        eps = eps_of(norm)
        for dtype in (torch.float32, torch.bfloat16):
            trial.to(dtype)
            trial.weight.copy_(torch.randn(weight.shape, generator=generator))
            rows = torch.randn(1, 16, weight.shape[0], generator=generator)
            rows *= torch.tensor([eps**0.5, 1.0, 30.0, 1e-6]).repeat(4)[:, None]
            x = rows.to(dtype)
            own = type(trial).forward(trial, x)
            ours = layer_rows.rms_norm(x, trial.weight, eps)
            if own.dtype != dtype or own.shape != ours.shape:
                return False
            error = (own.float() - ours.float()).abs()
            units = 4 if dtype == torch.float32 else 1
            if (error > units * torch.finfo(dtype).eps * own.float().abs()).any():
                return False
            # Another order of roundings is within a unit, too, but in a third of the elements.
            if dtype == torch.bfloat16 and (error > 0).float().mean() > 0.01:
                return False
    except Exception:  # another signature, no eps: not one of those
        return False
    return True


def _is_silu(function: nn.Module) -> bool:
    if cpp.why_not_loaded() is not None:
        return False
    x = torch.linspace(-30, 30, 601)
    try:
        return torch.equal(function(x), nn.functional.silu(x))
    except Exception:  # parameters elsewhere, another signature
        return False


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
            fused = _is_llama_norm(module)
            module.forward = MethodType(_fused_norm_forward if fused else _norm_forward, module)
        elif _is_gated_mlp(module):
            fused = _is_silu(cast(nn.Module, module.act_fn))
            module.forward = MethodType(_fused_gated_forward if fused else _gated_forward, module)
        else:
            continue
        count += 1
    return count


def is_fused(module: nn.Module) -> bool:
    """Whether `recompute_cheap` has put the C++ kernels into a norm or a gated MLP."""
    own = getattr(vars(module).get("forward"), "__func__", None)
    return own is _fused_norm_forward or own is _fused_gated_forward
