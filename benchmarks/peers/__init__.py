"""What the project is compared with: a file for each problem."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Peer:
    """A way to compute the loss of a problem, and the values that it is of, if they come out.

    ``reason`` says why a problem cannot be run; "" if it can. ``cannot`` says what the peer cannot
    do at all, or is made to do beside its work.
    """

    name: str
    loss: Callable[[Any], Tensor]
    values: Callable[[Any], tuple[Any, ...]] | None = None
    reason: Callable[[Any], str] = lambda _: ""
    cannot: str = ""


def why_not(module: str, package: str) -> str:
    """Why a package cannot be used; "" if it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # not installed, or for another version of something
        return f"{package} cannot be imported ({type(error).__name__}: {error})"
    return ""
