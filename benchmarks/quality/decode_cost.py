"""What a generated token costs: the base alone, one stream with the LoRA, both streams."""

import copy
from functools import partial
from typing import Any

import torch

from benchmarks import harness
from benchmarks.quality import generate, score
from benchmarks.quality.study import BASE, Study, cached

PROMPTS = 8
SHORT, LONG = 8, 40
WAYS = {
    "base alone": BASE,
    "strength 1 (one stream)": score.strength(1.0),
    "strength 0.5 (two streams)": score.strength(0.5),
    "released weights (two streams)": score.trained(0.01, 1.0, 0.0),
}


def decode_cost(study: Study, rounds: int = 3) -> dict[str, Any]:
    """Milliseconds a token of a batch, without the prompt: the longer answer less the shorter."""
    return cached(study.output / "decode.json", lambda: _measured(study, rounds))


def _measured(study: Study, rounds: int) -> dict[str, Any]:
    model, prompts = study.model(), study.prompts[:PROMPTS]
    # No end of text, so that every way makes as many tokens.
    eos, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    tokenizer = copy.deepcopy(study.tokenizer)
    tokenizer.eos_token = None
    functions = {
        f"{way} {tokens}": partial(generate.answers, model, tokenizer, prompts, blend, tokens)
        for way, blend in WAYS.items()
        for tokens in (SHORT, LONG)
    }
    try:
        times = harness.interleaved(functions, rounds=rounds, least=rounds, warmup=1, settle_ms=0.0)
    finally:
        model.generation_config.eos_token_id = eos
    ms = {
        way: (times[f"{way} {LONG}"].median - times[f"{way} {SHORT}"].median) / (LONG - SHORT)
        for way in WAYS
    }
    base = ms["base alone"]
    rows = [{"way": way, "ms_per_token": v, "times_base": v / base} for way, v in ms.items()]
    return {"batch": len(prompts), "threads": torch.get_num_threads(), "rows": rows}
