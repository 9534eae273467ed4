"""Preference against KL to the base over strengths of one adapter.

Both streams pass over the rows once; every strength then takes products with the head alone.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from qadapter.model.modeling import QAdapterModel
from qadapter.ops import checks
from qadapter.text.anchors import Anchor
from qadapter.text.collator import PreferenceCollator
from qadapter.text.tokenization import pad_token_id
from qadapter.training import evaluation
from qadapter.training.anchors import on_device
from qadapter.training.strength import mean_and_interval

STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)


class TextKL(NamedTuple):
    """KL(base || policy) of n texts at C compositions."""

    sums: Tensor
    """float64 [C, n], in nats over the states of each text."""
    states: Tensor
    """int64 [n], how many these are."""

    def figures(self, composition: int = 0) -> dict[str, Any]:
        """Per token, with its 95 % interval by bootstrap over the texts."""
        mean, low, high = mean_and_interval(self.sums[composition], self.states)
        return {"kl_base_policy": mean, "kl_low": low, "kl_high": high}


@torch.no_grad()
def text_kl(
    model: QAdapterModel,
    tokenizer: Any,
    texts: Sequence[Anchor],
    compositions: Sequence[dict[str, Any]],
    *,
    batch_size: int = 4,
    progress: bool = True,
) -> TextKL:
    """KL in the states of texts, at each of ``compositions`` (as `QAdapterModel.composition`)."""
    checks.whole("batch_size", batch_size)
    model.eval()
    collate = PreferenceCollator(pad_token_id(tokenizer, model))
    sums = torch.zeros(len(compositions), len(texts), dtype=torch.float64)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i].ids))
    starts = range(0, len(order), batch_size)
    for start in tqdm(starts, desc="KL of texts", disable=not progress):
        part = order[start : start + batch_size]
        batch = on_device(collate([], [texts[i] for i in part]), model.device)
        rows = batch["anchors"]["rows"]
        streams = model.both_streams(batch["input_ids"], rows, batch["attention_mask"])
        for number, composition in enumerate(compositions):
            pieces = streams.kl(composition).double().split([texts[i].states for i in part])
            sums[number, part] = torch.stack([piece.sum() for piece in pieces]).cpu()
    return TextKL(sums, torch.tensor([text.states for text in texts]))


@torch.no_grad()
def preferences(
    model: QAdapterModel,
    tokenizer: Any,
    dataset: Dataset,
    strengths: Sequence[float],
    *,
    batch_size: int = 4,
    max_length: int = 1024,
    progress: bool = True,
) -> list[dict[str, float]]:
    """At each strength, by likelihood: ``accuracy``, the share of pairs whose chosen response is
    the likelier one a token, and ``gain``, the mean in nats a pair of

        log pi(chosen) / pi(rejected) - log pi_base(chosen) / pi_base(rejected)
    """
    prepared = evaluation.prepare(model, tokenizer, dataset, max_length, True)
    pad = pad_token_id(tokenizer, model)
    means: list[list[Tensor]] = [[] for _ in strengths]
    gains: list[list[Tensor]] = [[] for _ in strengths]
    columns = ("chosen", "rejected")
    for batch in evaluation.batches(prepared, columns, batch_size, pad, progress):
        batch = on_device(batch, model.device)
        streams = evaluation.forward(model, batch)
        of_batch = batch["actions"], batch["cu_seqlens"]
        for number, strength in enumerate(strengths):
            values = streams.values(batch["actions"], model.composition_at(strength))
            mean = evaluation.likelihood_margins(values.policy_logp, *of_batch)
            moved = values.policy_logp - values.base_logp
            gain = evaluation.likelihood_margins(moved, *of_batch, length_norm="none")
            means[number].append(mean.cpu())
            gains[number].append(gain.cpu())
    return [
        {
            "accuracy": evaluation.share_above_zero(torch.cat(of_mean)),
            "gain": float(torch.cat(of_gain).double().mean()),
        }
        for of_mean, of_gain in zip(means, gains, strict=True)
    ]


def table(points: Sequence[dict[str, Any]], kl_on: str, recommended: float | None = None) -> str:
    """Points with ``strength`` and the figures of `preferences` and `TextKL` as aligned text."""
    lines = [
        f"strengths; KL(base || policy) on {kl_on}, nats a token",
        "  strength  pairs right  gain, nats a pair  KL",
    ]
    for point in points:
        mark = "  recommended" if point["strength"] == recommended else ""
        lines.append(
            f"  {point['strength']:8.3g} {point['accuracy']:12.3f} {point['gain']:18.3f}  "
            f"{point['kl_base_policy']:.4f} ({point['kl_low']:.4f} to {point['kl_high']:.4f}){mark}"
        )
    return "\n".join(lines)
