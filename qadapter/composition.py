"""How streams are composed: from alphas, strengths and adapters to what each stream's logits count.

    policy = softmax((sum_i w_i Q_i + alpha_0 log pi_base) / alpha_tilde),   Q_i = z_i - center z_b
           = softmax((sum_i w_i z_i + (alpha_0 - sum_i w_i center_i) z_b) / alpha_tilde)

    alpha_0, alpha_tilde:  as trained, or as given
    strength s:            alpha_0 = alpha_tilde = 1 / s: pi ~ pi_base * exp(s sum_i w_i Q_i),
                           s = 0 is the base
    adapters:              the w_i; one adapter with weight 1 if nothing is said

All three may differ from row to row. A stream that counts 0 in every row need not run.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qadapter.ops import checks

__all__ = [
    "RECOMMENDED",
    "Composition",
    "Names",
    "PerRow",
    "StreamWeights",
    "blend",
    "recommended",
    "stream_weights",
]

RECOMMENDED = "recommended"
"""In place of a strength: the one that training with a KL budget found."""

Names = tuple[str | None, ...]
"""Streams by their adapters; None is the base."""

PerRow = float | Sequence[float] | Tensor


class Composition(NamedTuple):
    """Weights of the policy, as trained and saved with an adapter."""

    alpha_0: float = 1.0
    alpha_tilde: float = 1.0
    center: float = 1.0

    @staticmethod
    def checked(alpha_0: float, alpha_tilde: float, center: float) -> "Composition":
        """ValueError for what is no composition; a warning where the policy starts far from the
        base."""
        composition = Composition(*checks.composition(alpha_0, alpha_tilde, center))
        power = composition.alpha_0 / composition.alpha_tilde
        if composition.center == 1.0 and not 0.5 <= power <= 2.0:
            warnings.warn(
                f"center=1 with alpha_0={composition.alpha_0:g} and "
                f"alpha_tilde={composition.alpha_tilde:g}: the policy starts at the base raised to "
                f"the power alpha_0/alpha_tilde, {power:g}, far from the base; keep the two close "
                "and set the size of Q by bt_scale, or use center=0",
                stacklevel=4,
            )
        return composition


class StreamWeights(NamedTuple):
    """What the logits of the adapter and of the base count in the policy's logits."""

    q: float
    base: float


def stream_weights(
    trained: tuple[float, float, float],
    strength: float | None = None,
    alpha_0: float | None = None,
    alpha_tilde: float | None = None,
) -> StreamWeights:
    """The weights of z_q and z_b in the policy's logits, for one adapter.

    Args:
        trained: its alpha_0, alpha_tilde and center (`Composition`).
        strength: 0 (the base) or more, in place of the two alphas.
        alpha_0, alpha_tilde: None takes the trained value.

    Raises:
        ValueError: a value that does not fit, or strength beside an alpha.
    """
    trained_0, a_t, center = trained
    if strength is not None:
        if alpha_0 is not None or alpha_tilde is not None:
            raise ValueError(
                "strength sets alpha_0 and alpha_tilde: give strength, or the two, not both; got "
                f"strength={strength!r}, alpha_0={alpha_0!r}, alpha_tilde={alpha_tilde!r}"
            )
        s = checks.number("strength", strength)
        if s < 0:
            raise ValueError(f"strength: expected 0 (the base) or more, got {strength!r}")
        return StreamWeights(s, 1.0 - center * s)
    a_0 = trained_0 if alpha_0 is None else checks.number("alpha_0", alpha_0)
    if alpha_tilde is not None:
        a_t = checks.number("alpha_tilde", alpha_tilde, above=0.0)
    return StreamWeights(1.0 / a_t, (a_0 - center) / a_t)


def _rows(name: str, value: PerRow | None, batch: int) -> list[Any]:
    """A number for every row, or None for every row."""
    if isinstance(value, Tensor):
        value = value.tolist() if value.ndim else value.item()
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [value] * batch
    if len(value) != batch:
        raise ValueError(
            f"{name}: expected a number or one for each of the {batch} rows of input_ids, got "
            f"{len(value)}"
        )
    return list(value)


def blend(
    trained: Mapping[str, tuple[float, float, float]],
    batch: int,
    strength: PerRow | None = None,
    alpha_0: PerRow | None = None,
    alpha_tilde: PerRow | None = None,
    adapters: Mapping[str, PerRow] | None = None,
) -> tuple[Names, Tensor]:
    """The streams that count, and float64 [streams, batch], what their logits count in each row.

    Args:
        trained: alpha_0, alpha_tilde and center of each adapter there is, the model's own first.
        batch: how many rows.
        strength, alpha_0, alpha_tilde: a number, or one for each row.
        adapters: weights by name, each a number or one for each row.

    Raises:
        ValueError: what does not fit, named.
    """
    own, own_alphas = next(iter(trained)), next(iter(trained.values()))
    given: Mapping[str, PerRow] = {own: 1.0} if adapters is None else adapters
    if not isinstance(given, Mapping) or not given:
        raise ValueError(f"adapters: expected weights by adapter name, got {adapters!r}")
    for name in given:
        if name not in trained:
            known = ", ".join(trained)
            raise ValueError(f"adapters: no adapter is named {name!r}, there are: {known}")
    left_out = strength is None and (alpha_0 is None or alpha_tilde is None)
    if left_out and len({trained[name][:2] for name in given}) > 1:
        raise ValueError(
            "alpha_0: these adapters were trained with different alpha_0 and alpha_tilde; give "
            "strength, or both of them"
        )
    first = trained[next(iter(given))]
    table = {name: _rows(f"adapters[{name!r}]", w, batch) for name, w in given.items()}
    knobs = zip(
        _rows("strength", strength, batch),
        _rows("alpha_0", alpha_0, batch),
        _rows("alpha_tilde", alpha_tilde, batch),
        strict=True,
    )
    columns = []
    for row, (s, a_0, a_t) in enumerate(knobs):
        stream_weights(own_alphas, s, a_0, a_t)  # checks the values
        w = {name: checks.number(f"adapters[{name!r}]", table[name][row]) for name in given}
        centers = sum(w[name] * trained[name][2] for name in given)
        if s is not None:
            base, scale = 1.0 - s * centers, float(s)
        else:
            scale = 1.0 / (first[1] if a_t is None else a_t)
            base = ((first[0] if a_0 is None else a_0) - centers) * scale
        columns.append([base, *(scale * w[name] for name in given)])
    weights = torch.tensor(columns, dtype=torch.float64).reshape(batch, -1).T
    counts = (weights != 0).any(1).tolist()
    names: Names = (None, *given)
    if not any(counts):
        return (None,), weights[:1]
    kept = [i for i, counted in enumerate(counts) if counted]
    return tuple(names[i] for i in kept), weights[kept]


def recommended(
    strength: str,
    found: float | None,
    own: str,
    adapters: Mapping[str, PerRow] | None,
) -> float:
    """The strength that training has ``found``, where "recommended" is asked for. ValueError for
    another word, where there is none, and where ``adapters`` are more than ``own`` with weight 1.
    """
    if strength != RECOMMENDED:
        raise ValueError(f"strength: expected a number or {RECOMMENDED!r}, got {strength!r}")
    if adapters is not None:
        weight = adapters.get(own)
        if len(adapters) > 1 or not isinstance(weight, int | float) or weight != 1:
            raise ValueError(
                f"strength: {RECOMMENDED!r} is of the model's own adapter alone, with weight 1; "
                f"got adapters={dict(adapters)!r}"
            )
    if found is None:
        raise ValueError(
            f"strength: {RECOMMENDED!r}, but the adapter has no recommended strength; training "
            "with a kl_budget finds one"
        )
    return found
