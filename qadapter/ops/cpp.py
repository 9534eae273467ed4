"""The C++ backend: loads the CPU extension, and gives it the signatures that all backends share.

The extension (csrc/cpu, built by setup.py) registers its operations under `torch.ops.qadapter_C`.
It takes float32, bfloat16 and float16 on the CPU. The instruction set is chosen at run time;
QADAPTER_CPU_CAPABILITY, one of `CAPABILITIES`, forces a lower one.

Each operation takes what its twin in `residual_torch`, `preference_torch`, `linear_torch` or
`sample_torch` takes; the extension's own schema also has the instruction set, last.
"""

import functools
import importlib
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# A gather and two additions, which torch does as well.
from qadapter.ops.linear_torch import linear_bwd as linear_bwd


def portable_name(machine: str) -> str:
    """What compilers make of the portable code there: "neon" on 64-bit Arm, else "plain"."""
    return "neon" if machine.lower() in ("aarch64", "arm64") else "plain"


# The extension's numbers for the instruction sets, each with all that is before it. The last two
# add products of bfloat16; what has no such products takes avx512 there.
CAPABILITIES = (portable_name(platform.machine()), "avx2", "avx512", "avx512_bf16", "amx")


def build_note(extension: str) -> str:
    """Why setup.py left an extension out ("cpu" or "cuda"), where it said so."""
    try:
        note = json.loads((Path(__file__).parents[1] / "_build_info.json").read_text())[extension]
    except (OSError, ValueError, KeyError):
        return ""
    return "" if note == "built" else f": {note}"


@functools.cache
def why_not_loaded() -> str | None:
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
    """Whether kernels can run here, and the instruction set they take, or the reason."""
    reason = why_not_loaded()
    return (True, f"vector code: {capability()}") if reason is None else (False, reason)


def extension() -> Any:
    """`torch.ops.qadapter_C`; RuntimeError with the reason where it cannot be loaded."""
    if (reason := why_not_loaded()) is not None:
        raise RuntimeError(reason)
    return torch.ops.qadapter_C


@functools.cache
def _best() -> int:
    return extension().best_isa()


def isa() -> int:
    """The extension's number for the instruction set that is used."""
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
    """The instruction set that is used, one of CAPABILITIES."""
    return CAPABILITIES[isa()]


def residual_fwd(*arguments: Any) -> tuple[Tensor, ...]:
    return extension().residual_fwd(*arguments, isa())


def residual_bwd(*arguments: Any) -> Tensor:
    return extension().residual_bwd(*arguments, isa())


def preference_fwd(*arguments: Any) -> tuple[Tensor, ...]:
    return extension().preference_fwd(*arguments)


def linear_fwd(
    base_hidden: Tensor | None,
    q_hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    bias: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    bias = None if bias is None else bias.float().contiguous()
    operation = extension().linear_fwd
    return operation(base_hidden, q_hidden, weight, actions, bias, *arguments, isa())


def sample(*arguments: Any) -> tuple[Tensor, Tensor]:
    return extension().sample(*arguments, isa())
