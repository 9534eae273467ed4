"""How the strength of each request reaches the forward, by both of vLLM's model runners.

V1 (the CPU's): a logits processor that leaves the logits alone. vLLM tells it of every request that
enters, moves in or leaves the batch, before the forward of the same step.
V2 (CUDA's): a `ModelState`, which hands the forward an argument of its own. The processor validates
requests there and no more.

What reaches the forward is float32 [tokens, streams]: what the logits of each stream count. Tokens
of a step lie request by request, in the order of the batch.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor as V1Processor
from vllm.v1.sample.logits_processor import MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2Processor

from qadapter.model.serving import Settings, checked_strength

NAME = "strength"


def requested(params: SamplingParams | None) -> float | None:
    """The strength that a request names, None if it names none. ValueError for what is none."""
    arguments = (params and params.extra_args) or {}
    return checked_strength(arguments[NAME]) if NAME in arguments else None


def by_token(rows: Tensor, starts: Tensor, tokens: int) -> Tensor:
    """One row a token of one a request.

    Args:
        rows: [requests, streams].
        starts: int [requests + 1 or more], where the tokens of each request begin; what is behind
            the last request's end repeats that end.
        tokens: how many; those of padding get some request's row.
    """
    at = torch.arange(tokens, device=starts.device, dtype=starts.dtype)
    request = torch.searchsorted(starts[1:].contiguous(), at, right=True)
    return rows[request.clamp(max=starts.shape[0] - 2)]


class RequestStrength(V1Processor, V2Processor):
    """A processor of either runner, as both must find one in the same entry point. It is made in
    every engine, of other models too, and does nothing there."""

    newest: "RequestStrength | None" = None
    """Of this process: the V1 runner makes it before the model, which has no other way to it."""

    rows: Tensor
    """float32 [max_num_seqs, streams], by the rows of the batch; always the same storage."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool = False) -> None:
        # The V2 runner passes its request states in the place of a device.
        settings = Settings.from_config(vllm_config.model_config.hf_config)
        self._settings = settings if isinstance(device, str | torch.device) else None
        if settings is None or self._settings is None:
            return
        count = vllm_config.scheduler_config.max_num_seqs
        self._host = torch.tensor([settings.stream_weights(None)]).repeat(count, 1)
        self.rows = self._host.to(device, copy=True)
        RequestStrength.newest = self

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        requested(sampling_params)

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        return logits

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """V2: whether the logits of this request are to be processed."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """V1: a row of a request that has ended keeps its weights, which nobody reads."""
        if batch_update is None or self._settings is None:
            return
        host = self._host
        for row, params, *_ in batch_update.added:
            host[row] = torch.tensor(self._settings.stream_weights(requested(params)))
        for source, target, direction in batch_update.moved:
            if direction is MoveDirectionality.SWAP:
                host[[source, target]] = host[[target, source]]
            else:
                host[target] = host[source]
        self.rows.copy_(host)


def weights_of_batch(tokens: int) -> Tensor:
    """Under the V1 runner, inside the forward: [tokens, streams] of this step's batch."""
    processor = RequestStrength.newest
    if processor is None:
        raise RuntimeError("no logits processor was made: are vLLM's plug-ins of qadapter found?")
    metadata: Any = get_forward_context().attn_metadata
    if not metadata:  # profiling and warm-up, whose output nobody reads
        return processor.rows[:1].expand(tokens, -1)
    return by_token(processor.rows, next(iter(metadata.values())).query_start_loc, tokens)


def model_state() -> type:
    """The V2 runner's class, made here as its base imports what that runner alone needs."""
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    class StrengthState(DefaultModelState):
        """Adds ``stream_weights`` to the forward's arguments, always out of the same storage, as a
        CUDA graph reads what was there when it was captured."""

        def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: Any) -> None:
            super().__init__(vllm_config, model, encoder_cache, device)
            settings = Settings.from_config(vllm_config.model_config.hf_config)
            assert settings is not None
            self._settings: Settings = settings
            default = torch.tensor([settings.stream_weights(None)], device=device)
            self._slots = default.repeat(self.max_num_reqs, 1)
            self._tokens = default.repeat(self.max_num_tokens, 1)

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            weights = self._settings.stream_weights(requested(new_req_data.sampling_params))
            self._slots[req_index] = torch.tensor(weights)

        def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
            tokens = input_batch.num_tokens_after_padding
            starts = input_batch.query_start_loc[: input_batch.num_reqs + 1]
            rows = self._slots[input_batch.idx_mapping[: input_batch.num_reqs]]
            self._tokens[:tokens] = by_token(rows, starts, tokens)
            return super().prepare_inputs(input_batch, req_states) | self._argument(tokens)

        def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
            return super().prepare_dummy_inputs(num_reqs, num_tokens) | self._argument(num_tokens)

        def _argument(self, tokens: int) -> dict[str, Tensor]:
            return {"stream_weights": self._tokens[:tokens]}

    return StrengthState
