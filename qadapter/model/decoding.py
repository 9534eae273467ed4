"""The decode loop: one forward for all streams, one head product, one sampling kernel a token.

    h = sum_i w_i h_i            hidden states of the streams, mixed in float32 (`Streams`)
    c = W h                      the policy's logits, one product where the head is linear
    token ~ softmax(filters(c))  `QF.sample`

transformers prepares the cache, the logits processors and the stopping criteria (its
``custom_generate`` hook). Temperature, top-k, top-p and min-p are taken out of the processors and
left to the sampling kernel where they come last; all other processors act on c before.
"""

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import LinearAttentionCacheLayerMixin, StaticCache
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput

from qadapter.functional import sample
from qadapter.model.sharded import anywhere, vocab_rows
from qadapter.model.streams import Streams
from qadapter.ops.philox import philox_4x32

NEG_INF = float("-inf")
KEEP = 0.75  # finished rows leave the batch when no more than this share of it is left


@dataclass
class GenerateOutput(GenerateDecoderOnlyOutput):
    """transformers' output, and ``logprobs`` float32 [B, new]: of every new token under the policy
    after the filters (at temperature 1 where decoding is greedy), 0 behind a row's end."""

    logprobs: Tensor | None = None


class TwoStreamDecoder:
    """The policy's logits for the next token, with what it keeps of the tokens so far.

    Args:
        streams: which streams run.
        weights: float32 [streams, B], what each stream's logits count in each row.
        head: the language-model head where logits are head(last hidden state), which is then taken
            once, of the mixed hidden states; None where the model does more, in every stream.
        cache: a transformers cache, or None to compute everything anew at every token.
        compile_config: transformers' CompileConfig for the steps after the prompt, or None.
    """

    def __init__(
        self,
        streams: Streams,
        weights: Tensor,
        head: nn.Module | None,
        cache: Any,
        compile_config: Any = None,
    ) -> None:
        self.streams, self.weights = streams, weights
        streams.refresh()
        self.head: Any = head
        self.mixes = len(streams.names) > 1 or not bool((weights == 1).all())
        self.together = streams.reason is None
        self.caches = [cache]
        if not self.together:
            # Keys and values differ between streams wherever LoRA is on them.
            self.caches += [copy.deepcopy(cache) for _ in streams.names[1:]]
        parameters = inspect.signature(streams.hf_model.forward).parameters
        self.last_only: dict[str, Any] = (
            {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        )
        self.compile_config = compile_config if self.together else None

    def __call__(self, ids: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
        """c [B, V], of the model's dtype, or float32 where two heads' logits are composed."""
        if not self.together:
            return self._apart(ids, mask, positions)
        step: Any = TwoStreamDecoder._together
        if self.compile_config is not None and ids.shape[1] == 1:
            step = self.streams.compiled(step, self.compile_config)
        with self.streams.installed(whole=step is TwoStreamDecoder._together):
            return step(self, ids, mask, positions)

    def idle(self, token: Tensor) -> None:
        """As many passes as a step takes, of one token [1, 1], for processes that hold the model's
        other shards and still make text."""
        kept = self.caches, self.weights, self.compile_config
        self.caches, self.weights = [None] * len(self.caches), self.weights[:, :1]
        self.compile_config = None
        try:
            self(token, None, torch.zeros_like(token))
        finally:
            self.caches, self.weights, self.compile_config = kept

    def _together(self, ids: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
        cache = self.caches[0]
        if self.head is None:
            logits = self.streams.logits(ids, mask, positions, cache, **self.last_only)
            return self._compose(logits)
        return self._project(self.streams.hidden(ids, mask, positions, cache)[:, -1])

    def _apart(self, ids: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
        model: Any = self.streams.hf_model
        parts = []
        for name, cache in zip(self.streams.names, self.caches, strict=True):
            inputs = self.streams.arguments(ids, mask, positions, cache)
            with self.streams.only(name):
                if self.head is None:
                    parts.append(model(**inputs, **self.last_only).logits[:, -1])
                else:
                    parts.append(model.base_model(**inputs)[0][:, -1])
        stacked = torch.cat(parts)
        return self._compose(stacked) if self.head is None else self._project(stacked)

    def _project(self, hidden: Tensor) -> Tensor:
        """One product: sum_i w_i (W h_i + b) = W (sum_i w_i h_i) + b sum_i w_i."""
        if not self.mixes:
            return self.head(hidden)
        count, batch = self.weights.shape
        weights = self.weights.to(torch.promote_types(hidden.dtype, torch.float32))[..., None]
        mixed = (hidden.view(count, batch, -1) * weights).sum(0).to(hidden.dtype)
        logits = self.head(mixed)
        if self.head.bias is not None:
            excess = weights.sum(0) - 1.0
            logits = logits + (excess * self.head.bias).to(logits.dtype)
        return logits

    def _compose(self, logits: Tensor) -> Tensor:
        """sum_i w_i z_i; a token masked (-inf) in a stream that counts stays masked."""
        count, batch = self.weights.shape
        z = logits.view(count, batch, -1).to(torch.promote_types(logits.dtype, torch.float32))
        weights = self.weights.to(z.dtype)[..., None]
        masked = ((z == NEG_INF) & (weights != 0)).any(0)
        terms = torch.where(weights == 0, 0.0, z.masked_fill(z == NEG_INF, 0.0) * weights)
        return terms.sum(0).masked_fill_(masked, NEG_INF)

    def _layers(self) -> Iterator[tuple[Any, bool]]:
        """The caches' layers, and whether each holds the rows of all streams."""
        for cache in self.caches:
            for i, layer in enumerate(cache.layers if cache is not None else ()):
                yield layer, self.together and i >= self.streams.shared_layers

    def can_keep(self) -> bool:
        """Whether `keep` can cut rows out of all that the caches hold."""
        count, batch = self.weights.shape
        outside = [cache for cache in self.caches if cache is not None]
        if any(True for cache in outside for _ in _tensors(vars(cache), "layers")):
            return False
        return all(
            hasattr(layer, "reorder_cache")
            and all(len(t) == (count * batch if every else batch) for t in _tensors(vars(layer)))
            for layer, every in self._layers()
        )

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch only."""
        count, batch = self.weights.shape
        all_rows = (torch.arange(count, device=rows.device)[:, None] * batch + rows).flatten()
        for layer, every in self._layers():
            kept = all_rows if every else rows
            # What beam search calls. batch_select_indices leaves out what some layers hold besides
            # keys and values.
            layer.reorder_cache(kept)
            if any(len(tensor) != len(kept) for tensor in _tensors(vars(layer))):
                raise NotImplementedError(
                    f"{type(layer).__name__}.reorder_cache keeps rows of the batch that have "
                    "ended: give prompts one at a time, or use_cache=False"
                )
        self.weights = self.weights[:, rows]


def _tensors(attributes: dict[Any, Any], *left_out: str) -> Iterator[Tensor]:
    """The tensors that a part of a cache holds; single numbers are not of the rows."""
    for name, value in attributes.items():
        if name in left_out:
            continue
        if isinstance(value, Tensor) and value.numel() > 1:
            yield value
        elif isinstance(value, dict):
            yield from _tensors(value)
        elif isinstance(value, list | tuple):
            yield from _tensors(dict(enumerate(value)))


def split_processors(
    processors: LogitsProcessorList,
) -> tuple[LogitsProcessorList, dict[str, Any]]:
    """Processors before the last temperature, top-k, top-p, min-p; and these for `QF.sample`."""
    order: list[tuple[type, str]] = [
        (TemperatureLogitsWarper, "temperature"),
        (TopKLogitsWarper, "top_k"),
        (TopPLogitsWarper, "top_p"),
        (MinPLogitsWarper, "min_p"),
    ]
    kept = list(processors)
    filters: dict[str, Any] = {}
    while kept and order:
        last = kept[-1]
        while order and type(last) is not order[-1][0]:
            order.pop()
        if not order or getattr(last, "filter_value", NEG_INF) != NEG_INF:
            break
        kind, name = order.pop()
        if kind in (TopPLogitsWarper, MinPLogitsWarper) and last.min_tokens_to_keep > 1:
            break
        filters[name] = getattr(last, name)
        kept.pop()
    return LogitsProcessorList(kept), filters


def row_keys(seed: int | Tensor | None, prompts: int, rows: int, device: torch.device) -> Tensor:
    """int64 [rows]: the key of each row's stream of random numbers.

    An int gives row b stream b of that seed, a tensor gives each prompt its own; several rows of
    one prompt are streams of its key. None draws the keys from torch's global generator.
    """
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (rows,), device=device)
    index = torch.arange(rows, device=device)
    if isinstance(seed, Tensor):
        keys = seed.to(device).repeat_interleave(rows // prompts)
        if rows == prompts:
            return keys
        index = index % (rows // prompts)
    else:
        keys = torch.full((rows,), seed, dtype=torch.int64, device=device)
    w0, w1, _, _ = philox_4x32(keys, index)
    return (w0 << 32) | w1


@torch.no_grad()
def decode(
    decoder: TwoStreamDecoder,
    keys: Tensor,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    *,
    streamer: Any,
    output_logprobs: bool,
    rows_may_leave: bool,
    synced: bool,
) -> Tensor | GenerateOutput:
    """The loop behind `qadapter.model.generate.generate`; ``synced`` where processes hold a model
    together, which then take equally many steps."""
    config = generation_config
    device = input_ids.device
    batch, width = input_ids.shape
    wants_dict = config.return_dict_in_generate
    wants_scores = wants_dict and config.output_scores
    filters: dict[str, Any] = {}
    if not config.do_sample:
        filters["temperature"] = 0.0
    elif not wants_scores:
        logits_processor, filters = split_processors(logits_processor)
    has_eos = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    if has_eos and config._pad_token_tensor is None:
        raise ValueError(
            "pad_token_id: expected one, to stand behind the end token of rows that end before "
            "others; the model's generation_config has none"
        )
    # As in transformers, rows that a criterion alone has ended are written on, not padded.
    rows_may_leave = rows_may_leave and has_eos
    limit = min(stopping_criteria.max_length or 2**31, config.max_length or 2**31)
    cached = decoder.caches[0] is not None
    # One shape at every step; states of recurrent layers take the mask of the tokens so far.
    whole_mask = isinstance(decoder.caches[0], StaticCache) and not any(
        isinstance(layer, LinearAttentionCacheLayerMixin) for layer in decoder.caches[0].layers
    )

    capacity = limit if limit < 2**31 else width + 64
    sequences = torch.empty(batch, capacity, dtype=input_ids.dtype, device=device)
    sequences[:, :width] = input_ids
    given_mask = model_kwargs.get("attention_mask")
    padded = given_mask is not None and not bool(given_mask.all())
    if given_mask is None or not padded:
        mask = None
        positions = torch.arange(width, device=device).expand(batch, -1)
    else:
        mask = torch.zeros(batch, capacity, dtype=torch.int64, device=device)
        mask[:, :width] = given_mask
        positions = (mask[:, :width].cumsum(-1) - 1).clamp_(min=0)

    # Ids in the padding need not be the model's own: what it reads there does not count.
    largest = vocab_rows(decoder.streams.hf_model) - 1

    rows: Tensor | None = None  # the rows of the batch that still run; None is all
    unfinished = torch.ones(batch, dtype=torch.bool, device=device)
    tokens_in = input_ids.clamp(0, largest)
    logprobs: list[Tensor] = []
    scores: tuple[Tensor, ...] = ()
    logits: tuple[Tensor, ...] = ()
    if streamer is not None:
        streamer.put(input_ids.cpu())

    length = width
    while True:
        step_mask = mask if mask is None or whole_mask else mask[:, :length]
        composed = decoder(tokens_in, step_mask, positions)
        if wants_dict and config.output_logits:
            logits += (composed.float(),)
        processed = composed
        if len(logits_processor):
            # Processors may hold something of every row: they see the batch that they began with.
            scores_in = composed.to(torch.float32, copy=True)
            if rows is not None:
                scores_in = _spread(scores_in, rows, batch, 0.0)
            processed = logits_processor(cast(Any, sequences[:, :length]), cast(Any, scores_in))
            if rows is not None:
                processed = processed[rows]
        if wants_scores:
            scores += (processed.float(),)
        drawn = sample(None, processed, seed=keys, position=length - width, **filters)
        tokens, logp = drawn.tokens, drawn.logprobs
        if rows is not None:
            tokens = _spread(tokens, rows, batch, config._pad_token_tensor)
            logp = _spread(logp, rows, batch, 0.0)
        if has_eos:
            tokens = torch.where(unfinished, tokens, config._pad_token_tensor)
        if output_logprobs:
            logprobs.append(logp.masked_fill(~unfinished, 0.0))
        if length == capacity:  # no limit was known
            more = sequences.new_empty(batch, capacity)
            sequences = torch.cat([sequences, more], 1)
            mask = None if mask is None else torch.cat([mask, torch.zeros_like(mask)], 1)
            capacity *= 2
        sequences[:, length] = tokens
        if mask is not None:
            mask[:, length] = 1
        length += 1
        if streamer is not None:
            streamer.put(tokens.cpu())
        stopped = stopping_criteria(sequences[:, :length], cast(Any, scores or None))
        unfinished &= ~stopped
        running, broken = torch.stack([unfinished.sum(), (tokens < 0).sum()]).tolist()
        here = running > 0, broken > 0
        others, elsewhere = anywhere(here, device) if synced else (False, False)
        if broken:
            raise ValueError(
                f"no token can be drawn in row {int((tokens < 0).nonzero()[0])}: its logits "
                "are NaN, or every token is masked"
            )
        while others and not running and not elsewhere:
            decoder.idle(tokens_in[:1, :1])
            others, elsewhere = anywhere((False, False), device)
        if elsewhere:
            raise ValueError("no token can be drawn in another process, which has said why")
        if not running:
            break

        if rows_may_leave and running <= KEEP * len(keys) and decoder.can_keep():
            kept = (unfinished if rows is None else unfinished[rows]).nonzero()[:, 0]
            decoder.keep(kept)
            rows = kept if rows is None else rows[kept]
            keys, positions = keys[kept], positions[kept]
            mask = None if mask is None else mask[kept]
        last = positions[:, -1:] + 1
        if cached:
            step = sequences[:, length - 1 : length]
            tokens_in, positions = step if rows is None else step[rows], last
        else:
            step = sequences[:, :length]
            tokens_in = step if rows is None else step[rows]
            positions = torch.cat([positions, last], 1)
        tokens_in = tokens_in.clamp(0, largest)

    if streamer is not None:
        streamer.end()
    result = sequences[:, :length].contiguous()
    if not wants_dict:
        return result
    return GenerateOutput(
        sequences=cast(Any, result),
        scores=cast(Any, scores or None),
        logits=cast(Any, logits or None),
        past_key_values=decoder.caches[0],
        logprobs=torch.stack(logprobs, 1) if output_logprobs else None,
    )


def _spread(values: Tensor, rows: Tensor, batch: int, fill: Any) -> Tensor:
    """``values`` of the rows that still run, in a batch where the others hold ``fill``."""
    whole = values.new_empty(batch, *values.shape[1:])
    whole[:] = fill
    return whole.index_copy_(0, rows, values)
