"""The bare matrix products of a training step: what no fusion around them can save.

Of a token 7 products a layer with frozen weights, forward in each stream and backward to the
activations; of every sequence scores and their sum over the values, forward in each stream, and
backward the five products of attention that keeps no scores; of a response row three with the
head, two where the base is cached.

A LoRA's own six a layer, down to its rank and up again, forward once and backward to its input and
both of its matrices, are few FLOPs and many bytes: they are left out, or taken as products of the
layer's dtype, which no training in mixed precision has.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from qadapter import QAdapterModel

HEAD_ROWS = 256  # logits of so many rows at a time, as in the linear op: no [N, V] is allocated


def _linear_layers(model: QAdapterModel) -> Counter[tuple[int, int]]:
    """How often each [out, in] is among the trunk's frozen layers."""
    head = model.hf_model.get_output_embeddings()
    return Counter(
        (layer.weight.shape[0], layer.weight.shape[1])
        for name, layer in model.hf_model.named_modules()
        if isinstance(layer, nn.Linear) and layer is not head and "lora_" not in name
    )


def _lora_layers(model: QAdapterModel) -> Counter[tuple[int, int, int]]:
    """How often each [out, in] has a LoRA of rank r."""
    return Counter(
        (*layer.base_layer.weight.shape, next(iter(layer.lora_A.values())).weight.shape[0])
        for layer in model.hf_model.modules()
        if isinstance(layer, LoraLinear)
    )


def _attention(queries: int, keys: int, heads: int, dim: int, random: Callable[..., Tensor]) -> Any:
    """The products of one sequence in one layer: forward once, and backward."""
    q, grad, k, v = (random(heads, n, dim) for n in (queries, queries, keys, keys))
    p = random(heads, queries, keys)

    def forward() -> None:
        torch.bmm(q, k.transpose(1, 2))
        torch.bmm(p, v)

    def backward() -> None:
        torch.bmm(q, k.transpose(1, 2))  # scores again
        torch.bmm(p.transpose(1, 2), grad)
        torch.bmm(grad, v.transpose(1, 2))
        torch.bmm(p, k)
        torch.bmm(p.transpose(1, 2), q)

    return forward, backward


def products(
    model: QAdapterModel, packed: dict[str, Any], cached: bool, lora: bool = False
) -> Callable[[], None]:
    """A function that does them all, with numbers of no meaning; with ``lora`` the LoRA's too."""
    head = model.hf_model.get_output_embeddings().weight
    config = model.config.get_text_config()
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    random = partial(torch.randn, dtype=head.dtype, device=head.device)
    tokens = packed["input_ids"].numel()
    rows = packed.get("unique_rows", packed["rows"]).numel()
    streams = 1 if cached else 2

    shapes = _linear_layers(model)
    weights = {shape: random(*shape) for shape in shapes}
    inputs = {n: random(tokens, n) for n in {n for shape in shapes for n in shape}}
    loras = [
        (out, of, count, random(tokens, r), random(out, r), random(r, of))
        for (out, of, r), count in (_lora_layers(model) if lora else Counter()).items()
    ]
    lengths = (packed[f"cu_seq_lens_{of}"].tolist() for of in "qk")
    spans = zip(*([b - a for a, b in pairwise(ends)] for ends in lengths), strict=True)
    sequences = [_attention(q, k, heads, dim, random) for q, k in spans]
    hidden, share = random(min(rows, HEAD_ROWS), head.shape[1]), random(HEAD_ROWS, head.shape[0])

    def run() -> None:
        for (out, of), count in shapes.items():
            for _ in range(count):
                for _ in range(streams):
                    inputs[of] @ weights[out, of].t()
                inputs[out] @ weights[out, of]
        for out, of, count, low, b, a in loras:
            x, grad = inputs[of], inputs[out]
            for _ in range(count):
                x @ a.t(), low @ b.t()
                grad @ b, low @ a, low.t() @ x, grad.t() @ low
        for _ in range(layers):
            for forward, backward in sequences:
                for _ in range(streams):
                    forward()
                backward()
        for start in range(0, rows, HEAD_ROWS):
            n = min(HEAD_ROWS, rows - start)
            for _ in range(streams):
                torch.mm(hidden[:n], head.t(), out=share[:n])
            torch.mm(share[:n], head)

    return torch.inference_mode()(run)
