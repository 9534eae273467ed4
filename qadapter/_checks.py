"""Argument checks of the public functions: what can be told without reading a tensor's values."""

import math

import torch
from torch import Tensor

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _describe(tensor: object) -> str:
    if isinstance(tensor, Tensor):
        return f"{tensor.dtype} tensor of shape {tuple(tensor.shape)} on {tensor.device}"
    return f"{type(tensor).__name__} {tensor!r}"


def tensor(name: str, value: object, ndim: int, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim != ndim or value.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{name}: expected a {ndim}-D {names} tensor, got {_describe(value)}")
    return value


def same(name: str, value: Tensor, other_name: str, other: Tensor, *, dtype: bool = True) -> None:
    """``value`` has the shape, device and (unless told otherwise) dtype of ``other``."""
    if value.shape != other.shape or value.device != other.device:
        raise ValueError(
            f"{name}: expected the shape and device of {other_name} ({_describe(other)}), "
            f"got {_describe(value)}"
        )
    if dtype and value.dtype != other.dtype:
        raise ValueError(
            f"{name}: expected the dtype of {other_name}, {other.dtype}, got {value.dtype}"
        )


def rows(name: str, value: Tensor, num_rows: int, device: torch.device, of: str) -> None:
    if value.shape[0] != num_rows or value.device != device:
        raise ValueError(
            f"{name}: expected {num_rows} rows on {device}, as {of} has, got {_describe(value)}"
        )


def number(name: str, value: object, *, above: float | None = None) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    if above is not None and not value > above:
        raise ValueError(f"{name}: expected a number above {above:g}, got {value!r}")
    return float(value)


def composition(alpha_0: float, alpha_tilde: float, center: float) -> tuple[float, float, float]:
    return (
        number("alpha_0", alpha_0),
        number("alpha_tilde", alpha_tilde, above=0.0),
        number("center", center),
    )


def choice(name: str, value: object, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
    return str(value)


def statistics(
    base_logits: Tensor | None,
    q_logits: Tensor,
    actions: Tensor,
    base_lse: Tensor | None,
    base_logp: Tensor | None,
    m: float,
) -> None:
    """The tensor arguments that residual_values and qadapter_loss share."""
    tensor("q_logits", q_logits, 2, LOGIT_DTYPES)
    if q_logits.shape[1] == 0:
        raise ValueError(f"q_logits: expected at least one column, got {_describe(q_logits)}")
    tensor("actions", actions, 1, (torch.int64,))
    num_rows, device = q_logits.shape[0], q_logits.device
    rows("actions", actions, num_rows, device, "q_logits")
    if base_logits is not None:
        tensor("base_logits", base_logits, 2, LOGIT_DTYPES)
        same("base_logits", base_logits, "q_logits", q_logits)
    elif m != 0 or base_lse is None or base_logp is None:
        raise ValueError(
            "base_logits: may only be None where the base enters through base_lse and base_logp "
            f"alone, that is with alpha_0 == center and both given; got alpha_0 - center = {m:g}, "
            f"base_lse {'missing' if base_lse is None else 'given'}, "
            f"base_logp {'missing' if base_logp is None else 'given'}"
        )
    for name, cached in (("base_lse", base_lse), ("base_logp", base_logp)):
        if cached is not None:
            expected = torch.float64 if q_logits.dtype == torch.float64 else torch.float32
            tensor(name, cached, 1, (expected,))
            rows(name, cached, num_rows, device, "q_logits")


def sequences(cu_seqlens: Tensor, device: torch.device) -> None:
    tensor("cu_seqlens", cu_seqlens, 1, (torch.int32, torch.int64))
    count = cu_seqlens.shape[0] - 1
    if count < 0 or count % 2:
        raise ValueError(
            f"cu_seqlens: expected 2P+1 entries (P chosen then P rejected sequences), got "
            f"{cu_seqlens.shape[0]} entries, {count} sequences"
        )
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens: expected a tensor on {device}, got {cu_seqlens.device}")
