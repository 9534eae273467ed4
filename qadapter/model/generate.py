"""Decoding from the composed policy: which of transformers' arguments mean what, and which cannot.

The streams and their weights are given (`qadapter.composition.blend`); transformers prepares the
cache, the processors and the criteria, and `qadapter.model.decoding.decode` is its loop.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import StaticCache
from transformers.generation.configuration_utils import CompileConfig, GenerationMode
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria

from qadapter.model.decoding import GenerateOutput, TwoStreamDecoder, decode, row_keys
from qadapter.model.growing_cache import grow_in_place
from qadapter.model.streams import Streams, evaluating
from qadapter.ops import checks

__all__ = ["GenerateOutput", "check_prompts", "generate", "without_settings"]

_UNSUPPORTED = {
    "assistant_model": "speculative decoding",
    "prompt_lookup_num_tokens": "speculative decoding",
    "negative_prompt_ids": "classifier-free guidance",
    "guidance_scale": "classifier-free guidance",
    "past_key_values": "a cache from outside (it would have to hold all streams)",
    "inputs_embeds": "embeddings as input",
    "position_ids": "positions from outside (they follow from attention_mask)",
    "penalty_alpha": "contrastive search",
    "dola_layers": "DoLa",
    "custom_generate": "another decoding loop",
    "synced_gpus": "sharded generation",
    "prefill_chunk_size": "prefill in chunks",
    "output_attentions": "returning attention",
    "output_hidden_states": "returning hidden states",
    "token_healing": "token healing",
}
_CACHES = (None, "dynamic", "dynamic_full", "static")
# Turned off is as good as not given.
_OFF = {"guidance_scale": 1}


def _refuse(get: Any) -> None:
    for name, what in _UNSUPPORTED.items():
        asked = get(name)
        if asked is not None and asked is not False and asked != _OFF.get(name, object()):
            raise ValueError(f"{name}: {what} is not supported with two streams, got {asked!r}")
    if (beams := get("num_beams") or 1) > 1:
        raise ValueError(f"num_beams: beam search is not supported with two streams, got {beams}")
    if (cache := get("cache_implementation")) not in _CACHES:
        known = ", ".join(str(name) for name in _CACHES)
        raise ValueError(f"cache_implementation: expected one of {known}, got {cache!r}")


def _check_numbers(get: Any) -> None:
    """What transformers takes for something else, without a word."""
    for name in ("max_new_tokens", "max_length", "num_return_sequences"):
        if get(name) is not None:
            checks.whole(name, get(name))
    top_p = get("top_p")
    if get("do_sample") and top_p is not None and not 0 < checks.number("top_p", top_p) <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p!r}")


def check_prompts(input_ids: Tensor, attention_mask: Tensor | None, vocab: int) -> None:
    """ValueError unless they are prompts, padded on the left, of ids below ``vocab``."""
    checks.tensor("input_ids", input_ids, 2, (torch.int64, torch.int32))
    if input_ids.shape[1] == 0:
        raise ValueError("input_ids: expected at least one token per prompt, got none")
    if input_ids.shape[0] == 0:
        raise ValueError("input_ids: expected at least one prompt, got none")
    if attention_mask is not None:
        checks.same("attention_mask", attention_mask, "input_ids", input_ids, dtype=False)
    foreign = (input_ids < 0) | (input_ids >= vocab)
    if attention_mask is not None:
        foreign &= attention_mask != 0  # any id may stand in the padding
    if foreign.any():
        row, column = foreign.nonzero()[0].tolist()
        raise ValueError(
            f"input_ids: row {row} has the id {int(input_ids[row, column])}, but the model's "
            f"embedding has {vocab} rows; padding is told by attention_mask"
        )
    if attention_mask is None:
        return
    if not attention_mask[:, -1].all():
        raise ValueError(
            "attention_mask: prompts must be padded on the left, got padding at the end of row "
            f"{int((attention_mask[:, -1] == 0).nonzero()[0])} "
            "(tokenizer.padding_side = 'left')"
        )


def generate(
    streams: Streams,
    weights: Tensor,
    head: nn.Module | None,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    *,
    seed: int | Tensor | None = None,
    streamer: Any = None,
    tokenizer: Any = None,
    output_logprobs: bool = False,
    synced: bool = False,
    **generation_kwargs: Any,
) -> Any:
    """Generate from softmax(sum_i weights_i z_i) over the streams.

    Args:
        streams: which run.
        weights: float64 [streams, B], what the logits of each count in each row.
        head: as `TwoStreamDecoder` takes it.
        synced: whether other processes, which hold parts of the model, generate at the same time.
        The others are those of `QAdapterModel.generate`, which says what is returned and raised.
    """
    batch = input_ids.shape[0]
    if isinstance(seed, Tensor):
        checks.tensor("seed", seed, 1, (torch.int64,))
        checks.rows("seed", seed, batch, seed.device, "input_ids")
    elif seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise ValueError(f"seed: expected None, an int or an int64 tensor [B], got {seed!r}")
    elif isinstance(seed, int) and not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: expected an integer of at most 64 bits, got {seed!r}")
    setting = _settings(streams.hf_model, generation_kwargs)
    _refuse(setting)
    _check_numbers(setting)
    if output_logprobs and not setting("return_dict_in_generate"):
        raise ValueError("output_logprobs: expected return_dict_in_generate=True with it")
    _stop_strings(generation_kwargs, setting("stop_strings"), tokenizer)
    # What these see or return is of the whole batch.
    whole = ("logits_processor", "prefix_allowed_tokens_fn", "output_scores", "output_logits")
    rows_may_leave = not any(setting(name) for name in whole)

    def run(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        mode = generation_config.get_generation_mode()
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise ValueError(f"generation_config: {mode} is not supported with two streams")
        for name in model_kwargs:
            if name in generation_kwargs and name != "use_cache":
                raise ValueError(f"{name}: is not supported with two streams")
        rows = input_ids.shape[0]
        cache = model_kwargs.get(streams.cache_name or "")
        if not model_kwargs.get("use_cache", True):
            cache = None
        grow_in_place(cache)
        compile_config = None
        if cache is not None and generation_config.cache_implementation == "static":
            compile_config = generation_config.compile_config
            if compile_config is None and input_ids.is_cuda:
                compile_config = CompileConfig()
            if generation_config.disable_compile:
                compile_config = None
        expanded = weights.repeat_interleave(rows // batch, 1).to(input_ids.device, torch.float32)
        decoder = TwoStreamDecoder(streams, expanded, head, cache, compile_config)
        keys = row_keys(seed, batch, rows, input_ids.device)
        return decode(
            decoder,
            keys,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            model_kwargs,
            streamer=streamer,
            output_logprobs=output_logprobs,
            rows_may_leave=rows_may_leave
            and cache is not None
            and not isinstance(cache, StaticCache),
            synced=synced,
        )

    if streams.uncached is not None:
        generation_kwargs["use_cache"] = False  # transformers may not even be able to make one
    with evaluating(streams.peft_model):
        return cast(Any, streams.hf_model).generate(
            input_ids, attention_mask=attention_mask, custom_generate=run, **generation_kwargs
        )


def _settings(hf_model: Any, generation_kwargs: dict[str, Any]) -> Callable[[str], Any]:
    """A setting by its name, as transformers settles it: keyword, generation_config, model."""
    config = generation_kwargs.get("generation_config")

    def setting(name: str) -> Any:
        if name in generation_kwargs:
            return generation_kwargs[name]
        given = getattr(config, name, None)
        return given if given is not None else getattr(hf_model.generation_config, name, None)

    return setting


@contextmanager
def without_settings(hf_model: Any) -> Iterator[None]:
    """Inside, nothing of the model's generation_config counts but the ids of special tokens."""
    own = hf_model.generation_config
    ids = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    hf_model.generation_config = type(own)(**ids)
    try:
        yield
    finally:
        hf_model.generation_config = own


def _stop_strings(generation_kwargs: dict[str, Any], strings: Any, tokenizer: Any) -> None:
    """Make stop strings a criterion here: transformers hides the tokenizer from other loops."""
    if not strings:
        return
    if tokenizer is None:
        raise ValueError(
            f"stop_strings: expected tokenizer= with it, got {strings!r} alone (the model's "
            "generation_config may have them; stop_strings=None leaves them out)"
        )
    config = generation_kwargs.get("generation_config")
    generation_kwargs["stop_strings"] = None
    if config is not None and config.stop_strings:
        generation_kwargs["generation_config"] = type(config).from_dict(
            {**config.to_dict(), "stop_strings": None}
        )
    criterion = StopStringCriteria(tokenizer=tokenizer, stop_strings=strings)
    generation_kwargs["stopping_criteria"] = StoppingCriteriaList(
        [*(generation_kwargs.get("stopping_criteria") or ()), criterion]
    )
