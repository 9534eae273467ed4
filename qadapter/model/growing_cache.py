"""A cache that new tokens are written into.

The usual one of transformers joins old and new keys and values at every token: a copy of all that
it holds. With 8 prompts of SmolLM2 in two streams that was a quarter of a step after 200 tokens,
and it grows with the text.
"""

import dataclasses
import functools
import math
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from qadapter.model import large_pages

_SPARE = 64  # tokens for which there is room at least
_MANY, _ENOUGH = 128, 1 << 28  # tensors, or bytes, that share large pages


class Rooms:
    """Where the tensors of a cache's layers lie: in large pages where there are such, many in one.

    A step reads all of them, and a layer's own are too small for a large page. All layers grow in
    the same step, so that the memory behind the old ones goes with them.
    """

    def __init__(self) -> None:
        self._memory: large_pages.Memory | None = None
        self._large = large_pages.wanted()  # reads a file of the system

    def __reduce__(self) -> Any:  # a copied cache has its own
        return type(self), ()

    def empty(self, sizes: tuple[int, ...], like: Tensor) -> Tensor:
        if like.device.type != "cpu" or not self._large:
            return like.new_empty(sizes)
        piece = self._memory.piece(sizes, like.dtype) if self._memory is not None else None
        if piece is None:
            size = large_pages.rounded(math.prod(sizes) * like.element_size())
            # Memory that nobody writes to is none.
            self._memory = large_pages.Memory(size * max(1, min(_MANY, _ENOUGH // max(1, size))))
            piece = self._memory.piece(sizes, like.dtype)
        return piece if piece is not None else like.new_empty(sizes)


@dataclasses.dataclass(eq=False)
class _Room:
    """A tensor that tokens are written into, and the beginning of it that was given out last."""

    tensor: Tensor
    given: Tensor | None = None
    length: int = 0  # of `given`, in tokens


class GrowingLayer(DynamicLayer):
    """A DynamicLayer whose keys and values are the beginning of a larger tensor."""

    def __init__(self, *args: Any, rooms: Rooms | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._where = rooms or Rooms()
        self._rooms: list[_Room | None] = [None, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._appended(0, self.keys, key_states)
        self.values = self._appended(1, self.values, value_states)
        return self.keys, self.values

    def one_more(self) -> tuple[Tensor, Tensor]:
        """Keys and values with one token more, whose place holds anything: the caller writes it.
        The cache holds tokens already."""
        keys, values = cast(Tensor, self.keys), cast(Tensor, self.values)
        self.keys = self._with_room(0, keys, keys, 1)
        self.values = self._with_room(1, values, values, 1)
        return self.keys, self.values

    def _appended(self, which: int, held: Tensor | None, new: Tensor) -> Tensor:
        seen = self._with_room(which, held, new, new.shape[-2])
        seen[..., seen.shape[-2] - new.shape[-2] :, :] = new
        return seen

    def _with_room(self, which: int, held: Tensor | None, like: Tensor, more: int) -> Tensor:
        """``held``, and ``more`` tokens behind it that hold anything."""
        room = self._rooms[which]
        if room is not None and held is room.given:
            length = room.length
        else:
            # Whoever changes the rows or cuts the text puts another tensor in the place of `held`.
            length = held.shape[-2] if held is not None and held.numel() else 0
            if room is not None and length and not _begins(room.tensor, held):
                room = None
        total = length + more
        if room is None or room.tensor.shape[-2] < total:
            sizes = (*like.shape[:-2], total + max(_SPARE, total // 4), like.shape[-1])
            self._rooms[which] = room = _Room(self._where.empty(sizes, like))
            if held is not None and length:
                room.tensor[..., :length, :] = held
        room.given, room.length = room.tensor.narrow(-2, 0, total), total
        return room.given

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._rooms = [None, None]


def _begins(room: Tensor, held: Tensor | None) -> bool:
    return (
        held is not None
        and held.data_ptr() == room.data_ptr()
        and held.stride() == room.stride()
        and held.shape[:-2] == room.shape[:-2]
    )


def grow_in_place(cache: Any) -> None:
    """Let the plain layers of a transformers cache that holds nothing yet grow in place."""
    layers, rooms = getattr(cache, "layers", []), Rooms()
    for i, layer in enumerate(layers):
        if type(layer) is DynamicLayer and not layer.is_initialized:
            layers[i] = GrowingLayer(rooms=rooms)
    if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
        cache.layer_class_to_replicate = functools.partial(GrowingLayer, rooms=rooms)
