"""A whole decoder layer for one new token a row: on the CPU, by csrc/cpu/decoder_layer.cpp.

No operation of torch.ops.qadapter: it is what the few-row products, the norms, the rotation and
LoRA's updates are in one call, and has no gradient. `qadapter.model.whole_layers` says which layers
it stands for.
"""

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from qadapter.ops import cpp

PRODUCTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""In the order in which `decoder_layer` takes their weights."""


@functools.cache
def _operation() -> tuple[Any, int]:
    return cpp.extension().decoder_layer.default, cpp.isa()


def decoder_layer(
    hidden: Tensor,
    angles: tuple[Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    norms: Sequence[Tensor],
    eps: Sequence[float],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    lora: Sequence[Tensor],
    places: Sequence[int],
    scalings: Sequence[float],
    streams: int,
    scaling: float,
) -> Tensor:
    """What a Llama-like layer makes of one token a row, adapters included; without gradients.

    Rounded where `layer_rows`, `few_rows.rows_linear` and `low_rank.lora_add_` round, so equal to a
    layer of these bit for bit but for attention, which is float32 throughout and rounded once.
    QADAPTER_CPU_CAPABILITY is read at the first call.

    Args:
        hidden: [rows, 1, D] float32 or bfloat16 on the CPU, contiguous; all else is of its dtype
            where nothing is said.
        angles: cos and sin, [1 or rows, 1, head size].
        keys, values: [rows, key heads, tokens, head size], dense in the last dimension. The last
            token's are written here.
        mask: bool [1 or rows, 1, 1, tokens], False for keys that are not seen; None for none.
        norms, eps: Of attention's norm and of the MLP's: weights [D], and what is added to the mean
            of squares.
        weights, biases: Of `PRODUCTS`, [O, K] and [O]; a bias without elements stands for none.
        lora: A [r, K] and B [O, r] of each adapter and product, in turn; float32 or bfloat16.
        places: The product, as a place in `PRODUCTS`, and the stream of each of these.
        scalings: The factor of each.
        streams: How many streams the rows are, block by block.
        scaling: The factor of attention's scores.

    Returns:
        [rows, 1, D], contiguous.

    Raises:
        RuntimeError: A dtype, device or shape that does not fit; the extension cannot be loaded.
    """
    operation, isa = _operation()
    return operation(
        hidden,
        *angles,
        keys,
        values,
        mask,
        norms,
        eps,
        weights,
        biases,
        lora,
        places,
        scalings,
        streams,
        scaling,
        isa,
    )
