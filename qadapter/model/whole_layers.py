"""Decoder layers that `qadapter.ops.decoder_layer` can stand for, in a decode step on the CPU.

A layer is taken where its parts are those that `recompute` and `rotary` have recognised (norms as
Llama's, a gate of silu, the usual rotation) around plain linear layers with or without LoRA, and
where a trial on random tokens gives what the layer's own modules give. Its weights are looked up
once a text (`refresh`): they lie in some twenty objects, and a step has pushed all of them out of
the inner caches. What it does not know (several tokens, hooks, another cache, another kind of mask)
is left to the modules.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from transformers import DynamicCache

from qadapter.composition import Names
from qadapter.model import recompute, rotary
from qadapter.model.checkpoint import is_ordinary
from qadapter.model.growing_cache import GrowingLayer, grow_in_place
from qadapter.ops.decoder_layer import PRODUCTS, decoder_layer

MOST_ROWS = 64  # with more, what lies between the products no longer counts
_NORMS = ("input_layernorm", "post_attention_layernorm")
_PARTS = {*_NORMS, "self_attn", "mlp"}
_ADAPTER_DTYPES = (torch.float32, torch.bfloat16)
Forward = tuple[nn.Module, Callable[..., Any]]


@contextmanager
def replaced(forwards: Sequence[Forward]) -> Iterator[None]:
    """Inside, these modules have these forwards."""
    before = [module.__dict__.get("forward") for module, _ in forwards]
    try:
        for module, forward in forwards:
            # On the instance, where it hides the class's; nn.Module's setattr is slow.
            module.__dict__["forward"] = forward
        yield
    finally:
        for (module, _), was in zip(forwards, before, strict=True):
            module.__dict__.pop("forward", None)
            if was is not None:
                module.__dict__["forward"] = was


class WholeLayer:
    """One layer of the usual parts, see `candidates`."""

    def __init__(self, layer: nn.Module, names: Names) -> None:
        self.layer = layer
        parts: dict[str, Any] = dict(layer._modules)
        self.attention = parts["self_attn"]
        products = {**self.attention._modules, **parts["mlp"]._modules}
        self._norms = [parts[name] for name in _NORMS]
        self._linears: list[Any] = []
        self._loras: list[tuple[Any, ...]] = []  # A and B by adapter, factors, adapter
        self._places: list[int] = []
        for place, name in enumerate(PRODUCTS):
            module: Any = products[name]
            if isinstance(module, LoraLinear):
                for stream, adapter in enumerate(names):
                    if adapter and adapter in module.lora_A:
                        by_name = module.lora_A._modules, module.lora_B._modules
                        self._loras.append((*by_name, module.scaling, adapter))
                        self._places += [place, stream]
                module = module.base_layer
            self._linears.append(module)
        self._streams = len(names) if self._loras else 1
        fused = [self.attention, parts["mlp"], *self._norms]
        self._forwards = [(vars(module), vars(module)["forward"]) for module in fused]
        seen = {*fused, *(products[name] for name in PRODUCTS), *self._linears}
        self._hooks = [h for m in seen for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._none = torch.empty(0)
        self._found: tuple[torch.dtype, dict[str, Any]] | None = None  # see `_look_up`

    def refresh(self) -> None:
        """Look up weights, adapters and hooks anew at the next call."""
        self._found = None

    def __call__(
        self,
        hidden: Tensor,
        rows: int,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,  # their angles are in position_embeddings
        past_key_values: Any = None,
        use_cache: bool | None = None,
        position_embeddings: Any = None,
        **others: Any,
    ) -> Tensor | None:
        """The layer's output [rows, 1, D]; None, and nothing done, where this is not to be had.

        ``rows`` are those of all streams together.
        """
        attention = self.attention
        layers = getattr(past_key_values, "layers", ())
        cache = layers[attention.layer_idx] if attention.layer_idx < len(layers) else None
        if (
            type(cache) is not GrowingLayer
            or not cache.is_initialized
            or position_embeddings is None
        ):
            return None
        found = self._found = self._found or self._look_up()
        if found is None or found[0] is not hidden.dtype:
            return None
        count, keys, cos = len(hidden), cache.keys, position_embeddings[0]
        if (
            (self._loras and count != rows)
            or hidden.shape[1] != 1
            or not hidden.is_contiguous()
            or type(keys) is not Tensor
            or keys.ndim != 4
            or keys.shape[0] != count
            or keys.shape[2] == 0
            or keys.dtype is not hidden.dtype
            or cos.dtype is not hidden.dtype
            or cos.ndim != 3
            or cos.shape[-1] != keys.shape[-1]
            or any(value is not None for value in others.values())
        ):
            return None
        if attention_mask is not None and (
            attention_mask.dtype is not torch.bool
            or attention_mask.ndim != 4
            or attention_mask.shape[0] not in (1, count)
            or attention_mask.shape[1:] != (1, 1, keys.shape[2] + 1)
        ):
            return None
        return decoder_layer(
            hidden,
            position_embeddings,
            *cache.one_more(),
            attention_mask,
            **found[1],
        )

    def _look_up(self) -> tuple[torch.dtype, dict[str, Any]] | None:
        """The dtype, and what `decoder_layer` takes that is the layer's; None where the modules are
        not as they should be."""
        weights = [module._parameters["weight"] for module in self._linears]
        norms = [module._parameters["weight"] for module in self._norms]
        dtype = weights[0].dtype
        if (
            any(w.dtype is not dtype for w in (*weights, *norms))
            or self.attention.training
            or any(self._hooks)
            or nn_module._has_any_global_hook()
            or any(own.get("forward") is not forward for own, forward in self._forwards)
        ):
            return None
        lora, scalings = [], []
        for a_by_name, b_by_name, factors, name in self._loras:
            a, b = a_by_name[name]._parameters["weight"], b_by_name[name]._parameters
            if a.dtype not in _ADAPTER_DTYPES or b["weight"].dtype is not a.dtype:
                return None
            if b["bias"] is not None:
                return None
            lora += [a, b["weight"]]
            scalings.append(factors[name])
        biases = [module._parameters["bias"] for module in self._linears]
        return dtype, {
            "norms": norms,
            "eps": [recompute.eps_of(module) for module in self._norms],
            "weights": weights,
            "biases": [self._none if bias is None else bias for bias in biases],
            "lora": lora,
            "places": self._places,
            "scalings": scalings,
            "streams": self._streams,
            "scaling": self.attention.scaling,
        }

    def instead(self, rows: Callable[[], int], parts: Sequence[Forward]) -> Callable[..., Any]:
        """A forward in place of the layer's own, which has its modules' ``parts`` then. ``rows()``
        are those of all streams in a step of one token each, 0 where it is no such step."""
        own: Callable[..., Any] = self.layer.forward

        @functools.wraps(own)  # its signature is asked for
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not args and (count := rows()):
                made = self(hidden_states, count, **kwargs)
                if made is not None:
                    return made
            with replaced(parts):
                return own(hidden_states, *args, **kwargs)

        return forward


def _has_usual_parts(layer: nn.Module) -> bool:
    parts = layer._modules
    if parts.keys() != _PARTS or "forward" in vars(layer):
        return False
    attention, mlp = cast(nn.Module, parts["self_attn"]), cast(nn.Module, parts["mlp"])
    if attention._modules.keys() != set(PRODUCTS[:4]):
        return False
    if mlp._modules.keys() != {*PRODUCTS[4:], "act_fn"}:
        return False
    for name in PRODUCTS:
        linear: Any = (attention if name in PRODUCTS[:4] else mlp)._modules[name]
        if isinstance(linear, LoraLinear):
            linear = linear.base_layer
        if type(linear) is not nn.Linear or "forward" in vars(linear):
            return False
        if not is_ordinary(linear.weight):
            return False
    norms = all(recompute.is_fused(cast(nn.Module, parts[name])) for name in _NORMS)
    return norms and recompute.is_fused(mlp) and rotary.is_fused(attention)


def candidates(layers: Sequence[nn.Module], names: Names) -> list[WholeLayer]:
    """Those of ``layers`` that have the usual parts, for the streams ``names``."""
    return [WholeLayer(layer, names) for layer in layers if _has_usual_parts(layer)]


@torch.no_grad()
def is_exact(whole: WholeLayer, rows: int) -> bool:
    """Whether it gives what the layer's own modules do, which work on ``rows`` rows of all streams
    meanwhile."""
    attention = whole.attention
    try:
        weight = attention._modules["k_proj"]
        weight = getattr(weight, "base_layer", weight).weight
        dim, generator = attention.head_dim, torch.Generator().manual_seed(0)

        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(weight)

        hidden, angles = random(rows, 1, weight.shape[1]), (random(rows, 1, dim), random(1, 1, dim))
        angles = angles[0], angles[1].expand(rows, -1, -1)
        old = [random(rows, len(weight) // dim, 3, dim) for _ in range(2)]
        mask = torch.ones(rows, 1, 1, 4, dtype=torch.bool)
        mask[-1, ..., :2] = False
        results = []
        for function in (whole.layer.forward, lambda x, **given: whole(x, rows, **given)):
            cache = DynamicCache()
            grow_in_place(cache)
            cache.update(old[0], old[1], attention.layer_idx)
            made: Any = function(
                hidden,
                attention_mask=mask,
                position_ids=torch.full((rows, 1), 3),
                past_key_values=cache,
                use_cache=True,
                position_embeddings=angles,
            )
            kept = cast(Any, cache.layers[attention.layer_idx])
            results.append((made - hidden, kept.keys, kept.values))
    except Exception:  # another signature, other sizes: not one of those
        return False
    allowed = 1e-4 if hidden.dtype == torch.float32 else 0.03
    for mine, theirs in zip(*results, strict=True):
        if mine.shape != theirs.shape or not (mine - theirs).norm() <= allowed * mine.norm():
            return False
    return True
