"""Triton's interpreter, without what takes nearly half of its time."""

import functools
import inspect
import types

from tests.kernels.interpreter import INTERPRETED


def quicken() -> None:
    """The interpreter patches Triton's language anew for every call of a function, and looks
    through all of its names for those to patch: here through what it has found the first time."""
    import triton.language as tl
    from triton.runtime import interpreter

    @functools.cache
    def to_patch(package):
        return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]

    def getmembers(package):
        return [(name, getattr(package, name)) for name in to_patch(package)]

    interpreter.inspect = types.SimpleNamespace(**{**vars(inspect), "getmembers": getmembers})


if INTERPRETED:
    quicken()
