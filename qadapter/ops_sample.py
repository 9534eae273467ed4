"""torch.library definition of the sampler: schema, checks, fake implementation.

    sample    compose, filter and draw one token per row, with its log-probability

    base_logits, q_logits   [B, V], as in `qadapter.ops`; base_logits may be None (all 0)
    scale, base_weight      float64 [B], or [1] for all rows: the policy's logits are
                            c = scale * (q + base_weight * base), so scale is
                            1 / (alpha_tilde * temperature) and base_weight alpha_0 - center. Where
                            base_weight is 0 the base is not looked at; elsewhere a token that is
                            -inf in either stream is masked.
    seed                    int64 [B], the Philox key of each row (with B = 1 too), or, for B > 1,
                            [1]: row b's key is then words (w0 << 32) | w1 of philox(seed, b)
    position                int64 [B] or [1], the Philox counter
    greedy                  take the first of the most probable tokens instead of a draw
    top_k, top_p, min_p     0, 1.0 and 0.0 for none

Returns tokens int64 [B] and logprobs float32 [B], of the distribution of
`qadapter.reference.filtered_logprobs`. A draw is the first token id at which the running sum of the
kept probabilities exceeds u, u the 53-bit uniform of `uniform`; so all backends draw the same token
but for rounding. A row with a NaN or +inf among its c, or without any token, gives -1 and NaN, as
does a row whose scale is not positive or whose base_weight is not finite (on a CPU that raises).
There is no gradient.
"""

import torch
from torch import Tensor

from qadapter import backends
from qadapter.ops import _LIB, _TAGS, _rows_dense

_LIB.define(
    "sample(Tensor? base_logits, Tensor q_logits, Tensor scale, Tensor base_weight, Tensor seed, "
    "Tensor position, bool greedy, int top_k, float top_p, float min_p) -> (Tensor, Tensor)",
    tags=_TAGS,
)


def _check_rows(name: str, value: Tensor, batch: int, dtype: torch.dtype) -> None:
    if value.dtype != dtype or value.ndim != 1 or value.shape[0] not in (1, batch):
        raise ValueError(
            f"{name}: expected a {dtype} tensor of shape ({batch},) or (1,), got {value.dtype} of "
            f"shape {tuple(value.shape)}"
        )


def _check_composition(scale: Tensor, base_weight: Tensor) -> None:
    if scale.device.type != "cpu":
        return  # reading it would stall the stream
    for row, value in enumerate(scale.tolist()):
        if not 0 < value < float("inf"):
            raise ValueError(
                f"scale[{row}] = {value}: expected a positive number, 1 / (alpha_tilde * "
                "temperature); is alpha_tilde positive?"
            )
    for row, value in enumerate(base_weight.tolist()):
        if not abs(value) < float("inf"):
            raise ValueError(
                f"base_weight[{row}] = {value}: expected a finite number, alpha_0 - center; is "
                "alpha_0 finite?"
            )


def _sample(
    base_logits: Tensor | None,
    q_logits: Tensor,
    scale: Tensor,
    base_weight: Tensor,
    seed: Tensor,
    position: Tensor,
    greedy: bool,
    top_k: int,
    top_p: float,
    min_p: float,
) -> tuple[Tensor, Tensor]:
    batch = q_logits.shape[0]
    _check_rows("scale", scale, batch, torch.float64)
    _check_rows("base_weight", base_weight, batch, torch.float64)
    _check_rows("seed", seed, batch, torch.int64)
    _check_rows("position", position, batch, torch.int64)
    _check_composition(scale, base_weight)
    return backends.implementation(q_logits).sample(
        _rows_dense(base_logits),
        _rows_dense(q_logits),
        scale.contiguous(),
        base_weight.contiguous(),
        seed.contiguous(),
        position.contiguous(),
        greedy,
        top_k,
        top_p,
        min_p,
    )


def _sample_fake(base_logits: Tensor | None, q_logits: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    batch = q_logits.shape[0]
    return (
        q_logits.new_empty(batch, dtype=torch.int64),
        q_logits.new_empty(batch, dtype=torch.float32),
    )


_LIB.impl("sample", _sample, "CompositeExplicitAutograd")
torch.library.register_fake("qadapter::sample", _sample_fake, lib=_LIB)
