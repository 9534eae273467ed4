"""A question answered by base and policy, and how much the adapter changed each token's odds."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from qadapter.composition import blend
from qadapter.model import locking
from qadapter.model.streams import evaluating
from qadapter.text.answers import answer

HALF = "\ufffd"  # what a character decodes to of which tokens are missing


class Compared(NamedTuple):
    """An answer, token by token.

    Attributes:
        pieces: text, and log p_policy - log p_base of its tokens, in nats. Tokens that share a
            character make one piece.
        end: the same of the token that ended the answer, None where something else did.
        finish_reason: eos, stop or length.
    """

    pieces: list[tuple[str, float]]
    end: float | None
    finish_reason: str

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces)


def compare(
    model: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    *,
    strength: float,
    adapters: Mapping[str, float] | None = None,
    seed: int | None = None,
    **arguments: Any,
) -> tuple[Compared, Compared]:
    """The answers of base and policy to one prompt (token ids), drawn with the same noise.

    Args:
        model: a `QAdapterModel`.
        strength: of the policy.
        adapters: weights by name, as `generate` takes them.
        seed: of both answers; None where they are greedy.
        arguments: for `answer`.

    Raises:
        ValueError: what `generate` refuses.
    """
    if adapters is not None:
        arguments["adapters"] = adapters
    seeds = None if seed is None else [seed, seed]
    made = answer(
        model, tokenizer, [prompt, prompt], seeds=seeds, strength=[0.0, strength], **arguments
    )
    compared = []
    for one in made:
        nats = changes(model, prompt, one.ids, strength, adapters)
        texts = _texts(tokenizer, one.ids)
        compared.append(in_pieces(texts, nats, one.finish_reason, len(one.text)))
    base, policy = compared
    return base, policy


def in_pieces(
    texts: Sequence[str], nats: Sequence[float], finish_reason: str, length: int
) -> Compared:
    """Of what each token adds to the text, "" where a later one completes its character.

    Args:
        texts, nats: one each a token.
        finish_reason: eos where the last token is the one that ends answers.
        length: characters of the answer, which ends where a stop string begins.
    """
    end = nats[-1] if finish_reason == "eos" else None
    pieces: list[tuple[str, float]] = []
    waiting, left = 0.0, length
    for text, change in zip(texts, nats if end is None else nats[:-1], strict=False):
        waiting += change
        if text and left > 0:
            pieces.append((text[:left], waiting))
            waiting, left = 0.0, left - len(text)
    return Compared(pieces, end, finish_reason)


def _texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    texts, shown = [], ""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count], skip_special_tokens=True)
        if text.endswith(HALF) and count < len(ids):
            text = shown
        texts.append(text[len(shown) :])
        shown = text
    return texts


@torch.no_grad()
def changes(
    model: Any,
    prompt: Sequence[int],
    answer: Sequence[int],
    strength: float,
    adapters: Mapping[str, float] | None = None,
) -> list[float]:
    """log p_policy - log p_base of each token of an answer, in nats, whatever it was drawn by.

    Raises:
        ValueError: adapters or a strength that do not fit.
    """
    counted, counts = blend(model.compositions, 1, strength, adapters=adapters)
    weights = dict(zip(counted, counts[:, 0].tolist(), strict=True))
    names = (None, *(name for name in counted if name is not None))
    hf_model = model.hf_model
    ids = torch.tensor([[*prompt, *answer]], device=model.device)
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if "logits_to_keep" in inspect.signature(hf_model.forward).parameters:
        inputs["logits_to_keep"] = len(answer) + 1
    mixed: Any = 0.0
    with locking.alone(hf_model), evaluating(model.peft_model):
        streams = model.streams(names)
        for name in names:
            with streams.only(name):
                logits = hf_model(**inputs).logits[0, -len(answer) - 1 : -1].float()
            if name is None:
                base = logits
            if name in weights:
                mixed = mixed + weights[name] * logits
    never = base == float("-inf")  # tokens that no stream gives
    of_policy = mixed.masked_fill(never, float("-inf")).log_softmax(-1)
    moved = of_policy - base.log_softmax(-1)
    return moved.gather(1, ids[0, len(prompt) :, None])[:, 0].tolist()
