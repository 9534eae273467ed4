"""Tried on a few tokens: is the base stream the base that was given, and the adapter's the adapter?

Read off a config, the answer would hold for what is known of PEFT today.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from qadapter.model.checkpoint import is_adapter_name
from qadapter.model.streams import evaluating, switches

logger = logging.getLogger(__name__)
TOKENS = 8
REPEATS = 3


class BaseProbe:
    """What a base gives now, for `check` to compare with after something was done to it."""

    @torch.no_grad()
    def __init__(self, model: nn.Module) -> None:
        self.before = _frozen_logits(model).clone()

    @torch.no_grad()
    def check(self, model: nn.Module, what: str) -> None:
        """ValueError if the base gives something else since ``what``.

        The same code runs before and after, so not a bit may differ; only where a base does not
        repeat itself (atomic sums on a GPU) as much as it differs from itself.
        """
        after = _frozen_logits(model)
        if after.shape == self.before.shape and torch.equal(after, self.before):
            return
        far = _distance(after, self.before)
        noise = max(_distance(after, _frozen_logits(model)) for _ in range(REPEATS))
        if not far <= 4 * noise:
            raise ValueError(
                f"{what} changes the base: with the adapter off its logits are off by {far:.2g}, "
                "so there is no base stream left to compose with; load the base again"
            )


def check_streams(peft_model: PeftModel) -> None:
    """ValueError if the adapter takes part while it is off, or does not while it is on.

    Looked for in the graph that autograd makes, where an adapter is seen that is still zero.
    """
    model: Any = peft_model.get_base_model()
    name = str(peft_model.active_adapter)
    mine = {
        n: p for n, p in model.named_parameters() if is_adapter_name(n) and p.is_floating_point()
    }
    if any(p.is_inference() for p in mine.values()):
        return  # made in inference mode, where there are no graphs
    with torch.inference_mode(False), torch.enable_grad(), _requiring_grad(list(mine.values())):
        reached = _parameters_of(_base_logits(model))
        still = [n for n, p in mine.items() if p in reached]
        if still:
            raise ValueError(
                f"adapter {name!r}: turned off, it still takes part ({still[0]}, ...): there is no "
                "base stream"
            )
        try:
            reached = _parameters_of(_logits(model))
        except Exception as error:  # whatever the adapter's own code makes of it
            raise ValueError(
                f"adapter {name!r}: a forward with it fails ({type(error).__name__}: {error})"
            ) from error
    if not any(p in reached for p in mine.values()):
        raise ValueError(
            f"adapter {name!r}: none of its {len(mine)} weights takes part in a forward, so its "
            "stream would be the base (is it disabled, or does it need arguments of its own?)"
        )
    _warn_of_idle_layers(model, name, reached)


def _warn_of_idle_layers(model: nn.Module, name: str, reached: set[Tensor]) -> None:
    weights = {
        path: [
            parameter
            for n, parameter in module.named_parameters()  # type: ignore[attr-defined]
            if f".{name}" in n and is_adapter_name(f".{n}")
        ]
        for path, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    idle = [path for path, mine in weights.items() if mine and reached.isdisjoint(mine)]
    if idle:
        logger.warning(
            "adapter %r: %d adapted layers take no part in a short text, because the model reads "
            "their weights itself or does not call them: %s%s",
            name,
            len(idle),
            ", ".join(idle[:3]),
            ", ..." if len(idle) > 3 else "",
        )


def _logits(model: Any) -> Tensor:
    vocab = model.get_input_embeddings().weight.shape[0]
    # Low ids: those of images and of other things that need more than a text are high.
    ids = torch.arange(1, 1 + TOKENS, device=model.device).clamp(max=vocab - 1)[None]
    with evaluating(model):
        return model(input_ids=ids, use_cache=False).logits


def _frozen_logits(model: nn.Module) -> Tensor:
    """Those of a base as an adapter leaves it, frozen: `torch.matmul` takes other products, which
    may round differently, where a weight wants a gradient."""
    with _requiring_grad([p for p in model.parameters() if p.requires_grad], False):
        return _base_logits(model)


def _base_logits(model: nn.Module) -> Tensor:
    """[1, TOKENS, V]; ValueError for a model that makes something else of a text, or nothing."""
    name = type(model).__name__
    try:
        with _off(model):
            logits = _logits(model)
    except Exception as error:  # whatever a model's own code makes of it
        raise ValueError(
            f"{name}: a forward with nothing but token ids fails ({type(error).__name__}: {error})"
        ) from error
    if logits.ndim != 3 or logits.shape[:2] != (1, TOKENS):
        raise ValueError(
            f"{name}: the logits of one text of {TOKENS} tokens are {list(logits.shape)}; expected "
            f"[1, {TOKENS}, vocabulary]"
        )
    return logits


def _distance(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        return float("inf")
    return (one.float() - other.float()).abs().max().item()


@contextmanager
def _off(model: nn.Module) -> Iterator[None]:
    modules: list[Any] = switches(model)
    before = [module._disable_adapters for module in modules]
    for module in modules:
        module._disable_adapters = True
    try:
        yield
    finally:
        for module, flag in zip(modules, before, strict=True):
            module._disable_adapters = flag


@contextmanager
def _requiring_grad(parameters: list[nn.Parameter], wanted: bool = True) -> Iterator[None]:
    before = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad = wanted
    try:
        yield
    finally:
        for parameter, flag in zip(parameters, before, strict=True):
            parameter.requires_grad = flag


def _parameters_of(out: Tensor) -> set[Tensor]:
    """The leaves of the graph that made ``out``."""
    found: set[Tensor] = set()
    seen: set[Any] = {None}
    nodes: list[Any] = [out.grad_fn]
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        nodes.extend(following for following, _ in node.next_functions)
    return found
