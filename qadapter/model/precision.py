"""What ``dtype="auto"`` means: the checkpoint's dtype where this machine is fast in it.

That depends on the work: ``dtype="decode"`` is "auto" for a model that only decodes. A step of it
reads every weight for a few rows, and csrc/cpu has products of bfloat16 for that on any x86-64.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch

from qadapter.ops import few_rows

logger = logging.getLogger(__name__)

# Any of these multiplies and adds numbers of the dtype. Without them a product takes 4 to 20 times
# as long as in float32 on the same core, forward and backward of a model up to 30 times.
_INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "avx10_2", "fp16_arith"),
}


def cpu_capabilities() -> Mapping[str, Any]:
    """What torch says that this CPU can do, by cpuinfo's names."""
    ask = getattr(torch.cpu, "get_capabilities", None)
    if ask is not None:
        return ask()
    return {"avx512_bf16": torch.cpu._is_avx512_bf16_supported()}  # torch 2.11


def fast_on_cpu(dtype: torch.dtype) -> bool:
    """Whether the CPU has instructions for products of this dtype."""
    here = cpu_capabilities()
    return dtype not in _INSTRUCTIONS or any(here.get(name) for name in _INSTRUCTIONS[dtype])


def decodes_in(dtype: torch.dtype) -> bool:
    """Whether decoding takes products of this package's where the CPU has no instructions: for the
    rows of prompts, too, which PyTorch's would take 4 times as long for."""
    return few_rows.rows_linear_limit(dtype) >= 4096


def base_dtype(
    dtype: torch.dtype | str, source: str, device: str | None = None, **kwargs: Any
) -> torch.dtype | str:
    """The dtype to load a base in; says so where "auto" is not the checkpoint's.

    Args:
        dtype: as transformers takes it, or "decode". Anything but these and "auto" is returned as
            it is.
        source: folder or Hub id of the base.
        device: where the base will run; None, on the accelerator if torch sees one.
        **kwargs: as ``from_pretrained`` will get them.
    """
    if dtype not in ("auto", "decode"):
        return dtype
    decodes, dtype = dtype == "decode", "auto"
    if device is None:
        device = "cpu" if str(kwargs.get("device_map")) == "cpu" else None
    if device is None and not torch.accelerator.is_available():
        device = "cpu"
    if device is None or torch.device(device).type != "cpu":
        return dtype
    from transformers import AutoConfig, PreTrainedConfig

    config = kwargs.get("config")
    if not isinstance(config, PreTrainedConfig):
        given = {name: value for name, value in kwargs.items() if name != "config"}
        config = AutoConfig.from_pretrained(config or source, **given)
    # A quantised base computes as its method says.
    if kwargs.get("quantization_config") or getattr(config, "quantization_config", None):
        return dtype
    # An old checkpoint does not say; float32 holds whatever it has.
    stored: Any = config.dtype or torch.bfloat16
    if fast_on_cpu(stored) or (decodes and decodes_in(stored)):
        return dtype
    name = str(stored).removeprefix("torch.")
    logger.warning(
        "%s is loaded in float32: this CPU has no instructions for %s and would be many times "
        "slower in it (a dtype other than auto is obeyed)",
        source,
        name,
    )
    return torch.float32


def report() -> str:
    """What "auto" makes of 16-bit checkpoints on the CPU, in words."""
    lines = []
    for dtype in _INSTRUCTIONS:
        name = str(dtype).removeprefix("torch.")
        decoding = ", to decode as it is" if decodes_in(dtype) else ""
        lines.append(f"{name} {'as it is' if fast_on_cpu(dtype) else 'in float32' + decoding}")
    return ", ".join(lines)
