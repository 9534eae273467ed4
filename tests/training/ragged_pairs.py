"""Pairs of every length, their statistics from a plain forward, and a cache that holds them."""

import torch
from datasets import Dataset

from qadapter.text.collator import PreferenceCollator
from qadapter.training.base_cache import BaseCache, precompute
from tests.tiny_models import make_model

COLLATE = PreferenceCollator(0)
NOTHING = {"format": 1, "weights": "those of the tests"}
KEY = "ab" * 16


class Base:
    """base_statistics from the logits of the base stream, in plain PyTorch; counts its calls."""

    def __init__(self, fail_at=None, error=KeyboardInterrupt):
        self.model = make_model()
        self.device = torch.device("cpu")
        self.pairs = []
        self.fail_at, self.error = fail_at, error

    def base_statistics(self, batch):
        if len(self.pairs) == self.fail_at:
            raise self.error("stopped")
        self.pairs.append((len(batch["cu_seqlens"]) - 1) // 2)
        arguments = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with self.model.adapter_off():
            model = self.model.hf_model
            hidden = model.base_model(**arguments)[0].flatten(0, 1)[batch["rows"]]
            logits = model.get_output_embeddings()(hidden).double()
        logp = logits.log_softmax(-1).gather(1, batch["actions"].clamp(min=0)[:, None])[:, 0]
        return {
            "base_lse": logits.logsumexp(-1).float(),
            "base_logp": logp.masked_fill(batch["actions"] < 0, 0.0).float(),
            "base_hidden": hidden,
        }


def pair(prompt, chosen, rejected, chosen_truncated=False, rejected_truncated=False):
    return {
        "prompt_ids": list(range(3, 3 + prompt)),
        "chosen_ids": list(range(20, 20 + chosen)),
        "rejected_ids": list(range(40, 40 + rejected)),
        "chosen_truncated": chosen_truncated,
        "rejected_truncated": rejected_truncated,
    }


RAGGED = [
    pair(3, 5, 2),
    pair(1, 1, 7, rejected_truncated=True),
    pair(6, 2, 2, True, True),
    pair(2, 9, 1, chosen_truncated=True),
    pair(4, 3, 3),
    pair(3, 5, 2),  # the first one again
]


def ragged():
    return Dataset.from_list(RAGGED)


def alone(base, feature):
    """The statistics of a pair that is a batch of its own."""
    return base.base_statistics(COLLATE([feature]))


def filled(directory, with_hidden=False, **options):
    cache = BaseCache.open(directory, NOTHING, with_hidden)
    done = precompute(Base(), ragged(), cache, COLLATE, progress=False, **options)
    assert done == (5, 1)
    return cache


def shards(directory):
    return sorted(directory.glob("base-*.safetensors"))
