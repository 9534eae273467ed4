"""torch.library definition of the sampler: schema, checks, fake implementation.

    sample    compose, filter and draw one token per row, with its log-probability

    base_logits, q_logits   [B, V], as in `qadapter.ops.residual`; base_logits may be None (all 0)
    scale, base_weight      float64 [B], or [1] for all rows: the policy's logits are
                            c = scale * (q + base_weight * base), so scale is
                            1 / (alpha_tilde * temperature) and base_weight alpha_0 - center. Where
                            base_weight is 0 the base is not looked at; elsewhere a token that is
                            -inf in either stream is masked.
                            Each of the two and of the next two may, as [1], lie on the CPU
                            whatever the device is: a number, which kernels take by value
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

import functools
import math
from typing import Any

import torch
from torch import Tensor

from qadapter.ops import backends, checks, library, sample_torch
from qadapter.ops.library import rows_dense
from qadapter.ops.philox import first_key

# The arguments of `QF.sample` as those of the operation.

# A temperature of 1e-50 is as good as greedy, one of 1e300 as good as uniform.
SMALLEST_SCALE, LARGEST_SCALE = 1.0e-300, 3.0e38


@functools.lru_cache(maxsize=64)
def _number(value: float) -> Tensor:
    return torch.full((1,), value, dtype=torch.float64)


def number_rows(value: float | int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[1], on the CPU, which costs a GPU no launch; but not in a graph that is being compiled."""
    where = device if torch.compiler.is_compiling() else torch.device("cpu")
    return torch.full((1,), value, dtype=dtype, device=where)


def int64_rows(name: str, value: int | Tensor, batch: int, device: torch.device) -> Tensor:
    """int64 [B] as given, or [1] of an int."""
    if isinstance(value, Tensor):
        checks.tensor(name, value, 1, (torch.int64,))
        checks.rows(name, value, batch, device, "q_logits")
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}: expected None, an int or an int64 tensor [B], got {value!r}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected an int of at most 64 bits, got {value}")
    return number_rows(value, torch.int64, device)


def row_keys(seed: int | Tensor | None, batch: int, device: torch.device) -> Tensor:
    """The Philox keys of the rows, int64 [B]; or [1], a seed that the operation derives them from.

    Rows of one batch must not share their noise, so an int seeds each row by its index.
    """
    if seed is None:
        # From torch's global generator: torch.manual_seed rules.
        return torch.randint(-(2**63), 2**63 - 1, (batch,), device=device)
    keys = int64_rows("seed", seed, batch, device)
    if batch == 1 and not isinstance(seed, Tensor):
        return keys.fill_(first_key(seed))  # the operation takes [B] as the keys themselves
    return keys


def float_rows(name: str, value: float | Tensor, q_logits: Tensor) -> Any:
    """A checked number, or a float64 tensor [B]."""
    if not isinstance(value, Tensor):
        return checks.number(name, value)
    checks.tensor(name, value, 1, checks.LOGIT_DTYPES)
    checks.rows(name, value, q_logits.shape[0], q_logits.device, "q_logits")
    return value.detach().double()


def as_rows(value: float | Tensor, q_logits: Tensor) -> Tensor:
    """float64 [B] as given, or [1]: of a number, which may be shared and is only to be read."""
    if isinstance(value, Tensor):
        return value
    if traced(q_logits):
        return number_rows(value, torch.float64, q_logits.device)
    return _number(value)


def scales(alpha_tilde: float | Tensor, temperature: float, q_logits: Tensor) -> Tensor:
    """1 / (alpha_tilde * temperature), as `as_rows`."""
    temperature = temperature or 1.0
    if not isinstance(alpha_tilde, Tensor):
        product = max(alpha_tilde * temperature, 1.0 / LARGEST_SCALE)
        return as_rows(max(1.0 / product, SMALLEST_SCALE), q_logits)
    scale = (1.0 / (alpha_tilde * temperature)).clamp(SMALLEST_SCALE, LARGEST_SCALE)
    # What is not a positive number stays visible behind the clamp.
    return torch.where((alpha_tilde > 0) & alpha_tilde.isfinite(), scale, math.nan)


# The operation.


def traced(q_logits: Tensor) -> bool:
    """Whether somebody wants to see the call itself: a compiler, fake or wrapped tensors."""
    return torch.compiler.is_compiling() or type(q_logits) is not Tensor


def call(*arguments: Any, numbers: bool) -> tuple[Tensor, Tensor]:
    """The operation with arguments that are checked, but for the values of scale and base_weight
    where those are not ``numbers``.

    Not by way of PyTorch's dispatcher if that can be: after logits have passed through the caches,
    code comes from afar too: checks and dispatch took a third of a call with eight rows.
    """
    if traced(arguments[1]):
        return torch.ops.qadapter.sample(*arguments)
    if not numbers:
        _check_composition(*arguments[2:4])
    return _run(*arguments)


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
    *how: Any,
) -> tuple[Tensor, Tensor]:
    batch = q_logits.shape[0]
    _check_rows("scale", scale, batch, torch.float64)
    _check_rows("base_weight", base_weight, batch, torch.float64)
    _check_rows("seed", seed, batch, torch.int64)
    _check_rows("position", position, batch, torch.int64)
    _check_composition(scale, base_weight)
    return _run(base_logits, q_logits, scale, base_weight, seed, position, *how)


def _run(
    base_logits: Tensor | None,
    q_logits: Tensor,
    scale: Tensor,
    base_weight: Tensor,
    seed: Tensor,
    position: Tensor,
    *how: Any,
) -> tuple[Tensor, Tensor]:
    return backends.implementation(q_logits, sample_torch.sample)(
        rows_dense(base_logits),
        rows_dense(q_logits),
        scale.contiguous(),
        base_weight.contiguous(),
        seed.contiguous(),
        position.contiguous(),
        *how,
    )


def _sample_fake(base_logits: Tensor | None, q_logits: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    batch = q_logits.shape[0]
    return (
        q_logits.new_empty(batch, dtype=torch.int64),
        q_logits.new_empty(batch, dtype=torch.float32),
    )


library.define(
    "sample(Tensor? base_logits, Tensor q_logits, Tensor scale, Tensor base_weight, Tensor seed, "
    "Tensor position, bool greedy, int top_k, float top_p, float min_p) -> (Tensor, Tensor)",
    _sample,
    _sample_fake,
)
