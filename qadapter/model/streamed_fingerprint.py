"""The fingerprint of a base whose weights pass by one at a time, as a server loads them."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qadapter.model import checkpoint


class StreamedFingerprint:
    """What `checkpoint.fingerprint` says of a model, without the model.

    Args:
        config: of the base; its model is made on the meta device, for names and shapes.
    """

    def __init__(self, config: Any) -> None:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
        matrices = checkpoint.plain_matrices(model)
        embedding = model.get_input_embeddings().weight
        self._embedding = next(n for n, p in model.named_parameters() if p is embedding)
        self._last = list(matrices)[-1]
        self._entries = checkpoint.body_entries(matrices)
        self._known = {
            "model_type": config.get_text_config().model_type,
            "hidden_size": int(embedding.shape[1]),
            "vocab_size": int(embedding.shape[0]),
            "quantisation": checkpoint.quantisation(model),
        }
        self._probes: dict[str, list[float]] = {}
        self._body: dict[str, float] = {}

    def watch(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same weights, looked at on the way; names are those of the base's files."""
        for name, weight in weights:
            if name == self._embedding:
                self._probes["embedding_probe"] = checkpoint.probe(weight)
            if name == self._last:
                self._probes["layer_probe"] = checkpoint.probe(weight)
            if name in self._entries:
                self._body[name] = checkpoint.body_value(weight, self._entries[name])
            yield name, weight

    def compared_with(self, saved: dict[str, Any]) -> dict[str, Any]:
        """The fingerprint, with what ``saved`` has where files call a weight otherwise: what was
        not seen is not compared."""
        unseen = {name: saved[name] for name in ("embedding_probe", "layer_probe")}
        return {**unseen, **self._known, **self._probes, "body_probe": self._body}
