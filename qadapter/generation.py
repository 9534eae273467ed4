"""Decoding from the composed policy: the arguments of `QAdapterModel.generate`, and what they mean.

    policy = softmax((sum_i w_i Q_i + alpha_0 log pi_base) / alpha_tilde),   Q_i = z_i - center z_b
           = softmax((sum_i w_i z_i + (alpha_0 - sum_i w_i center_i) z_b) / alpha_tilde)

    alpha_0, alpha_tilde:  as trained, or as given
    strength s:            alpha_0 = alpha_tilde = 1 / s: pi ~ pi_base * exp(s sum_i w_i Q_i),
                           s = 0 is the base
    adapters:              the w_i; one adapter with weight 1 if nothing is said

All three may differ from row to row. A stream that counts 0 in every row does not run.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers.generation.configuration_utils import CompileConfig, GenerationMode
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria

from qadapter import _checks
from qadapter.decoding import GenerateOutput, TwoStreamDecoder, decode, row_keys
from qadapter.prompts import encode_prompts
from qadapter.streams import Names

if TYPE_CHECKING:
    from qadapter.modeling import QAdapterModel

__all__ = ["GenerateOutput", "StreamWeights", "encode_prompts", "generate", "stream_weights"]

PerRow = float | Sequence[float] | Tensor


class StreamWeights(NamedTuple):
    q: float
    base: float


def stream_weights(
    model: "QAdapterModel",
    strength: float | None = None,
    alpha_0: float | None = None,
    alpha_tilde: float | None = None,
) -> StreamWeights:
    """The weights of z_q and z_b in the policy's logits; None takes the trained values."""
    if strength is not None:
        if alpha_0 is not None or alpha_tilde is not None:
            raise ValueError(
                "strength sets alpha_0 and alpha_tilde: give strength, or the two, not both; got "
                f"strength={strength!r}, alpha_0={alpha_0!r}, alpha_tilde={alpha_tilde!r}"
            )
        s = _checks.number("strength", strength)
        if s < 0:
            raise ValueError(f"strength: expected 0 (the base) or more, got {strength!r}")
        return StreamWeights(s, 1.0 - model.center * s)
    a_0 = model.alpha_0 if alpha_0 is None else _checks.number("alpha_0", alpha_0)
    a_t = model.alpha_tilde
    if alpha_tilde is not None:
        a_t = _checks.number("alpha_tilde", alpha_tilde, above=0.0)
    return StreamWeights(1.0 / a_t, (a_0 - model.center) / a_t)


def _rows(name: str, value: PerRow | None, batch: int) -> list[Any]:
    """A number for every row, or None for every row."""
    if isinstance(value, Tensor):
        value = value.tolist() if value.ndim else value.item()
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [value] * batch
    if len(value) != batch:
        raise ValueError(
            f"{name}: expected a number or one for each of the {batch} rows of input_ids, got "
            f"{len(value)}"
        )
    return list(value)


def blend(
    model: "QAdapterModel",
    batch: int,
    strength: PerRow | None = None,
    alpha_0: PerRow | None = None,
    alpha_tilde: PerRow | None = None,
    adapters: Mapping[str, PerRow] | None = None,
) -> tuple[Names, Tensor]:
    """The streams that count, and float64 [streams, batch], what their logits count in each row.

    Raises:
        ValueError: as `generate`.
    """
    active = model.adapter_names[0]
    given: Mapping[str, PerRow] = {active: 1.0} if adapters is None else adapters
    if not isinstance(given, Mapping) or not given:
        raise ValueError(f"adapters: expected weights by adapter name, got {adapters!r}")
    for name in given:
        if name not in model.adapter_names:
            known = ", ".join(model.adapter_names)
            raise ValueError(f"adapters: no adapter is named {name!r}, there are: {known}")
    if strength is None and (alpha_0 is None or alpha_tilde is None):
        trained = {model.compositions[name][:2] for name in given}
        if len(trained) > 1:
            raise ValueError(
                "alpha_0: these adapters were trained with different alpha_0 and alpha_tilde; give "
                "strength, or both of them"
            )
    table = {name: _rows(f"adapters[{name!r}]", w, batch) for name, w in given.items()}
    knobs = zip(
        _rows("strength", strength, batch),
        _rows("alpha_0", alpha_0, batch),
        _rows("alpha_tilde", alpha_tilde, batch),
        strict=True,
    )
    columns = []
    for row, (s, a_0, a_t) in enumerate(knobs):
        if s is None and adapters is not None:
            first = model.compositions[next(iter(given))]
            a_0 = first[0] if a_0 is None else a_0
            a_t = first[1] if a_t is None else a_t
        stream_weights(model, s, a_0, a_t)  # checks the values
        w = {name: _checks.number(f"adapters[{name!r}]", table[name][row]) for name in given}
        centers = sum(w[name] * model.compositions[name][2] for name in given)
        if s is not None:
            base, scale = 1.0 - s * centers, float(s)
        else:
            a_0 = model.alpha_0 if a_0 is None else a_0
            scale = 1.0 / (model.alpha_tilde if a_t is None else a_t)
            base = (a_0 - centers) * scale
        columns.append([base, *(scale * w[name] for name in given)])
    weights = torch.tensor(columns, dtype=torch.float64).reshape(batch, -1).T
    counts = (weights != 0).any(1).tolist()
    names: Names = (None, *given)
    if not any(counts):
        return (None,), weights[:1]
    kept = [i for i, counted in enumerate(counts) if counted]
    return tuple(names[i] for i in kept), weights[kept]


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


def generate(
    model: "QAdapterModel",
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    strength: PerRow | None = None,
    alpha_0: PerRow | None = None,
    alpha_tilde: PerRow | None = None,
    adapters: Mapping[str, PerRow] | None = None,
    seed: int | Tensor | None = None,
    streamer: Any = None,
    tokenizer: Any = None,
    output_logprobs: bool = False,
    **generation_kwargs: Any,
) -> Any:
    """Generate from softmax((sum_i w_i Q_i + alpha_0 log pi_base) / alpha_tilde).

    Args:
        model: the two-stream model.
        input_ids: int64 [B, T] prompts, padded on the left if lengths differ.
        attention_mask: [B, T]; needed when there is padding.
        strength: how much of the preference: 0 is the base, 1 the trained policy, more exaggerates.
            Stands for alpha_0 = alpha_tilde = 1/strength. A number, or one for each row.
        alpha_0, alpha_tilde: instead of strength, the two weights; None keeps the trained value. A
            number, or one for each row.
        adapters: weights w_i by adapter name (`QAdapterModel.load_adapter`), each a number or one
            for each row; None is the adapter of the model with weight 1.
        seed: an int (row b draws stream b of it) or int64 [B], a stream for each row: a row's draws
            then depend on its logits alone, not on its batch. None: torch's global generator.
        streamer: a transformers streamer (batch of one); gets the prompt and each new token.
        tokenizer: needed with ``stop_strings``.
        output_logprobs: with ``return_dict_in_generate``, also `GenerateOutput.logprobs`.
        **generation_kwargs: transformers' generation arguments (max_new_tokens, do_sample,
            temperature, top_k, top_p, min_p, eos_token_id, stop_strings, repetition_penalty,
            num_return_sequences, logits_processor, stopping_criteria, output_scores, ...), applied
            to the composed logits. ``cache_implementation="static"`` compiles the step on a GPU,
            and with ``compile_config`` anywhere.

    Returns:
        int64 [B * num_return_sequences, T + new] with finished rows padded, or `GenerateOutput`
        with ``return_dict_in_generate=True``.

    Raises:
        ValueError: conflicting or malformed arguments, one that this loop does not support, or
            logits from which nothing can be drawn (NaN, everything masked).
    """
    _checks.tensor("input_ids", input_ids, 2, (torch.int64, torch.int32))
    batch = input_ids.shape[0]
    if input_ids.shape[1] == 0:
        raise ValueError("input_ids: expected at least one token per prompt, got none")
    if batch == 0:
        raise ValueError("input_ids: expected at least one prompt, got none")
    names, weights = blend(model, batch, strength, alpha_0, alpha_tilde, adapters)
    if attention_mask is not None:
        _checks.same("attention_mask", attention_mask, "input_ids", input_ids, dtype=False)
        if not attention_mask[:, -1].all():
            raise ValueError(
                "attention_mask: prompts must be padded on the left, got padding at the end of row "
                f"{int((attention_mask[:, -1] == 0).nonzero()[0])} "
                "(tokenizer.padding_side = 'left')"
            )
    if isinstance(seed, Tensor):
        _checks.tensor("seed", seed, 1, (torch.int64,))
        _checks.rows("seed", seed, batch, seed.device, "input_ids")
    elif seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise ValueError(f"seed: expected None, an int or an int64 tensor [B], got {seed!r}")
    config = generation_kwargs.get("generation_config")
    _refuse(lambda name: generation_kwargs.get(name, getattr(config, name, None)))
    if output_logprobs and not generation_kwargs.get(
        "return_dict_in_generate", getattr(config, "return_dict_in_generate", False)
    ):
        raise ValueError("output_logprobs: expected return_dict_in_generate=True with it")
    _stop_strings(generation_kwargs, tokenizer)
    custom = ("logits_processor", "prefix_allowed_tokens_fn", "output_scores", "output_logits")
    rows_may_leave = not any(generation_kwargs.get(name) for name in custom)
    streams = model.streams(names)

    def run(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        _refuse(lambda name: getattr(generation_config, name, None))  # the model's own settings
        mode = generation_config.get_generation_mode()
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise ValueError(f"generation_config: {mode} is not supported with two streams")
        for name in model_kwargs:
            if name in generation_kwargs and name != "use_cache":
                raise ValueError(f"{name}: is not supported with two streams")
        rows = input_ids.shape[0]
        cache = model_kwargs.get("past_key_values") if model_kwargs.get("use_cache", True) else None
        compile_config = None
        if cache is not None and generation_config.cache_implementation == "static":
            compile_config = generation_config.compile_config
            if compile_config is None and input_ids.is_cuda:
                compile_config = CompileConfig()
            if generation_config.disable_compile:
                compile_config = None
        expanded = weights.repeat_interleave(rows // batch, 1).to(input_ids.device, torch.float32)
        decoder = TwoStreamDecoder(streams, expanded, cache, compile_config)
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
            rows_may_leave=rows_may_leave and cache is not None and not cache.is_compileable,
        )

    was_training = model.training
    model.eval()
    try:
        return cast(Any, model.hf_model).generate(
            input_ids,
            attention_mask=attention_mask,
            custom_generate=run,
            **generation_kwargs,
        )
    finally:
        model.train(was_training)


def _stop_strings(generation_kwargs: dict[str, Any], tokenizer: Any) -> None:
    """Make stop strings a criterion here: transformers hides the tokenizer from other loops."""
    config = generation_kwargs.get("generation_config")
    strings = generation_kwargs.pop("stop_strings", None) or getattr(config, "stop_strings", None)
    if not strings:
        return
    if tokenizer is None:
        raise ValueError(f"stop_strings: expected tokenizer= with it, got {strings!r} alone")
    if config is not None and config.stop_strings:
        generation_kwargs["generation_config"] = type(config).from_dict(
            {**config.to_dict(), "stop_strings": None}
        )
    criterion = StopStringCriteria(tokenizer=tokenizer, stop_strings=strings)
    generation_kwargs["stopping_criteria"] = StoppingCriteriaList(
        [*(generation_kwargs.get("stopping_criteria") or ()), criterion]
    )
