"""The backend on quack-kernels: the linear operation's forward, where `linear_quack` serves it.

An optional package of kernels in CuTe DSL, for Hopper and Blackwell. It has not been timed against
the Triton backend, so nothing selects it but its name. Other operations, and calls that it
does not serve, run on Triton, or on torch where that is missing.
"""

import functools
import importlib.metadata
import importlib.util
from typing import Any

import torch
from torch import Tensor

from qadapter.ops import linear_quack, linear_torch

VERSIONS = "0.6"  # whose functions have these arguments
INSTALL = "pip install 'quack-kernels==0.6.*'"


@functools.cache
def why_not_loaded() -> str | None:
    """Loads quack-kernels once; the reason if that fails."""
    try:
        version = importlib.metadata.version("quack-kernels")
    except importlib.metadata.PackageNotFoundError:
        return f"quack-kernels is not installed ({INSTALL})"
    if not version.startswith(f"{VERSIONS}."):
        return f"quack-kernels {version} is installed, known are {VERSIONS}.* ({INSTALL})"
    try:
        linear_quack.quack()
    except Exception as error:  # built for another CUDA, another Python
        return f"quack-kernels {version} cannot be loaded ({type(error).__name__}: {error})"
    return None


def available() -> tuple[bool, str]:
    """Whether kernels can run here, and the state or the reason."""
    if not torch.cuda.is_available():  # first: to load it takes seconds
        return False, "quack-kernels: torch sees no GPU"
    installed = importlib.util.find_spec("quack") is not None
    if installed and torch.cuda.get_device_capability() < (9, 0):
        name = torch.cuda.get_device_name()
        return False, f"quack-kernels is for compute capability 9.0 and later, {name} has not"
    if (reason := why_not_loaded()) is not None:
        return False, reason
    return True, "quack-kernels, unmeasured: off by default, QADAPTER_BACKEND=quack selects it"


def linear_fwd(
    base_hidden: Tensor | None, q_hidden: Tensor, weight: Tensor, *more: Any
) -> tuple[Tensor, ...]:
    """`qadapter.ops.linear` has the arguments."""
    actions, bias, base_lse, base_logp, *composition, scale, softcap, chunk_size, need_grad = more
    capability = torch.cuda.get_device_capability(q_hidden.device)
    why_not = linear_quack.why_not(
        q_hidden, weight, bias, tuple(composition), scale, softcap, need_grad, capability
    )
    if why_not is not None or len(q_hidden) == 0:
        return _otherwise(q_hidden)(base_hidden, q_hidden, weight, *more)
    known = (base_lse, base_logp)
    with torch.cuda.device(q_hidden.device):
        return linear_quack.linear_fwd(
            base_hidden, q_hidden, weight, actions, *known, composition[0], chunk_size, need_grad
        )


def _otherwise(q_hidden: Tensor) -> Any:
    if q_hidden.is_cuda and importlib.util.find_spec("triton") is not None:
        from qadapter.ops import triton

        return triton.linear_fwd
    return linear_torch.linear_fwd
