"""Argument checks of the public functions: what can be told without reading a tensor's values."""

import math
from numbers import Integral
from typing import Any

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


def number(name: str, value: Any, *, above: float | None = None) -> float:
    # Compared, not math.isfinite: torch.compile(dynamic=True) traces floats as symbols.
    finite = isinstance(value, int | float) and -math.inf < value < math.inf
    if isinstance(value, bool) or not finite:
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    if above is not None and not value > above:
        raise ValueError(f"{name}: expected a number above {above:g}, got {value!r}")
    return float(value)


def whole(name: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name}: expected an integer of {least} or more, got {value!r}")
    return int(value)


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


def preference(
    gamma: float, reg_coef: float, bt_scale: float, value_at: str, length_norm: str
) -> tuple[float, float, float, bool, bool]:
    return (
        number("gamma", gamma),
        number("reg_coef", reg_coef),
        number("bt_scale", bt_scale),
        choice("value_at", value_at, ("next", "same")) == "next",
        choice("length_norm", length_norm, ("response", "none")) == "response",
    )


def denominators(value: Tensor | None, device: torch.device) -> None:
    if value is not None:
        tensor("denominators", value, 1, (torch.float32,))
        rows("denominators", value, 2, device, "(pairs, actions)")


def head(logit_scale: float, logit_softcap: float | None) -> tuple[float, float]:
    """Scale and soft cap, 0 for none."""
    scale = number("logit_scale", logit_scale)
    if logit_softcap is None:
        return scale, 0.0
    return scale, number("logit_softcap", logit_softcap, above=0.0)


def logits(base_logits: Tensor | None, q_logits: Tensor) -> None:
    """Both streams' logits [N, V]; whether the base may be missing is the caller's to say."""
    tensor("q_logits", q_logits, 2, LOGIT_DTYPES)
    if q_logits.shape[1] == 0:
        raise ValueError(f"q_logits: expected at least one column, got {_describe(q_logits)}")
    if base_logits is not None:
        tensor("base_logits", base_logits, 2, LOGIT_DTYPES)
        same("base_logits", base_logits, "q_logits", q_logits)


def statistics(
    base_logits: Tensor | None,
    q_logits: Tensor,
    actions: Tensor,
    base_lse: Tensor | None,
    base_logp: Tensor | None,
    m: float,
) -> None:
    """The tensor arguments that residual_values and qadapter_loss share."""
    logits(base_logits, q_logits)
    tensor("actions", actions, 1, (torch.int64,))
    rows("actions", actions, q_logits.shape[0], q_logits.device, "q_logits")
    if base_logits is None:
        _base_may_be_missing("base_logits", base_lse, base_logp, m)
    expected = torch.float64 if q_logits.dtype == torch.float64 else torch.float32
    _cached(base_lse, base_logp, expected, q_logits, "q_logits")


def _base_may_be_missing(
    name: str, base_lse: Tensor | None, base_logp: Tensor | None, m: float
) -> None:
    if m != 0 or base_lse is None or base_logp is None:
        raise ValueError(
            f"{name}: may only be None where the base enters through base_lse and base_logp "
            f"alone, that is with alpha_0 == center and both given; got alpha_0 - center = {m:g}, "
            f"base_lse {'missing' if base_lse is None else 'given'}, "
            f"base_logp {'missing' if base_logp is None else 'given'}"
        )


def _cached(
    base_lse: Tensor | None,
    base_logp: Tensor | None,
    dtype: torch.dtype,
    like: Tensor,
    of: str,
) -> None:
    for name, cached in (("base_lse", base_lse), ("base_logp", base_logp)):
        if cached is not None:
            tensor(name, cached, 1, (dtype,))
            rows(name, cached, like.shape[0], like.device, of)


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


def _frozen(name: str, value: Tensor | None) -> None:
    if value is not None and value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: requires a gradient, but this operation treats the language-model head as "
            f"frozen and has none for it; freeze it ({name}.requires_grad_(False)), pass "
            f"{name}.detach(), or train the head through residual_values on its logits"
        )


def linear_statistics(
    base_hidden: Tensor | None,
    q_hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    bias: Tensor | None,
    base_lse: Tensor | None,
    base_logp: Tensor | None,
    m: float,
    q_name: str = "q_hidden",
) -> None:
    """The tensor arguments that linear_residual_values and linear_qadapter_loss share."""
    tensor("q_hidden", q_hidden, 2, LOGIT_DTYPES)
    tensor("weight", weight, 2, LOGIT_DTYPES)
    if type(weight).__name__ == "DTensor":
        raise ValueError(
            "weight: a DTensor (sharded by FSDP2 or tensor parallelism) has to be gathered first, "
            "inside the forward of the module that owns it: pass weight.full_tensor(); where all "
            "processes have the same rows, its shard will do: weight.to_local() with group and "
            "vocab_offset"
        )
    num_rows, dim = q_hidden.shape
    device = q_hidden.device
    if weight.shape[1] != dim or weight.shape[0] == 0 or dim == 0 or weight.device != device:
        raise ValueError(
            f"weight: expected [V, {dim}] on {device} with at least one row and column, to fit "
            f"{q_name} ({_describe(q_hidden)}), got {_describe(weight)}"
        )
    _frozen("weight", weight)
    if bias is not None:
        tensor("bias", bias, 1, LOGIT_DTYPES)
        rows("bias", bias, weight.shape[0], device, "weight")
        _frozen("bias", bias)
    tensor("actions", actions, 1, (torch.int64,))
    rows("actions", actions, num_rows, device, "q_hidden")
    if base_hidden is not None:
        tensor("base_hidden", base_hidden, 2, LOGIT_DTYPES)
        same("base_hidden", base_hidden, "q_hidden", q_hidden)
    else:
        _base_may_be_missing("base_hidden", base_lse, base_logp, m)
    wide = torch.float64 in (q_hidden.dtype, weight.dtype)
    _cached(base_lse, base_logp, torch.float64 if wide else torch.float32, q_hidden, "q_hidden")


def chunk(chunk_size: int | None, memory_mib: float | None) -> tuple[int, float]:
    """Both as numbers, 0 for not given."""
    if chunk_size is not None and memory_mib is not None:
        raise ValueError(
            f"chunk_size and memory_mib: expected one of them, got {chunk_size!r} and "
            f"{memory_mib!r}"
        )
    if chunk_size is not None and (
        isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1
    ):
        raise ValueError(f"chunk_size: expected a positive int (rows), got {chunk_size!r}")
    return (
        chunk_size or 0,
        0.0 if memory_mib is None else number("memory_mib", memory_mib, above=0.0),
    )
