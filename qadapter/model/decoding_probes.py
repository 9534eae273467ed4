"""What a model's code does beyond a plain causal transformer, tried on random tokens.

Nothing here goes by the name of a class. Each function runs the base stream on a few tokens in two
ways that must agree, and returns None, or what is different.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from qadapter.model.growing_cache import grow_in_place
from qadapter.model.quantised import mixes_rows
from qadapter.model.sharded import vocab_rows
from qadapter.model.streams import Streams, evaluating

LONG = 64  # tokens; what attention windows of more do with a cache is not tried


def _is_exact(model: PreTrainedModel) -> bool:
    """Whether the same tokens give the same but for the rounding of float32."""
    return model.dtype in (torch.float32, torch.float64) and not mixes_rows(model)


def _differs(got: Tensor, want: Tensor, model: PreTrainedModel) -> str | None:
    """By how much of the hidden states' size [B, T, D] a token differs, where it is too much."""
    apart = (got.float() - want.float()).norm(dim=-1)
    size = (apart / want.float().norm(dim=-1).clamp(min=1e-30)).flatten()
    if not torch.isfinite(size).all():
        return "they are not finite"
    # In 16 bits rounding alone may choose another expert for a single token: most of them count.
    exact = _is_exact(model)
    change = (size.max() if exact else size.median()).item()
    return None if change <= (1e-3 if exact else 0.05) else f"by {change:.2g}"


def _tokens(model: PreTrainedModel, rows: int, count: int) -> Tensor:
    vocab = vocab_rows(model)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab, (rows, count), generator=generator).to(model.device)


@torch.no_grad()
def sees_later_tokens(model: PreTrainedModel) -> str | None:
    """A text alone, and the same tokens with others behind them."""
    ids = _tokens(model, 1, 9)
    with evaluating(model):
        pair = [model(input_ids=text, use_cache=False).logits[:, :4] for text in (ids[:, :4], ids)]
    # Of tokens that the model masks nothing is compared.
    one, other = (logits.float().masked_fill(logits.isinf(), 0.0) for logits in pair)
    change = ((one - other).norm() / other.norm().clamp(min=1e-30)).item()
    if change <= (1e-4 if _is_exact(model) else 0.03):
        return None
    return f"what it makes of a token changes with the tokens behind it, by {change:.2g}"


class _Base:
    """The base stream of ``streams``, as decoding runs it."""

    def __init__(self, streams: Streams) -> None:
        self.streams = streams
        self.model: Any = streams.hf_model

    @contextmanager
    def running(self) -> Iterator[None]:
        with evaluating(self.streams.peft_model), self.streams.only(None), torch.no_grad():
            yield

    def new_cache(self) -> Any:
        """As transformers' generate prepares it."""
        if self.streams.cache_name is None or not self.model._supports_default_dynamic_cache():
            return None
        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        grow_in_place(cache)
        return cache

    def hidden(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        base_model: Any = self.model.base_model
        return base_model(**self.streams.arguments(ids, mask, positions, cache))[0]

    def stepwise(self, ids: Tensor, mask: Tensor | None, between: Tensor | None) -> Tensor | None:
        """The hidden states of ``ids``, the last two tokens in steps of their own, and another text
        ``between``; None where transformers prepares no cache."""
        cache = self.new_cache()
        if cache is None:
            return None
        positions = _positions(ids, mask)
        parts, start = [], 0
        for stop in (ids.shape[1] - 2, ids.shape[1] - 1, ids.shape[1]):
            now = slice(start, stop)
            seen = None if mask is None else mask[:, :stop]
            parts.append(self.hidden(ids[:, now], seen, positions[:, now], cache))
            if between is not None:
                self.hidden(between)
            start = stop
        return torch.cat(parts, 1)


def _positions(ids: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
    return (mask.cumsum(-1) - 1).clamp(min=0)


def takes_positions(streams: Streams) -> bool:
    """Whether positions that are handed over are those that a text has without them; RoBERTa
    counts from the padding token's id."""
    if not streams.takes_positions:
        return False
    base = _Base(streams)
    ids = _tokens(base.model, 1, 5)
    with base.running():
        given = base.hidden(ids, positions=_positions(ids, None))
        return _differs(given, base.hidden(ids), base.model) is None


def why_no_cache(streams: Streams) -> str | None:
    """A text in steps with a cache, another text between them, against the whole text."""
    base = _Base(streams)
    config = base.model.config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None) or getattr(
        config, "attention_chunk_size", None
    )
    count = window + 3 if isinstance(window, int) and window <= LONG else 5
    ids, other = _tokens(base.model, 2, count).split(1)
    with base.running():
        whole = base.hidden(ids)
        try:
            parts = base.stepwise(ids, None, other)
        except Exception as error:  # whatever a model's own code makes of it
            return f"a forward with a cache fails ({type(error).__name__}: {error})"
    if parts is None or (change := _differs(parts[:, -2:], whole[:, -2:], base.model)) is None:
        return None
    return f"a cache does not hold all that it keeps of a text (hidden states differ {change})"


def why_no_padding(streams: Streams, cached: bool) -> str | None:
    """A row padded on the left in a batch, and the same row alone."""
    base = _Base(streams)
    ids = _tokens(base.model, 2, 6)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    with base.running():
        alone = base.hidden(ids[1:, 2:])
        try:
            padded = base.stepwise(ids, mask, None) if cached else None
            if padded is None:
                padded = base.hidden(ids, mask, _positions(ids, mask))
        except Exception as error:  # whatever a model's own code makes of it
            return f"a forward with padding fails ({type(error).__name__}: {error})"
    for part in (slice(0, 2), slice(2, 4)):
        change = _differs(padded[1:, 2:][:, part], alone[:, part], base.model)
        if change is not None:
            return f"hidden states of a padded row differ from those of the row alone {change}"
    return None


class Needs:
    """What decoding from a base needs, tried once.

    Attributes:
        takes_positions, uncached: as `Streams` has them.
    """

    def __init__(self, streams: Streams) -> None:
        streams.takes_positions = self.takes_positions = takes_positions(streams)
        self.uncached = why_no_cache(streams)
        self._padding: dict[bool, str | None] = {}

    def padding(self, streams: Streams, cached: bool) -> str | None:
        """Why rows that are padded on the left cannot be decoded, with or without a cache."""
        if cached not in self._padding:
            self._padding[cached] = why_no_padding(streams, cached)
        return self._padding[cached]
