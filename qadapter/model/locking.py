"""One user of a model at a time: the streams are made by switching its layers.

A server's threads, or a training loop and a thread that samples, share modules whose adapters are
turned on and off. All of that happens under a lock, which belongs to the transformers model, so
that two `QAdapterModel` around the same base share it. It is re-entrant: a logits processor may
call the model that is generating.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class ModelLock:
    """A re-entrant lock; a copy of the model has its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: Any) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[Any, ...]:
        return ModelLock, ()


@contextmanager
def alone(hf_model: nn.Module) -> Iterator[None]:
    """Inside, no other thread runs or switches ``hf_model`` by way of this package."""
    if torch.compiler.is_compiling():  # a graph cannot hold a lock
        yield
        return
    with vars(hf_model).setdefault("_qadapter_lock", ModelLock()):
        yield


def recompute_alone(hf_model: nn.Module) -> None:
    """Take the lock also where gradient checkpointing runs layers again, in backward."""
    for module in hf_model.modules():
        checkpoint: Any = vars(module).get("_gradient_checkpointing_func")
        if checkpoint is not None and not isinstance(checkpoint, _Locked):
            vars(module)["_gradient_checkpointing_func"] = _Locked(checkpoint, hf_model)


class _Locked:
    """A checkpointing function whose functions run under the model's lock."""

    def __init__(self, checkpoint: Callable[..., Any], hf_model: nn.Module) -> None:
        self.checkpoint, self.hf_model = checkpoint, hf_model

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def locked(*args: Any, **kwargs: Any) -> Any:
            with alone(self.hf_model):
                return function(*args, **kwargs)

        return self.checkpoint(locked, *args, **kwargs)
