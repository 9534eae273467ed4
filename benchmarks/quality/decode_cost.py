"""What a generated token costs: the base alone, one stream with the LoRA, both streams."""

from typing import Any

import torch

from benchmarks import harness
from benchmarks.quality import generate, score
from benchmarks.quality.study import BASE, Study
from qadapter import files

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
    path = study.output / "decode.json"
    if path.exists():
        return files.read_json(path)
    model = study._model({**study.set.usual, "seed": 0})
    prompts = study.prompts[:PROMPTS]
    # No end of text, so that every way makes as many tokens.
    eos, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    tokenizer = _Endless(study.tokenizer)

    def timed(blend: score.Blend, tokens: int) -> Any:
        return lambda: generate.answers(model, tokenizer, prompts, blend, tokens)

    functions = {
        f"{way} {tokens}": timed(blend, tokens)
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
    record = {
        "batch": len(prompts),
        "threads": torch.get_num_threads(),
        "rows": [
            {"way": way, "ms_per_token": value, "times_base": value / ms["base alone"]}
            for way, value in ms.items()
        ],
    }
    files.write_json(path, record)
    return record


class _Endless:
    """A tokenizer that names no end token."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self.eos_token_id = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._tokenizer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)
