"""The adapters of a model: which there are, and the streams that run with them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qadapter.composition import Composition, Names
from qadapter.model import locking, probes, saving, values
from qadapter.model.streams import Streams, switches
from qadapter.model.trainer_hooks import TrainerHooks

logger = logging.getLogger(__name__)


class AdapterStreams(TrainerHooks):
    """The adapters of a PEFT model and their streams; a base class."""

    alpha_0: float
    alpha_tilde: float
    center: float

    def __init__(self) -> None:
        super().__init__()
        self._others: dict[str, Composition] = {}
        self._seen: set[str] = set()
        self._why_no_cache: tuple[str | None] | None = None  # tried when it is first needed
        self._why_no_padding: dict[bool, str | None] = {}

    def load_adapter(self, directory: str | Path, name: str) -> None:
        """Attach another saved adapter of the same base, for `generate` with ``adapters``.

        It takes part in nothing else: training, `forward` and saving stay with the model's own.

        Raises:
            ValueError: ``directory`` is not a saved adapter, or one of another base; ``name`` is
                taken or empty or has a dot.
        """
        self._others[name] = saving.attach(self.peft_model, directory, name)

    @property
    def adapter_names(self) -> list[str]:
        """The model's own adapter first, then those of `load_adapter` and of PEFT."""
        return list(self.compositions)

    @property
    def compositions(self) -> dict[str, Composition]:
        """Of each adapter, as trained, the model's own first; its, too, where PEFT alone knows the
        adapter."""
        own = Composition(self.alpha_0, self.alpha_tilde, self.center)
        active = str(self.peft_model.active_adapter)
        names = [active, *(name for name in self.peft_model.peft_config if name != active)]
        return {name: self._others.get(name, own) for name in names}

    def streams(self, names: Names) -> Streams:
        """How the streams ``names`` (None is the base) run at decoding; says so where that takes a
        pass for each, or the whole text at every token."""
        with locking.alone(self.hf_model):
            self._see_adapters()
            found = self._streams.get(names)
            if found is None or found.is_stale():
                found = self._streams[names] = Streams(self.peft_model, names)
                if found.reason is not None and len(names) > 1:
                    logger.warning("each stream takes a forward pass of its own: %s", found.reason)
                if self._why_no_cache is None:
                    self._why_no_cache = (probes.why_no_cache(found),)
                found.uncached = self._why_no_cache[0]
                if found.uncached is not None:
                    logger.warning("every token takes a pass of the whole text: %s", found.uncached)
            return found

    def _check_padding(self, streams: Streams) -> None:
        """ValueError where the base counts padding on the left in."""
        cached = streams.uncached is None
        if cached not in self._why_no_padding:
            self._why_no_padding[cached] = probes.why_no_padding(streams, cached)
        if (reason := self._why_no_padding[cached]) is not None:
            raise ValueError(
                f"attention_mask: {type(self.hf_model).__name__} takes no padding on the left "
                f"({reason}); give prompts of one length, or one prompt at a time"
            )

    def _see_adapters(self) -> None:
        """Look again where PEFT's layers are if there are other adapters than before."""
        if self._seen == set(self.peft_model.peft_config):
            return
        self._seen = set(self.peft_model.peft_config)
        self._switches: list[Any] = switches(self.peft_model)
        self._streams: dict[Names, Streams] = {}
        self.selects_hidden_rows = values.head_is_plain(self.hf_model)

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """Inside, the model is the frozen base.

        PEFT's own context manager also walks every module and changes requires_grad, milliseconds
        per use; here only the flags that its layers read are set.
        """
        with locking.alone(self.hf_model):
            self._see_adapters()
            before = [module._disable_adapters for module in self._switches]
            for module in self._switches:
                module._disable_adapters = True
            try:
                yield
            finally:
                for module, flag in zip(self._switches, before, strict=True):
                    module._disable_adapters = flag
