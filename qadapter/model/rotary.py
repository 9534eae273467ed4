"""Rotary position embedding in one pass on the CPU, in place of four products and two joins.

Attention modules of transformers call `apply_rotary_pos_emb` of their own file. A module's forward
is given the same code with another function under that name: only that module changes, and only
where the two were tried and gave the same bits.
"""

import functools
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from qadapter.ops import cpp, layer_rows

_NAME = "apply_rotary_pos_emb"
Rotary = Callable[..., tuple[Tensor, Tensor]]


def _by_kernel(original: Rotary) -> Rotary:
    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not args and not kwargs and _serves(q, k, cos, sin):
            return layer_rows.rotary(q, cos, sin), layer_rows.rotary(k, cos, sin)
        return original(q, k, cos, sin, *args, **kwargs)

    return apply


def _serves(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    return (
        layer_rows.serves(q, cos)
        and layer_rows.serves(k, sin)
        and q.ndim == k.ndim == 4
        and q.numel() > 0
        and q.shape[-1] % 2 == 0
        and cos.shape == sin.shape == (cos.shape[0], q.shape[2], q.shape[3])
        and cos.shape[0] in (1, q.shape[0])
        and cos.stride(-1) == sin.stride(-1) == 1
        and k.shape[0] == q.shape[0]
        and k.shape[2:] == q.shape[2:]
        and not cos.requires_grad
        and not sin.requires_grad
    )


@torch.no_grad()
def _same(original: Rotary) -> bool:
    """Whether a model's own function is the usual one, on random heads and angles."""
    generator = torch.Generator().manual_seed(0)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            q, k = (torch.randn(2, h, 5, 12, generator=generator).to(dtype) for h in (4, 2))
            cos, sin = (torch.randn(2, 5, 12, generator=generator).to(dtype) for _ in range(2))
            for own, ours in zip(original(q, k, cos, sin), (q, k), strict=True):
                if not torch.equal(own, layer_rows.rotary(ours, cos, sin)):
                    return False
    except Exception:  # another signature, other shapes: not the usual one
        return False
    return True


def fuse_rotary(model: nn.Module) -> int:
    """Change the attention modules of ``model`` in place; how many."""
    if cpp.why_not_loaded() is not None:
        return 0
    made: dict[Any, Callable[..., Any] | None] = {}  # by the class's forward
    count = 0
    for module in model.modules():
        forward = type(module).forward
        names = getattr(getattr(forward, "__code__", None), "co_names", ())
        if _NAME not in names or "forward" in vars(module):
            continue
        if forward not in made:
            made[forward] = _with_kernel(forward)
        if (function := made[forward]) is not None:
            module.forward = MethodType(function, module)
            count += 1
    return count


def _with_kernel(forward: Any) -> Callable[..., Any] | None:
    """The same code, with the kernel's function in its globals; None where it would differ."""
    original = forward.__globals__.get(_NAME)
    if not callable(original) or not _same(original):
        return None
    seen = {**forward.__globals__, _NAME: _by_kernel(original)}
    made = FunctionType(
        forward.__code__, seen, forward.__name__, forward.__defaults__, forward.__closure__
    )
    made.__kwdefaults__ = forward.__kwdefaults__

    @functools.wraps(forward)
    def chosen(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # torch.compile looks a function's globals up in its module.
        function = forward if torch.compiler.is_compiling() else made
        return function(self, *args, **kwargs)

    chosen.has_kernel = True  # type: ignore[attr-defined]
    return chosen


def is_fused(module: nn.Module) -> bool:
    """Whether `fuse_rotary` has put the C++ kernel into an attention module."""
    own = getattr(vars(module).get("forward"), "__func__", None)
    return getattr(own, "has_kernel", False)
