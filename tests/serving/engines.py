"""Engines of vLLM in this process, one at a time, and what their answers must be."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

# Before vLLM is imported. In one process its modules are imported once for all engines.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import torch
from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

from qadapter.integrations.vllm import engine_arguments

NEAR = 2e-4
"""Nats between float32 here and there; a wrong stream or strength is off by whole nats."""


@contextmanager
def engine(adapter: Any, *, served: dict[str, Any] | None = None, **options: Any) -> Iterator[LLM]:
    """Serve adapters in float32; ``served`` goes to `engine_arguments`, the rest to vLLM."""
    with plain_engine(**engine_arguments(adapter, **(served or {})), **options) as llm:
        yield llm


@contextmanager
def plain_engine(**options: Any) -> Iterator[LLM]:
    """Any model of vLLM's in float32."""
    settings = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 128,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 1 << 28,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
        "seed": 0,
        **options,
    }
    llm = None
    try:
        llm = LLM(**settings)
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
            del llm
        cleanup_dist_env_and_memory()


def refused(adapter: Any, **arguments: Any) -> str:
    """What an engine that does not start prints, in a process of its own: in one where an engine
    has failed, vLLM cannot start another."""
    code = (
        "import json, sys; from tests.serving.engines import engine; "
        "engine(**json.loads(sys.argv[1])).__enter__()"
    )
    given = json.dumps({"adapter": str(adapter), **arguments})
    command = [sys.executable, "-c", code, given]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode != 0
    return ended.stderr


class Request(NamedTuple):
    prompt: list[int]
    strength: float | None
    tokens: int


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(3, 97, (length,), generator=generator).tolist()


def ask(llm: LLM, requests: list[Request], lora_request: Any = None, **options: Any) -> list[Any]:
    """The answers, in order, with log-probabilities of what was sampled."""
    params = [
        SamplingParams(
            **{"temperature": 0.0, "logprobs": 0, "detokenize": False, "ignore_eos": True}
            | {"max_tokens": tokens}
            | ({} if strength is None else {"extra_args": {"strength": strength}})
            | options
        )
        for _, strength, tokens in requests
    ]
    prompts = [{"prompt_token_ids": request.prompt} for request in requests]
    return llm.generate(prompts, params, use_tqdm=False, lora_request=lora_request)


def check(model: Any, requests: list[Request], answers: list[Any], **generate: Any) -> None:
    """Greedy tokens are those of ``model.generate``, log-probabilities those of the logits of the
    two streams."""
    assert len(answers) == len(requests)
    for request, answer in zip(requests, answers, strict=True):
        ids = torch.tensor([request.prompt])
        options = {"max_new_tokens": request.tokens, "do_sample": False, **generate}
        made = model.generate(ids, strength=request.strength, **options)
        (got,) = answer.outputs
        assert list(got.token_ids) == made[0, ids.shape[1] :].tolist(), request
        if not generate:
            check_logprobs(model, request, got)


def check_logprobs(model: Any, request: Request, got: Any) -> None:
    """Of the tokens that were sampled, whichever these are."""
    logp = policy(model, request.prompt + list(got.token_ids), request.strength)
    for at, token in enumerate(got.token_ids, start=len(request.prompt)):
        there = got.logprobs[at - len(request.prompt)][token].logprob
        assert abs(there - float(logp[at - 1, token])) < NEAR


@torch.no_grad()
def policy(model: Any, ids: list[int], strength: float | None) -> torch.Tensor:
    """Log-probabilities [T, V] in float64, of two forwards of the whole sequence."""
    base, q = (logits.double() for logits in model(torch.tensor([ids])))
    if strength is None:
        blend = (q + (model.alpha_0 - model.center) * base) / model.alpha_tilde
    else:
        blend = strength * q + (1.0 - model.center * strength) * base
    return blend.log_softmax(-1)
