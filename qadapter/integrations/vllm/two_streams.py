"""A model of vLLM's made to run the base and every adapter in one forward.

    layers below the first adapted one    T rows, as ever
    from there on                         streams * T rows: the base's, then each adapter's

All rows share the products with the base's weights; an adapter's LoRA is added to its rows. A
layer's attention runs once a stream, each on a KV cache of its own. Rotary embeddings, norms and
gates see more rows and know no streams. vLLM's modules are left as they are: hooks widen the rows
and add the LoRAs, and `StreamAttention` takes the place of a layer's attention.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    QKVParallelLinear,
    RowParallelLinear,
)

from qadapter.model.lora_files import SavedLayer, SavedLora


def widen(model: Any, loras: Sequence[SavedLora], vllm_config: Any) -> None:
    """Give a freshly made model of vLLM's a stream for each LoRA, before its weights are loaded.

    Args:
        model: a causal LM whose ``model.layers`` are called with positions [T], hidden states and
            residual [T, D].
        loras: one for each adapter.
        vllm_config: of the engine.

    Raises:
        ValueError: a LoRA on what is no linear layer of the trunk, or an attention of another kind.
    """
    count = 1 + len(loras)
    layers = model.model.layers
    targets: dict[str, _Target] = {}
    for stream, lora in enumerate(loras, start=1):
        for path, layer in lora.layers.items():
            where, part = _locate(model, path, lora.folder)
            target = targets.setdefault(where, _Target(model.get_submodule(where), {}))
            target.parts.setdefault(stream, {})[part] = layer
    for module, parts in targets.values():
        _add_lora(module, StreamLoRA(module, count, parts))
    first = min(int(where.split(".")[2]) for where in targets)
    for layer in layers[first:]:
        layer.register_forward_pre_hook(_for_streams(count, widens=layer is layers[first]))
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, Attention):
                    setattr(parent, name, StreamAttention(child, count, vllm_config))


class _Target(NamedTuple):
    """A linear layer, and what each stream adds to each of the products that lie side by side."""

    module: nn.Module
    parts: dict[int, dict[int, SavedLayer]]


def _locate(model: Any, path: str, folder: str) -> tuple[str, int]:
    """Where a layer of the base is in vLLM's model, which packs some of them into one product, and
    which part of that product it is."""
    where, part = path, 0
    parent, _, name = path.rpartition(".")
    for packed, names in model.packed_modules_mapping.items():
        if name in names:
            where, part = f"{parent}.{packed}", names.index(name)
    try:
        module: Any = model.get_submodule(where)
    except AttributeError:
        module = None
    if not where.startswith("model.layers.") or not isinstance(module, LinearBase):
        raise ValueError(
            f"{folder}: a LoRA on {path} is not served, only on linear layers of the decoder's "
            "layers: the head and the embedding are shared by all streams"
        )
    return where, part


# Rows.


def _by_stream(x: Tensor, count: int) -> tuple[Tensor, ...]:
    """[streams * T, ...] as a view [T, ...] for each stream."""
    return x.unflatten(0, (count, -1)).unbind()


def _for_streams(count: int, widens: bool) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
    """The hook before a layer: positions of all streams and, before the first, their rows."""

    def hook(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        positions, hidden, residual, *rest = args
        if widens:
            hidden = hidden.repeat(count, 1)
            residual = None if residual is None else residual.repeat(count, 1)
        return (positions.repeat(count), hidden, residual, *rest)

    return hook


# LoRA.


class _Share(NamedTuple):
    """Of one part of a product, by the names of its buffers: B, its bias, what it reads of all A x
    and where it adds."""

    b: str
    bias: str | None
    ranks: slice
    columns: slice


class StreamLoRA(nn.Module):
    """What the streams add to a linear layer: scale * (B A x + bias), for each of the products that
    the layer holds side by side. On this rank's share of the layer, where there are several."""

    def __init__(
        self, linear: Any, count: int, parts: Mapping[int, Mapping[int, SavedLayer]]
    ) -> None:
        super().__init__()
        self.count = count
        # A sum over the inputs, of which each rank has some.
        self.reduces = isinstance(linear, RowParallelLinear) and linear.tp_size > 1
        if self.reduces and not linear.reduce_results:
            raise ValueError("tensor parallelism: a layer leaves the sum over ranks to others")
        self.shares: dict[int, list[_Share]] = {}
        for stream, of_stream in parts.items():
            a = torch.cat([layer.a for layer in of_stream.values()])
            self._keep(f"a_{stream}", _inputs(linear, a))
            begin, shares = 0, []
            for part, layer in of_stream.items():
                end, scale = begin + layer.a.shape[0], float(layer.scale)
                b, bias = f"b_{stream}_{part}", None
                self._keep(b, _outputs(linear, part, layer.b.float() * scale))
                if layer.bias is not None:
                    bias = f"bias_{stream}_{part}"
                    self._keep(bias, _outputs(linear, part, layer.bias.float() * scale))
                shares.append(_Share(b, bias, slice(begin, end), _columns(linear, part)))
                begin = end
            self.shares[stream] = shares

    def _keep(self, name: str, value: Tensor) -> None:
        """On the device and in the dtype in which vLLM makes the model."""
        buffer = torch.empty(value.shape, dtype=torch.get_default_dtype())
        self.register_buffer(name, buffer.copy_(value), persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> None:
        """Adds to y [streams * T, out], of x [streams * T, in]."""
        rows = x.shape[0] // self.count
        for stream, shares in self.shares.items():
            own = slice(stream * rows, (stream + 1) * rows)
            reduced = F.linear(x[own], getattr(self, f"a_{stream}"))
            if self.reduces:
                reduced = tensor_model_parallel_all_reduce(reduced)
            for b, bias, ranks, columns in shares:
                addend = None if bias is None else getattr(self, bias)
                y[own, columns].add_(F.linear(reduced[:, ranks], getattr(self, b), addend))


def _inputs(linear: Any, a: Tensor) -> Tensor:
    if not isinstance(linear, RowParallelLinear):
        return a
    size = linear.input_size_per_partition
    return a.narrow(1, linear.tp_rank * size, size)


def _outputs(linear: Any, part: int, b: Tensor) -> Tensor:
    if not isinstance(linear, ColumnParallelLinear):
        return b
    size, rank = linear.output_partition_sizes[part], linear.tp_rank
    if isinstance(linear, QKVParallelLinear) and part > 0:
        rank //= linear.num_kv_head_replicas
    return b.narrow(0, rank * size, size)


def _columns(linear: Any, part: int) -> slice:
    if not isinstance(linear, ColumnParallelLinear):
        return slice(None)
    sizes = linear.output_partition_sizes
    return slice(sum(sizes[:part]), sum(sizes[: part + 1]))


def _add_lora(linear: Any, lora: StreamLoRA) -> None:
    def hook(module: nn.Module, args: tuple[Tensor], output: Any) -> None:
        lora(args[0], output[0] if isinstance(output, tuple) else output)

    linear.add_module("stream_lora", lora)  # follows the layer to another device
    linear.register_forward_hook(hook)
    linear.requires_unquantized_input = True  # the LoRA reads what the base reads


# Attention.


class StreamAttention(nn.Module):
    """A layer's attention, once a stream: the base's own and one like it for each adapter."""

    def __init__(self, attention: Attention, count: int, vllm_config: Any) -> None:
        super().__init__()
        if type(attention) is not Attention:
            raise ValueError(f"{attention.layer_name}: {type(attention).__name__} is not served")
        # No integer of its own between dots: vLLM reads the layer's number off the name.
        names = [f"{attention.layer_name}_stream{i}" for i in range(1, count)]
        twins = [_twin(attention, name, vllm_config) for name in names]
        self.streams = nn.ModuleList([attention, *twins])

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = (_by_stream(x, len(self.streams)) for x in (query, key, value))
        rows = zip(*parts, strict=True)
        return torch.cat([own(*qkv) for own, qkv in zip(self.streams, rows, strict=True)])


def _twin(attention: Any, name: str, vllm_config: Any) -> Attention:
    config = vllm_config.model_config.hf_config
    return Attention(
        attention.num_heads,
        attention.head_size,
        attention.impl.scale,
        num_kv_heads=attention.num_kv_heads,
        cache_config=vllm_config.cache_config,
        quant_config=attention.quant_config,
        logits_soft_cap=getattr(config, "attn_logit_softcapping", None),
        per_layer_sliding_window=attention.sliding_window,
        prefix=name,
    )
