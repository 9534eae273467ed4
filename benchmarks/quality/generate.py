"""Greedy answers of a policy."""

from collections.abc import Sequence
from typing import Any

from benchmarks.quality.data import batches_by_length
from qadapter import QAdapterModel
from qadapter.composition import StreamWeights
from qadapter.text.answers import answer
from qadapter.text.prompts import prompt_ids

AT_A_TIME = 16


def answers(
    model: QAdapterModel,
    tokenizer: Any,
    prompts: Sequence[Any],
    blend: StreamWeights,
    new_tokens: int,
) -> list[str]:
    """One a prompt."""
    knobs = {"strength": 0.0}  # the base has no alphas (1/0)
    if blend.q != 0.0:
        knobs = {"alpha_0": blend.base / blend.q + model.center, "alpha_tilde": 1.0 / blend.q}
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    texts = [""] * len(ids)
    for part in batches_by_length([len(row) for row in ids], AT_A_TIME):
        given = [ids[i] for i in part]
        made = answer(model, tokenizer, given, max_new_tokens=new_tokens, do_sample=False, **knobs)
        for i, item in zip(part, made, strict=True):
            texts[i] = item.text.strip()
    return texts
