"""Sampling one token per row from the composed policy.

Draws come from Philox4x32-10 keyed by the row's seed and counted by its position, so that a
row's token depends on (seed, position, distribution) alone: not on the batch around it, nor on what
was drawn before.
"""

import math
from typing import Any

import torch
from torch import Tensor

from qadapter import _checks, ops_sample  # noqa: F401  (registers torch.ops.qadapter.sample)
from qadapter._torch_sample import first_key, philox_4x32
from qadapter.outputs import Sample

__all__ = ["philox_4x32", "sample"]

# A temperature of 1e-50 is as good as greedy, one of 1e300 as good as uniform.
_SMALLEST_SCALE, _LARGEST_SCALE = 1.0e-300, 3.0e38


def _int64(name: str, value: int | Tensor, batch: int, device: torch.device) -> Tensor:
    """int64 [B] as given, or [1] of an int."""
    if isinstance(value, Tensor):
        _checks.tensor(name, value, 1, (torch.int64,))
        _checks.rows(name, value, batch, device, "q_logits")
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}: expected None, an int or an int64 tensor [B], got {value!r}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected an int of at most 64 bits, got {value}")
    return torch.full((1,), value, dtype=torch.int64, device=device)


def _keys(seed: int | Tensor | None, batch: int, device: torch.device) -> Tensor:
    """The Philox keys of the rows, int64 [B]; or [1], a seed that the operation derives them from.

    Rows of one batch must not share their noise, so an int seeds each row by its index.
    """
    if seed is None:
        # From torch's global generator: torch.manual_seed rules.
        return torch.randint(-(2**63), 2**63 - 1, (batch,), device=device)
    keys = _int64("seed", seed, batch, device)
    if batch == 1 and not isinstance(seed, Tensor):
        return keys.fill_(first_key(seed))  # the operation takes [B] as the keys themselves
    return keys


def _float_rows(name: str, value: float | Tensor, q_logits: Tensor) -> Any:
    """A checked number, or a float64 tensor [B]."""
    if not isinstance(value, Tensor):
        return _checks.number(name, value)
    _checks.tensor(name, value, 1, _checks.LOGIT_DTYPES)
    _checks.rows(name, value, q_logits.shape[0], q_logits.device, "q_logits")
    return value.detach().double()


def _as_rows(value: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.full((1,), value, dtype=torch.float64, device=device)


def _scale(alpha_tilde: float | Tensor, temperature: float, device: torch.device) -> Tensor:
    """1 / (alpha_tilde * temperature), float64 [B] or [1]."""
    temperature = temperature or 1.0
    if not isinstance(alpha_tilde, Tensor):
        product = max(alpha_tilde * temperature, 1.0 / _LARGEST_SCALE)
        return _as_rows(max(1.0 / product, _SMALLEST_SCALE), device)
    scale = (1.0 / (alpha_tilde * temperature)).clamp(_SMALLEST_SCALE, _LARGEST_SCALE)
    # What is not a positive number stays visible behind the clamp.
    return torch.where((alpha_tilde > 0) & alpha_tilde.isfinite(), scale, math.nan)


def sample(
    base_logits: Tensor | None,
    q_logits: Tensor,
    *,
    alpha_0: float | Tensor = 1.0,
    alpha_tilde: float | Tensor = 1.0,
    center: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | Tensor | None = None,
    position: int | Tensor | None = None,
) -> Sample:
    """Draw one token per row from softmax((Q + alpha_0 log pi_base) / alpha_tilde).

    Args:
        base_logits: [B, V] floating; may be None where alpha_0 == center (the base then cancels).
        q_logits: [B, V] floating.
        alpha_0, alpha_tilde, center: as in `residual_values`; the first two also as a float tensor
            [B], a value per row.
        temperature: divides the policy's logits; 0 takes the most probable token (lowest id first).
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: then the smallest set of most probable tokens that holds this mass, in (0, 1].
        min_p: then the tokens with at least this share of the largest probability, in [0, 1].
            Filters work on renormalised probabilities; ties go to the lowest token id.
        seed: None (torch's global generator), an int (row b draws stream b of that seed), or
            int64 [B], one stream per row whatever the batch.
        position: None, an int or int64 [B]: which draw of its stream a row takes, such as the
            position of the token in its sequence.

    Returns:
        `Sample`: tokens int64 [B], and logprobs float32 [B] under the filtered policy. At
        temperature 0 they are those of the filtered policy at temperature 1. A row that holds a NaN
        or +inf, or no token at all, gives token -1 with logprob NaN. Neither has a gradient.

    Raises:
        ValueError: an argument that does not fit, named.
    """
    _checks.tensor("q_logits", q_logits, 2, _checks.LOGIT_DTYPES)
    alpha_0 = _float_rows("alpha_0", alpha_0, q_logits)
    alpha_tilde = _float_rows("alpha_tilde", alpha_tilde, q_logits)
    if not isinstance(alpha_tilde, Tensor):
        _checks.number("alpha_tilde", alpha_tilde, above=0.0)
    center = _checks.number("center", center)
    if base_logits is not None:
        _checks.tensor("base_logits", base_logits, 2, _checks.LOGIT_DTYPES)
        _checks.same("base_logits", base_logits, "q_logits", q_logits)
    elif isinstance(alpha_0, Tensor) or alpha_0 != center:
        raise ValueError(
            "base_logits: may only be None where alpha_0 == center (both numbers), got None"
        )
    if _checks.number("temperature", temperature) < 0:
        raise ValueError(f"temperature: expected 0 (greedy) or more, got {temperature!r}")
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 0:
        raise ValueError(f"top_k: expected 0 (off) or a positive int, got {top_k!r}")
    if not 0.0 < _checks.number("top_p", top_p) <= 1.0:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p!r}")
    if not 0.0 <= _checks.number("min_p", min_p) <= 1.0:
        raise ValueError(f"min_p: expected a number in [0, 1], got {min_p!r}")
    batch, vocab = q_logits.shape
    if vocab == 0:
        raise ValueError(f"q_logits: expected at least one column, got {tuple(q_logits.shape)}")

    device = q_logits.device
    base_weight = alpha_0 - center
    no_base = not isinstance(base_weight, Tensor) and base_weight == 0
    tokens, logprobs = torch.ops.qadapter.sample(
        # A base without weight cancels, and need not be read.
        None if base_logits is None or no_base else base_logits.detach(),
        q_logits.detach(),
        _scale(alpha_tilde, temperature, device),
        _as_rows(base_weight, device),
        _keys(seed, batch, device),
        _int64("position", 0 if position is None else position, batch, device),
        temperature == 0,
        min(top_k, vocab),
        float(top_p),
        float(min_p),
    )
    return Sample(tokens, logprobs)
