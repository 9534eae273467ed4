"""What a trained adapter did: preference accuracy, and what it cost the base.

Forgetting is measured per token on text that has nothing to do with the preference:
KL(pi_base || pi) over the whole vocabulary, and the change in negative log-likelihood of the text.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from tqdm.auto import tqdm

from qadapter import functional as QF
from qadapter.model.modeling import QAdapterModel
from qadapter.model.values import BothStreams
from qadapter.ops import checks
from qadapter.outputs import ResidualValues
from qadapter.text.collator import collate_sequences
from qadapter.text.data import load_responses, prepare_dataset
from qadapter.text.tokenization import eos_token_ids, pad_token_id
from qadapter.training.preparation import check_fit

DEMO_DATA = Path(__file__).parents[1] / "demo_data"
UNRELATED = DEMO_DATA / "unrelated.jsonl"


class _Forgetting:
    """Running sums over scored rows."""

    def __init__(self) -> None:
        self.tokens, self.kl, self.base_nll, self.policy_nll = 0, 0.0, 0.0, 0.0

    def add(
        self,
        composition: dict[str, Any],
        streams: BothStreams,
        values: ResidualValues,
        actions: Tensor,
        count: int,
    ) -> None:
        """The first ``count`` rows of a batch, whose ``values`` are of ``composition``."""
        scored = (actions != -100)[:count]
        self.tokens += int(scored.sum())
        self.base_nll -= float(values.base_logp[:count].double().sum())
        self.policy_nll -= float(values.policy_logp[:count].double().sum())
        kl = streams.first(count).kl(composition, values.value[:count])
        self.kl += float(kl[scored].double().sum())

    def report(self) -> dict[str, Any]:
        count = max(1, self.tokens)
        base, policy = self.base_nll / count, self.policy_nll / count
        return {
            "tokens": self.tokens,
            "kl_base_policy": self.kl / count,
            "nll_base": base,
            "nll_policy": policy,
            "delta_nll": policy - base,
        }


def evaluate_preferences(
    model: QAdapterModel,
    tokenizer: Any,
    dataset: Dataset,
    *,
    batch_size: int = 4,
    max_length: int = 1024,
    drop_long_prompts: bool = True,
    value_at: str = "next",
    length_norm: str = "none",
    progress: bool = True,
) -> dict[str, Any]:
    """How the residual rewards rank held-out pairs, and what happened on the chosen responses.

    ``accuracy`` is the share of pairs whose chosen response has the larger reward (0 for the
    untrained adapter with center=1, where every margin is 0), with its standard error;
    ``accuracy_base`` ranks by the base's own mean log-likelihood, ``accuracy_policy`` by that of
    the composed policy. ``chosen`` holds `evaluate_forgetting`'s figures on the chosen responses.
    """
    prepared = prepare(model, tokenizer, dataset, max_length, drop_long_prompts)
    pad = pad_token_id(tokenizer, model)
    margins: list[Tensor] = []
    base_margins: list[Tensor] = []
    policy_margins: list[Tensor] = []
    chosen = _Forgetting()
    for batch in batches(prepared, ("chosen", "rejected"), batch_size, pad, progress):
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        streams, actions = forward(model, batch), batch["actions"]
        cu_seqlens = batch["cu_seqlens"]
        values = streams.values(actions, model.composition)
        outputs = QF.preference_loss(
            values,
            actions,
            cu_seqlens,
            gamma=model.gamma,
            value_at=value_at,
            length_norm=length_norm,
        )
        margins.append(outputs.margins.cpu())
        for logp, into in ((values.base_logp, base_margins), (values.policy_logp, policy_margins)):
            into.append(likelihood_margins(logp, actions, cu_seqlens).cpu())
        chosen.add(
            model.composition, streams, values, actions, int(cu_seqlens[outputs.margins.numel()])
        )
    all_margins = torch.cat(margins)
    accuracy = share_above_zero(all_margins)
    count = all_margins.numel()
    return {
        "pairs": count,
        "dropped": len(dataset) - count,
        "accuracy": accuracy,
        "accuracy_se": (accuracy * (1 - accuracy) / count) ** 0.5,
        "mean_margin": float(all_margins.mean()),
        "accuracy_base": share_above_zero(torch.cat(base_margins)),
        "accuracy_policy": share_above_zero(torch.cat(policy_margins)),
        "chosen": chosen.report(),
    }


def evaluate_forgetting(
    model: QAdapterModel,
    tokenizer: Any,
    dataset: Dataset,
    *,
    batch_size: int = 4,
    max_length: int = 1024,
    drop_long_prompts: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """KL(base || policy) and the change in negative log-likelihood, nats per token.

    ``dataset`` is in the preference format; its ``chosen`` responses are the text.
    """
    return forgetting_of(
        model,
        tokenizer,
        dataset,
        [model.composition],
        batch_size=batch_size,
        max_length=max_length,
        drop_long_prompts=drop_long_prompts,
        progress=progress,
    )[0]


def forgetting_of(
    model: QAdapterModel,
    tokenizer: Any,
    dataset: Dataset,
    compositions: Sequence[dict[str, Any]],
    *,
    batch_size: int = 4,
    max_length: int = 1024,
    drop_long_prompts: bool = True,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """`evaluate_forgetting` at each of ``compositions`` (as `QAdapterModel.composition_at` gives
    them); both streams pass over the text once."""
    prepared = prepare(model, tokenizer, dataset, max_length, drop_long_prompts)
    pad = pad_token_id(tokenizer, model)
    sums = [_Forgetting() for _ in compositions]
    for batch in batches(prepared, ("chosen",), batch_size, pad, progress):
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        streams, actions = forward(model, batch), batch["actions"]
        for of_one, composition in zip(sums, compositions, strict=True):
            values = streams.values(actions, composition)
            of_one.add(composition, streams, values, actions, actions.numel())
    return [{"responses": len(prepared), **of_one.report()} for of_one in sums]


def load_unrelated(path: str | Path | None = None) -> Dataset:
    """Text for `evaluate_forgetting`; None takes the general questions and answers shipped here.

    Rows are preference pairs, or have ``prompt`` and ``response`` alone.
    """
    return load_responses(UNRELATED if path is None else path)


def prepare(
    model: QAdapterModel, tokenizer: Any, dataset: Dataset, max_length: int, drop: bool
) -> Dataset:
    """Tokenised; ValueError for what the model has no position or embedding for."""
    if isinstance(dataset, IterableDataset):
        raise TypeError(
            "dataset: expected a datasets.Dataset, whose rows can be counted, got a stream"
        )
    checks.whole("max_length", max_length, 2)
    prepared = prepare_dataset(
        dataset,
        tokenizer,
        max_length=max_length,
        eos_token_ids=eos_token_ids(model, tokenizer),
        drop_long_prompts=drop,
    )
    check_fit(prepared, model, tokenizer, "evaluation")
    return prepared


def batches(
    prepared: Dataset, columns: Sequence[str], batch_size: int, pad: int, progress: bool
) -> Any:
    """Batches of examples of like length, so that little of them is padding."""
    checks.whole("batch_size", batch_size)
    rows = list(prepared)
    rows.sort(key=lambda row: len(row["prompt_ids"]) + max(len(row[f"{c}_ids"]) for c in columns))
    starts = range(0, len(rows), batch_size)
    for start in tqdm(starts, desc="Evaluating", disable=not progress):
        part = rows[start : start + batch_size]
        sequences = [
            (row["prompt_ids"], row[f"{column}_ids"], row[f"{column}_truncated"])
            for column in columns
            for row in part
        ]
        yield collate_sequences(sequences, pad)


@torch.no_grad()
def forward(model: QAdapterModel, batch: dict[str, Tensor]) -> BothStreams:
    """Both streams in the rows of a batch."""
    model.eval()
    return model.both_streams(batch["input_ids"], batch["rows"], batch["attention_mask"])


def likelihood_margins(
    logp: Tensor, actions: Tensor, cu_seqlens: Tensor, length_norm: str = "response"
) -> Tensor:
    """Of each pair [P], the mean of ``logp`` over the chosen response less that over the rejected;
    with ``length_norm="none"``, the sums."""
    nothing = torch.zeros_like(logp)
    values = ResidualValues(logp, nothing, nothing, nothing, nothing)
    return QF.preference_loss(values, actions, cu_seqlens, length_norm=length_norm).margins


def share_above_zero(margins: Tensor) -> float:
    return float((margins > 0).double().mean())


def table(report: dict[str, Any]) -> str:
    """The report of ``qadapter eval`` as aligned text."""
    lines = []
    preference = report.get("preference")
    if preference:
        lines += [
            f"preference ({preference['pairs']} pairs, {preference['dropped']} dropped)",
            f"  accuracy                     {preference['accuracy']:8.3f} "
            f"+- {preference['accuracy_se']:.3f}",
            f"  mean margin                  {preference['mean_margin']:8.4f}",
            f"  accuracy of base likelihood  {preference['accuracy_base']:8.3f}",
            f"  accuracy of policy likelihood{preference['accuracy_policy']:8.3f}",
        ]
    sections = {
        "chosen responses of the data": preference and preference["chosen"],
        "forgetting, unrelated text": report.get("forgetting"),
    }
    for title, figures in sections.items():
        if figures:
            lines += [
                f"{title} ({figures['tokens']} tokens)",
                f"  KL(base || policy) per token {figures['kl_base_policy']:8.4f} nats",
                f"  negative log-likelihood      {figures['nll_base']:8.4f} -> "
                f"{figures['nll_policy']:.4f} ({figures['delta_nll']:+.4f})",
            ]
    anchors = report.get("anchors")
    if anchors:
        budget = report.get("kl_budget")
        lines += [
            f"anchors ({anchors['texts']} texts, {anchors['tokens']} tokens)",
            f"  KL(base || policy) per token {anchors['kl_base_policy']:8.4f} nats "
            f"({anchors['kl_low']:.4f} to {anchors['kl_high']:.4f})"
            + ("" if budget is None else f", budget {budget:g}"),
        ]
    return "\n".join(lines)
