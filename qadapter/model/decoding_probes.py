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

from qadapter.model.streams import Streams, evaluating


def _size(got: Tensor, want: Tensor) -> float:
    """The difference [B, T, D] of most tokens, of the hidden states' size. The median, because an
    expert that is all but tied may change in a single token by rounding alone."""
    apart = (got.float() - want.float()).norm(dim=-1)
    size = (apart / want.float().norm(dim=-1).clamp(min=1e-30)).flatten()
    return size.median().item() if torch.isfinite(size).all() else float("inf")


def _allowed(model: PreTrainedModel) -> float:
    return 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1


def _tokens(model: PreTrainedModel, rows: int, count: int) -> Tensor:
    embedding: Any = model.get_input_embeddings()
    vocab = embedding.weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab, (rows, count), generator=generator).to(model.device)


@torch.no_grad()
def sees_later_tokens(model: PreTrainedModel) -> str | None:
    """Two texts that differ in their last token, and what comes before it."""
    ids = _tokens(model, 1, 5)
    ids = torch.cat([ids[:, :4], ids[:, [0, 1, 2, 4]]])
    base_model: Any = model.base_model
    with evaluating(model):
        one, other = base_model(input_ids=ids, use_cache=False)[0][:, :3].float()
    change = ((one - other).norm() / other.norm().clamp(min=1e-30)).item()
    if change <= (1e-4 if model.dtype in (torch.float32, torch.float64) else 0.03):
        return None
    return f"what it makes of a token changes with the tokens behind it, by {change:.2g}"


class _Base:
    """The base stream of ``streams``, step by step."""

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
        return DynamicCache(config=self.model.config.get_text_config(decoder=True))

    def hidden(self, ids: Tensor, mask: Tensor | None = None, cache: Any = None) -> Tensor:
        positions = _positions(mask, ids)
        base_model: Any = self.model.base_model
        return base_model(**self.streams.arguments(ids, mask, positions, cache))[0]


def _positions(mask: Tensor | None, ids: Tensor) -> Tensor:
    """Of the last tokens of a text that ``mask`` is as long as."""
    if mask is None:
        return torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
    return (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]


def why_no_cache(streams: Streams) -> str | None:
    """A text in two parts with a cache, and another text between them."""
    base = _Base(streams)
    ids, other = _tokens(base.model, 2, 5).split(1)
    with base.running():
        whole = base.hidden(ids)[:, 3:]
        try:
            cache = base.new_cache()
            if cache is None:
                return None
            base.hidden(ids[:, :3], torch.ones_like(ids[:, :3]), cache)
            base.hidden(other)
            parts = [
                base.hidden(ids[:, i : i + 1], torch.ones_like(ids[:, : i + 1]), cache)
                for i in (3, 4)
            ]
        except Exception as error:  # whatever a model's own code makes of it
            return f"a forward with a cache fails ({type(error).__name__}: {error})"
    change = _size(torch.cat(parts, 1), whole)
    if change <= _allowed(base.model):
        return None
    return (
        f"a cache does not hold all that is kept of a text (hidden states change by {change:.2g})"
    )


def why_no_padding(streams: Streams, cached: bool) -> str | None:
    """A row padded on the left in a batch, and the same row alone."""
    base = _Base(streams)
    ids = _tokens(base.model, 2, 6)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    with base.running():
        alone = base.hidden(ids[1:, 2:])
        try:
            if cached and (cache := base.new_cache()) is not None:
                parts = [base.hidden(ids[:, :4], mask[:, :4], cache)]
                parts += [base.hidden(ids[:, i : i + 1], mask[:, : i + 1], cache) for i in (4, 5)]
                padded = torch.cat(parts, 1)
            else:
                padded = base.hidden(ids, mask)
        except Exception as error:  # whatever a model's own code makes of it
            return f"a forward with padding fails ({type(error).__name__}: {error})"
    change = _size(padded[1:, 2:], alone)
    if change <= _allowed(base.model):
        return None
    return f"hidden states of a padded row are others than those of the row alone, by {change:.2g}"
