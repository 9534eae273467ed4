"""Greedy answers of a policy, and whether short questions are answered right."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from benchmarks.quality.score import Blend
from benchmarks.quality.tasks import Question
from qadapter import QAdapterModel
from qadapter.text.answers import answer
from qadapter.text.prompts import prompt_ids

AT_A_TIME = 16
QUESTION_TOKENS = 8


@contextmanager
def as_blend(model: QAdapterModel, blend: Blend) -> Iterator[None]:
    """Inside, what the model generates by default is softmax(q * z_q + base * z_b)."""
    before = (model.alpha_0, model.alpha_tilde, model.center)
    # alpha_tilde = 1/q; with center 0 the base counts alpha_0 / alpha_tilde.
    model.alpha_0, model.alpha_tilde, model.center = blend.base / blend.q, 1 / blend.q, 0.0
    try:
        yield
    finally:
        model.alpha_0, model.alpha_tilde, model.center = before


def answers(
    model: QAdapterModel,
    tokenizer: Any,
    prompts: Sequence[Any],
    blend: Blend,
    new_tokens: int,
) -> list[str]:
    """One a prompt; a blend with q = 0 is the base."""
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    texts = [""] * len(ids)
    arguments: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False}
    for start in range(0, len(order), AT_A_TIME):
        part = order[start : start + AT_A_TIME]
        given = [ids[i] for i in part]
        if blend.q == 0.0:
            made = answer(model, tokenizer, given, strength=0.0, **arguments)
        else:
            with as_blend(model, blend):
                made = answer(model, tokenizer, given, **arguments)
        for i, item in zip(part, made, strict=True):
            texts[i] = item.text.strip()
    return texts


def ask(
    model: QAdapterModel, tokenizer: Any, questions: Sequence[Question], blend: Blend
) -> list[str]:
    prompts = [question.messages() for question in questions]
    return answers(model, tokenizer, prompts, blend, QUESTION_TOKENS)
