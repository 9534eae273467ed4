"""Decoding from the composed policy: both streams at every token.

transformers prepares the inputs, the cache, the logits processors and the stopping criteria (its
``custom_generate`` hook); the loop below feeds both streams and hands the processors the composed
logits w_q z_q + w_b z_b, so temperature, top-k, top-p, min-p and penalties act on the policy.

    alpha_0, alpha_tilde:  w_q = 1 / alpha_tilde,  w_b = (alpha_0 - center) / alpha_tilde
    strength s:            alpha_0 = alpha_tilde = 1 / s, that is pi ~ pi_base * exp(s Q)
                           w_q = s,  w_b = 1 - center * s      (s = 0 is the base)

A stream whose weight is 0 does not run.
"""

import copy
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from qadapter import _checks

if TYPE_CHECKING:
    from qadapter.modeling import QAdapterModel

NEG_INF = float("-inf")


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


def compose(base_logits: Tensor | None, q_logits: Tensor | None, weights: StreamWeights) -> Tensor:
    """w_q z_q + w_b z_b in float32; a token masked (-inf) in a stream that counts stays masked."""
    if weights.base == 0:
        assert q_logits is not None
        return weights.q * q_logits.float()
    assert base_logits is not None
    base = base_logits.float()
    if weights.q == 0:
        return weights.base * base
    assert q_logits is not None
    q = q_logits.float()
    masked = (q == NEG_INF) | (base == NEG_INF)
    return (weights.q * q + weights.base * base).masked_fill_(masked, NEG_INF)


_UNSUPPORTED = {
    "assistant_model": "speculative decoding",
    "prompt_lookup_num_tokens": "speculative decoding",
    "negative_prompt_ids": "classifier-free guidance",
    "guidance_scale": "classifier-free guidance",
    "past_key_values": "a cache from outside (there are two)",
    "inputs_embeds": "embeddings as input",
    "penalty_alpha": "contrastive search",
    "dola_layers": "DoLa",
    "stop_strings": "stop strings (pass transformers.StopStringCriteria in stopping_criteria)",
    "custom_generate": "another decoding loop",
    "synced_gpus": "sharded generation",
}


def generate(
    model: "QAdapterModel",
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    strength: float | None = None,
    alpha_0: float | None = None,
    alpha_tilde: float | None = None,
    streamer: Any = None,
    **generation_kwargs: Any,
) -> Any:
    """Generate from softmax((Q + alpha_0 log pi_base) / alpha_tilde).

    Args:
        model: the two-stream model.
        input_ids: int64 [B, T] prompts, padded on the left if lengths differ.
        attention_mask: [B, T]; needed when there is padding.
        strength: how much of the preference: 0 is the base, 1 the trained policy, more exaggerates.
            Stands for alpha_0 = alpha_tilde = 1/strength.
        alpha_0, alpha_tilde: instead of strength, the two weights; None keeps the trained value.
        streamer: a transformers streamer (batch of one); gets the prompt and each new token.
        **generation_kwargs: transformers' generation arguments (max_new_tokens, do_sample,
            temperature, top_k, top_p, min_p, eos_token_id, logits_processor, ...), applied to the
            composed logits.

    Returns:
        int64 [B, T + new] with finished rows padded, or transformers' `GenerateDecoderOnlyOutput`
        with ``return_dict_in_generate=True``.

    Raises:
        ValueError: conflicting or malformed arguments, or one that this loop does not support.
    """
    weights = stream_weights(model, strength, alpha_0, alpha_tilde)
    _checks.tensor("input_ids", input_ids, 2, (torch.int64, torch.int32))
    if input_ids.shape[1] == 0:
        raise ValueError("input_ids: expected at least one token per prompt, got none")
    if attention_mask is not None:
        _checks.same("attention_mask", attention_mask, "input_ids", input_ids, dtype=False)
        if not attention_mask[:, -1].all():
            raise ValueError(
                "attention_mask: prompts must be padded on the left, got padding at the end of row "
                f"{int((attention_mask[:, -1] == 0).nonzero()[0])} "
                "(tokenizer.padding_side = 'left')"
            )
    config = generation_kwargs.get("generation_config")
    for name, what in _UNSUPPORTED.items():
        asked = generation_kwargs.get(name, getattr(config, name, None))
        if asked is not None and not (name == "guidance_scale" and asked == 1):
            raise ValueError(f"{name}: {what} is not supported with two streams, got {asked!r}")
    beams = generation_kwargs.get("num_beams", getattr(config, "num_beams", 1)) or 1
    if beams > 1:
        raise ValueError(f"num_beams: beam search is not supported with two streams, got {beams}")

    def decode(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        processing = (logits_processor, stopping_criteria, generation_config)
        return _decode(two_streams, weights, streamer, input_ids, *processing, model_kwargs)

    two_streams = model
    was_training = model.training
    model.eval()
    try:
        return cast(Any, model.hf_model).generate(
            input_ids,
            attention_mask=attention_mask,
            custom_generate=decode,
            **generation_kwargs,
        )
    finally:
        model.train(was_training)


class _Stream:
    """One stream with its cache, advanced by the new tokens of each step."""

    def __init__(self, model: "QAdapterModel", adapter_on: bool, cache: Any) -> None:
        self.model, self.adapter_on, self.cache = model, adapter_on, cache
        parameters = inspect.signature(model.hf_model.forward).parameters
        self.takes_positions = "position_ids" in parameters
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}

    def step(self, input_ids: Tensor, attention_mask: Tensor, seen: int) -> Tensor:
        """Logits [B, V] after ``input_ids``, of which the first ``seen`` columns are cached."""
        start = seen if self.cache is not None else 0
        arguments: dict[str, Any] = {"attention_mask": attention_mask, **self.last_only}
        if self.takes_positions:
            # Left padding: a token's position counts the real tokens before it.
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            arguments["position_ids"] = positions[:, start:]
        if self.cache is not None:
            arguments["past_key_values"] = self.cache
        arguments["use_cache"] = self.cache is not None
        input_ids = input_ids[:, start:]
        if self.adapter_on:
            outputs = self.model.hf_model(input_ids=input_ids, **arguments)
        else:
            with self.model.adapter_off():
                outputs = self.model.hf_model(input_ids=input_ids, **arguments)
        return outputs.logits[:, -1]


def _decode(
    model: "QAdapterModel",
    weights: StreamWeights,
    streamer: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
) -> Any:
    cache = model_kwargs.get("past_key_values") if model_kwargs.get("use_cache", True) else None
    q_stream = _Stream(model, True, cache) if weights.q != 0 else None
    # Two streams need two caches: their keys and values differ wherever LoRA is on k or v.
    base_cache = copy.deepcopy(cache) if q_stream is not None else cache
    base_stream = _Stream(model, False, base_cache) if weights.base != 0 else None

    attention_mask = model_kwargs.get("attention_mask")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    pad = generation_config._pad_token_tensor
    has_eos = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    wants_dict = generation_config.return_dict_in_generate
    scores: tuple[Tensor, ...] = ()
    logits: tuple[Tensor, ...] = ()
    if streamer is not None:
        streamer.put(input_ids.cpu())

    unfinished = torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    seen = 0
    while True:
        step = (input_ids, attention_mask, seen)
        z_q = q_stream.step(*step) if q_stream is not None else None
        z_b = base_stream.step(*step) if base_stream is not None else None
        seen = input_ids.shape[1]
        composed = compose(z_b, z_q, weights)
        processed = logits_processor(input_ids, composed)
        if wants_dict:
            scores += (processed,) if generation_config.output_scores else ()
            logits += (composed.clone(),) if generation_config.output_logits else ()
        if generation_config.do_sample:
            tokens = torch.multinomial(torch.softmax(processed, -1), num_samples=1).squeeze(1)
        else:
            tokens = processed.argmax(-1)
        if has_eos:
            tokens = torch.where(unfinished, tokens, pad)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(tokens), 1)], dim=1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        unfinished &= ~stopping_criteria(input_ids, scores)
        if not unfinished.any():
            break
    if streamer is not None:
        streamer.end()
    if not wants_dict:
        return input_ids
    return GenerateDecoderOnlyOutput(
        sequences=cast(Any, input_ids),
        scores=cast(Any, scores or None),
        logits=cast(Any, logits or None),
        past_key_values=cache,
    )


def encode_prompts(
    tokenizer: Any, prompts: Sequence[str], system: str | None, chat: bool, device: Any
) -> dict[str, Any]:
    """Left-padded input_ids and attention_mask of prompts, in the chat template if there is one."""
    texts = list(prompts)
    has_template = chat and tokenizer.chat_template is not None
    if has_template:
        first = [{"role": "system", "content": system}] if system else []
        texts = [
            tokenizer.apply_chat_template(
                [*first, {"role": "user", "content": prompt}],
                tokenize=False,
                add_generation_prompt=True,
            )
            for prompt in prompts
        ]
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    # A template writes its own BOS.
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=not has_template)
    return {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
