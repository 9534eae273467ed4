"""The C++ backend: loads the CPU extension, and gives it the signatures that all backends share.

The extension (csrc/cpu, built by setup.py) registers its operations under `torch.ops.qadapter_C`.
It takes float32, bfloat16 and float16 on the CPU. AVX-512, AVX2 or plain code is chosen at run
time; QADAPTER_CPU_CAPABILITY=avx512|avx2|plain forces a lower one.
"""

import functools
import importlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAPABILITIES = ("plain", "avx2", "avx512")  # the extension's numbers for them


def build_note(extension: str) -> str:
    """Why setup.py left an extension out ("cpu" or "cuda"), where it said so."""
    try:
        note = json.loads((Path(__file__).parent / "_build_info.json").read_text())[extension]
    except (OSError, ValueError, KeyError):
        return ""
    return "" if note == "built" else f": {note}"


@functools.cache
def _load() -> str | None:
    """Loads the extension once; the reason if that fails."""
    try:
        importlib.import_module("qadapter._C_cpu")
    except ModuleNotFoundError as error:
        if error.name != "qadapter._C_cpu":
            return f"the C++ extension cannot be loaded ({error})"
        return f"the C++ extension is not built{build_note('cpu')}"
    except Exception as error:  # built for another torch, another platform
        return f"the C++ extension cannot be loaded ({type(error).__name__}: {error})"
    return None


def available() -> tuple[bool, str]:
    reason = _load()
    return reason is None, reason or ""


def supports(dtype: torch.dtype) -> bool:
    return dtype in DTYPES


def _ops() -> Any:
    if (reason := _load()) is not None:
        raise RuntimeError(reason)
    return torch.ops.qadapter_C


@functools.cache
def _best() -> int:
    return _ops().best_isa()


def _isa() -> int:
    best = _best()
    forced = os.environ.get("QADAPTER_CPU_CAPABILITY")
    if not forced:
        return best
    if forced not in CAPABILITIES:
        raise ValueError(
            f"QADAPTER_CPU_CAPABILITY: expected one of {', '.join(CAPABILITIES)}, got {forced!r}"
        )
    return min(CAPABILITIES.index(forced), best)


def capability() -> str:
    """The vector code that runs: avx512, avx2 or plain."""
    return CAPABILITIES[_isa()]


# The most rows for which rows_linear was measured to be faster than torch's product (oneDNN's or
# MKL's), with bfloat16 dot products and by `capability`. CPUs with AMX were not measured.
_ROWS_LIMITS = {
    "avx512_bf16": {torch.bfloat16: 64, torch.float32: 32},
    "avx512": {torch.bfloat16: 64, torch.float32: 32},
    "avx2": {torch.bfloat16: 64, torch.float32: 32},
    "plain": {torch.bfloat16: 16, torch.float32: 2},
}


@functools.cache
def _rows() -> tuple[Any, Any, int]:
    """The two operations on few rows, and the vector code for them.

    They run hundreds of times a token, and take microseconds: what leads to them is looked up once.
    """
    ops = _ops()
    # -1: the best of this CPU, its bfloat16 dot products included
    isa = _isa() if os.environ.get("QADAPTER_CPU_CAPABILITY") else -1
    return ops.rows_linear.default, ops.lora_add_.default, isa


@functools.cache
def rows_linear_limit(dtype: torch.dtype) -> int:
    """The most rows for which `rows_linear` is the faster product; 0 where it never is."""
    if _load() is not None:
        return 0
    isa = _rows()[2]
    name = "avx512_bf16" if isa < 0 and _ops().has_bf16_dot() else capability()
    return _ROWS_LIMITS[name].get(dtype, 0)


def rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T (+ bias) for few rows x, as nn.functional.linear; without gradients.

    Sums are float32 and rounded once. What a row gives does not depend on the other rows.
    QADAPTER_CPU_CAPABILITY is read at the first call.

    Args:
        x: [..., K] float32 or bfloat16 on the CPU.
        weight: [O, K] of the same dtype, unit stride in the last dimension.
        bias: [O] of the same dtype, contiguous.

    Returns:
        [..., O], contiguous.

    Raises:
        RuntimeError: A dtype, device or shape that does not fit; the extension cannot be loaded.
    """
    linear, _, isa = _rows()
    return linear(x, weight, bias, isa)


def lora_add_(
    out: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    start: int,
    stop: int,
) -> None:
    """out[start:stop] += scaling (x[start:stop] A^T) B^T in place; without gradients.

    All in float32, rounded once when it is added. What a row gives does not depend on the others.

    Args:
        out: [rows, O] or [rows, T, O], float32 or bfloat16 on the CPU; changed.
        x: [rows, K] or [rows, T, K] of out's dtype.
        lora_a: A [r, K], float32 or bfloat16, whatever x is.
        lora_b: B [O, r] of A's dtype.
        scaling: The factor.
        start: The first row that the adapter is for.
        stop: The row behind the last one.

    Raises:
        RuntimeError: A dtype, device, shape or range that does not fit; the extension cannot be
            loaded.
    """
    _, lora, isa = _rows()
    lora(out, x, lora_a, lora_b, scaling, start, stop, isa)


def residual_fwd(
    base_logits: Tensor | None,
    q_logits: Tensor,
    actions: Tensor,
    base_lse: Tensor | None,
    base_logp: Tensor | None,
    alpha_0: float,
    alpha_tilde: float,
    center: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _ops().residual_fwd(
        base_logits,
        q_logits,
        actions,
        base_lse,
        base_logp,
        alpha_0,
        alpha_tilde,
        center,
        _isa(),
    )


def residual_bwd(
    base_logits: Tensor | None,
    q_logits: Tensor,
    actions: Tensor,
    shift: Tensor,
    log_sum: Tensor,
    coef_p: Tensor,
    coef_a: Tensor,
    alpha_0: float,
    alpha_tilde: float,
    center: float,
) -> Tensor:
    return _ops().residual_bwd(
        base_logits,
        q_logits,
        actions,
        shift,
        log_sum,
        coef_p,
        coef_a,
        alpha_0,
        alpha_tilde,
        center,
        _isa(),
    )


def preference_fwd(
    q: Tensor,
    value: Tensor,
    actions: Tensor,
    cu_seqlens: Tensor,
    denominators: Tensor | None,
    gamma: float,
    reg_coef: float,
    bt_scale: float,
    value_next: bool,
    length_mean: bool,
) -> tuple[Tensor, ...]:
    return _ops().preference_fwd(
        q,
        value,
        actions,
        cu_seqlens,
        denominators,
        gamma,
        reg_coef,
        bt_scale,
        value_next,
        length_mean,
    )


def linear_fwd(
    base_hidden: Tensor | None,
    q_hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    bias: Tensor | None,
    base_lse: Tensor | None,
    base_logp: Tensor | None,
    alpha_0: float,
    alpha_tilde: float,
    center: float,
    logit_scale: float,
    logit_softcap: float,
    chunk_size: int,
    need_grad: bool,
) -> tuple[Tensor, ...]:
    # -1: the best of this CPU, its bfloat16 dot products included
    isa = _isa() if os.environ.get("QADAPTER_CPU_CAPABILITY") else -1
    return _ops().linear_fwd(
        base_hidden,
        q_hidden,
        weight,
        actions,
        None if bias is None else bias.float().contiguous(),
        base_lse,
        base_logp,
        alpha_0,
        alpha_tilde,
        center,
        logit_scale,
        logit_softcap,
        chunk_size,
        need_grad,
        isa,
    )


def sample(
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
    return _ops().sample(
        base_logits,
        q_logits,
        scale,
        base_weight,
        seed,
        position,
        greedy,
        top_k,
        top_p,
        min_p,
        _isa(),
    )
