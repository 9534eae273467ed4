"""Sampling one token per row from the composed policy.

Draws come from Philox4x32-10 keyed by the row's seed and counted by its position, so that a
row's token depends on (seed, position, distribution) alone: not on the batch around it, nor on what
was drawn before.
"""

import torch
from torch import Tensor

from qadapter import _checks, reference
from qadapter.outputs import Sample

_MASK = 0xFFFFFFFF


def _mul_hi_lo(a: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low words of a 32 x 32 bit product, in int64 without overflow."""
    high, low = a >> 16, a & 0xFFFF
    mid = high * constant
    total = low * constant + ((mid & 0xFFFF) << 16)
    return ((mid >> 16) + (total >> 32)) & _MASK, total & _MASK


def philox_4x32(key: Tensor, counter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al. 2011) on int64 tensors: four words of 32 random bits each.

    ``key`` and ``counter`` are int64 of one shape; the upper half of the 128-bit counter is 0.
    """
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    c0, c1 = counter & _MASK, (counter >> 32) & _MASK
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    for _ in range(10):
        hi0, lo0 = _mul_hi_lo(c0, 0xD2511F53)
        hi1, lo1 = _mul_hi_lo(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def _per_row(name: str, value: int | Tensor, batch: int, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        _checks.tensor(name, value, 1, (torch.int64,))
        _checks.rows(name, value, batch, device, "q_logits")
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}: expected None, an int or an int64 tensor [B], got {value!r}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected an int of at most 64 bits, got {value}")
    return torch.full((batch,), value, dtype=torch.int64, device=device)


def _uniform(seed: int | Tensor | None, position: int | Tensor | None, rows: Tensor) -> Tensor:
    """float64 [B] in [0, 1), 53 bits each."""
    batch, device = rows.shape[0], rows.device
    if seed is None:
        # One key a row from torch's global generator: torch.manual_seed rules.
        key = torch.randint(-(2**63), 2**63 - 1, (batch,), device=device)
    else:
        key = _per_row("seed", seed, batch, device)
        if not isinstance(seed, Tensor):
            # Rows of one batch must not share their noise: an int seeds each row by its index.
            index = torch.arange(batch, device=device)
            w0, w1, _, _ = philox_4x32(key, index)
            key = (w0 << 32) | w1
    counter = _per_row("position", 0 if position is None else position, batch, device)
    w0, w1, _, _ = philox_4x32(key, counter)
    return ((w0 >> 5).double() * 67108864.0 + (w1 >> 6).double()) / 9007199254740992.0


def sample(
    base_logits: Tensor | None,
    q_logits: Tensor,
    *,
    alpha_0: float = 1.0,
    alpha_tilde: float = 1.0,
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
        alpha_0, alpha_tilde, center: as in `residual_values`.
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
        or no token at all gives token -1 with logprob NaN.

    Raises:
        ValueError: an argument that does not fit, named.
    """
    alpha_0, alpha_tilde, center = _checks.composition(alpha_0, alpha_tilde, center)
    _checks.tensor("q_logits", q_logits, 2, _checks.LOGIT_DTYPES)
    if base_logits is not None:
        _checks.tensor("base_logits", base_logits, 2, _checks.LOGIT_DTYPES)
        _checks.same("base_logits", base_logits, "q_logits", q_logits)
    elif alpha_0 != center:
        raise ValueError("base_logits: may only be None where alpha_0 == center, got None")
    if _checks.number("temperature", temperature) < 0:
        raise ValueError(f"temperature: expected 0 (greedy) or more, got {temperature!r}")
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 0:
        raise ValueError(f"top_k: expected 0 (off) or a positive int, got {top_k!r}")
    if not 0.0 < _checks.number("top_p", top_p) <= 1.0:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p!r}")
    if not 0.0 <= _checks.number("min_p", min_p) <= 1.0:
        raise ValueError(f"min_p: expected a number in [0, 1], got {min_p!r}")
    if q_logits.shape[1] == 0:
        raise ValueError(f"q_logits: expected at least one column, got {tuple(q_logits.shape)}")

    compute = torch.promote_types(q_logits.dtype, torch.float32)
    logp = reference.filtered_logprobs(
        None if base_logits is None else base_logits.detach().to(compute),
        q_logits.detach().to(compute),
        alpha_0=alpha_0,
        alpha_tilde=alpha_tilde,
        center=center,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )
    if temperature == 0:
        best = logp.amax(-1, keepdim=True)
        tokens = (logp == best).to(torch.int8).argmax(-1)
    else:
        cumulative = logp.double().exp().cumsum(-1)
        threshold = _uniform(seed, position, logp) * cumulative[:, -1]
        # First id whose cumulative mass exceeds the threshold: never a token of probability 0.
        tokens = torch.searchsorted(cumulative, threshold[:, None], right=True)[:, 0]
        tokens = tokens.clamp(max=logp.shape[1] - 1)
    logprobs = logp.gather(-1, tokens[:, None])[:, 0]
    broken = logp.isnan().any(-1)
    return Sample(
        torch.where(broken, -1, tokens), torch.where(broken, float("nan"), logprobs).float()
    )
