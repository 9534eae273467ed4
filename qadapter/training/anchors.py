"""Anchors in training: texts on which KL(base || policy) is held down, and the coefficient of that.

What the loss needs of the base in an anchor's states (`QF.base_moments`) never changes: it is
computed once and kept in one file beside the base cache. A tenth of the anchors is never trained
on; the KL that is reported and held to a budget is theirs.
"""

import hashlib
import itertools
import json
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from qadapter import files
from qadapter.model.checkpoint import check_same_base
from qadapter.outputs import BaseMoments
from qadapter.text.anchors import Anchor, PromptTooLongError, tokenize_anchor

logger = logging.getLogger(__name__)

HELD_OUT = 10  # one of so many anchors is never trained on
BATCH_TOKENS = 2048


def anchor_texts(
    rows: Iterable[dict[str, Any]],
    tokenizer: Any,
    *,
    max_length: int,
    eos_token_ids: list[int],
    base: dict[str, Any] | None = None,
) -> list[Anchor]:
    """Tokenised anchors; rows whose prompt fills ``max_length`` are left out and counted.

    Args:
        base: fingerprint of the model's base, which rows that a base made carry too.

    Raises:
        ValueError: rows made by another base; a row that cannot be used, named; less than two left.
    """
    made, long = [], 0
    for index, row in enumerate(rows):
        if base is not None and row.get("base") is not None:
            _check_base(row["base"], base, index)
        options: dict[str, Any] = {"max_length": max_length, "eos_token_ids": eos_token_ids}
        try:
            made.append(tokenize_anchor(row, tokenizer, **options, index=index))
        except PromptTooLongError:
            long += 1
    if long:
        logger.warning("Left out %d anchors: prompt of %d tokens or more.", long, max_length)
    if len(made) < 2:
        raise ValueError(
            f"anchors: expected at least 2 (one is held out of training), got {len(made)}"
        )
    return made


def _check_base(then: dict[str, Any], now: dict[str, Any], index: int) -> None:
    if then == now:
        return
    try:
        check_same_base(then, now, "that made it", "this one")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"anchor {index}: made by another base ({error}): make new ones (qadapter anchors), or "
            "leave out the field `base` to take them as any other text"
        ) from None


class AnchorSet:
    """Tokenised anchors and, once `compute` was called, the base's moments in their states.

    Not of a base that does more to its logits than one head on the last hidden state: its KL is
    summed over logits, and needs none.
    """

    def __init__(self, anchors: Sequence[Anchor]) -> None:
        self.anchors = list(anchors)
        held = set(range(HELD_OUT - 1, len(self.anchors), HELD_OUT)) or {len(self.anchors) - 1}
        self.held_out = sorted(held)
        self.trained = [i for i in range(len(self.anchors)) if i not in held]
        # Of `BaseMoments`, and the base's hidden states, in all states of all anchors. A base pass
        # in another batch rounds in another way, which is a KL of its own in 16 bits: where the
        # base's hidden states are needed with its moments, they are these.
        self.fields: dict[str, Tensor] = {}
        ends = torch.tensor([0, *(a.states for a in self.anchors)]).cumsum(0).tolist()
        self._slices = [slice(*pair) for pair in itertools.pairwise(ends)]

    def of_pair(self, index: int, per_pair: float) -> list[int]:
        """Which anchors go with a pair, so that all are trained on equally often."""
        first, stop = (math.floor(i * per_pair + 1e-9) for i in (index, index + 1))
        return [self.trained[i % len(self.trained)] for i in range(first, stop)]

    def batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """The moments of some anchors, one after the other."""
        parts = [self._slices[number] for number in numbers]
        return {n: torch.cat([field[part] for part in parts]) for n, field in self.fields.items()}

    # The file.

    def compute(
        self,
        model: Any,
        collate: Callable[..., dict[str, Any]],
        directory: Path,
        identity: dict[str, Any],
        progress: bool = True,
    ) -> Path:
        """Read the moments from ``directory``, or compute and write them there.

        Args:
            model: a `QAdapterModel`, under the autocast of training.
            collate: the collator of training.
            identity: of the base (`base_identity.identity`), which the values hold for.

        Raises:
            ValueError: a file that is damaged, named; moments that are not finite.
        """
        ids = [[*anchor.ids, -anchor.first] for anchor in self.anchors]
        what = json.dumps([identity, ids], sort_keys=True)
        key = hashlib.blake2b(what.encode(), digest_size=8).hexdigest()
        path = directory / f"anchors-{key}.safetensors"
        if path.exists():
            self.fields = _read(path, self._slices[-1].stop)
            return path
        order = sorted(range(len(self.anchors)), key=lambda i: -len(self.anchors[i].ids))
        found: dict[int, dict[str, Tensor]] = {}
        with tqdm(total=len(order), desc="Anchors", unit="anchor", disable=not progress) as bar:
            while order:
                longest = len(self.anchors[order[0]].ids)
                part = order[: max(1, BATCH_TOKENS // longest)]
                order = order[len(part) :]
                made = self._computed(model, collate, part)
                at = 0
                for number in part:
                    stop = at + self.anchors[number].states
                    found[number] = {name: value[at:stop] for name, value in made.items()}
                    at = stop
                bar.update(len(part))
        self.fields = {
            name: torch.cat([found[i][name] for i in range(len(self.anchors))]).contiguous()
            for name in found[0]
        }
        if not self.fields["mean_logit"].isfinite().all():
            raise ValueError("anchors: moments that are not finite; do the base's logits overflow?")
        with files.replacing_file(path) as temporary:
            save_file(self.fields, temporary, {"identity": json.dumps(identity)})
        return path

    def _computed(
        self, model: Any, collate: Callable[..., Any], numbers: list[int]
    ) -> dict[str, Tensor]:
        batch = on_device(collate([], [self.anchors[i] for i in numbers]), model.device)
        moments, hidden = model.base_moments(batch)
        made = dict(zip(BaseMoments._fields, moments, strict=True)) | {"hidden": hidden}
        return {name: value.cpu() for name, value in made.items()}


def _read(path: Path, states: int) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it") from error
    if not {*BaseMoments._fields, "hidden"} <= found.keys() or any(
        len(v) != states for v in found.values()
    ):
        raise ValueError(f"{path} does not hold the moments of {states} states; delete it")
    return found


def on_device(batch: Any, device: Any) -> Any:
    """A collated batch on another device."""
    if isinstance(batch, dict):
        return {name: on_device(value, device) for name, value in batch.items()}
    return batch.to(device) if isinstance(batch, Tensor) else batch


class AnchoredCollator:
    """A collator whose batches hold the anchors of their pairs behind the pairs."""

    def __init__(self, collate: Callable[..., dict[str, Any]], anchors: AnchorSet) -> None:
        self.collate, self.anchors = collate, anchors

    def __call__(self, features: list[Any]) -> dict[str, Any]:
        of_pairs = [list(f.get("anchors", ())) for f in features]
        batch = self.with_anchors(features, [n for numbers in of_pairs for n in numbers])
        if "anchors" in batch:
            anchors = self.anchors.anchors
            states = [0, *(sum(anchors[n].states for n in numbers) for numbers in of_pairs)]
            batch["anchors"]["ends"] = torch.tensor(states).cumsum(0)
        return batch

    def with_anchors(self, features: list[Any], numbers: list[int]) -> dict[str, Any]:
        if not numbers:
            return self.collate(features)
        batch = self.collate(features, [self.anchors.anchors[number] for number in numbers])
        batch["anchors"] |= self.anchors.batch(numbers)
        return batch


class AnchorControl:
    """The coefficient of the anchors' KL: fixed, or by dual ascent on a budget.

    coef <- coef * exp(rate * (KL / budget - 1)), KL a running mean over held-out anchors: the
    adaptive KL controller of PPO (Ziegler et al., arXiv 1909.08593, section 2.2) on its logarithm.

    Args:
        coef: the fixed coefficient; with a budget where it begins, and the least that it becomes.
            0 with a budget: it begins at 1 and may fall to 1/1000, where a budget that is not used
            up leads it.
        budget: nats a token; None for a fixed coefficient.
    """

    RATE, CLIP, MEMORY = 0.2, 1.5, 0.8
    LIMITS = (1e-3, 1e3)

    def __init__(self, coef: float, budget: float | None) -> None:
        self.budget = budget
        self.coef, self.least = coef or 1.0, coef or self.LIMITS[0]
        self.kl: float | None = None

    def measured(self, kl: float) -> None:
        """Take in a new measurement of KL, in nats a token."""
        self.kl = kl if self.kl is None else self.MEMORY * self.kl + (1 - self.MEMORY) * kl
        if self.budget is not None:
            error = min(self.kl / self.budget - 1.0, self.CLIP)
            raised = self.coef * math.exp(self.RATE * error)
            self.coef = min(max(raised, self.least), max(self.LIMITS[1], self.least))

    def state(self) -> dict[str, float | None]:
        return {"coef": self.coef, "kl": self.kl}

    def load(self, state: dict[str, Any]) -> None:
        self.coef, self.kl = state["coef"], state["kl"]


__all__ = [
    "AnchorControl",
    "AnchorSet",
    "AnchoredCollator",
    "anchor_texts",
    "on_device",
]
