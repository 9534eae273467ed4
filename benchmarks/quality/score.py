"""Log-likelihoods and KL of many policies made of the same two streams, sequence by sequence."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.data import Row, batches_by_length
from qadapter import QAdapterModel
from qadapter import functional as QF
from qadapter.composition import StreamWeights, stream_weights
from qadapter.text.collator import collate_sequences
from qadapter.text.tokenization import pad_token_id

CHUNK = 256  # rows whose float32 logits exist at a time
Logits = Callable[[slice], tuple[Tensor, Tensor]]  # float32, of the base and the LoRA


def strength(s: float) -> StreamWeights:
    return StreamWeights(s, 1.0 - s)


def trained(alpha_0: float, alpha_tilde: float, center: float) -> StreamWeights:
    return stream_weights((alpha_0, alpha_tilde, center))


@torch.no_grad()
def score(
    model: QAdapterModel,
    tokenizer: Any,
    rows: list[Row],
    column: str,
    blends: Sequence[StreamWeights],
    batch_size: int = 4,
    base_cache: dict[int, Tensor] | None = None,
) -> list[dict[str, Any]]:
    """For the response ``column`` of every row: its tokens, and sums over them in nats.

    ``base_logp``, and for each blend ``policy_logp`` and ``kl``, KL(base || policy).
    ``base_cache`` keeps the base's hidden states from call to call: for the same rows, column and
    batch size alone.
    """
    model.eval()
    lengths = [len(row["prompt_ids"]) + len(row[f"{column}_ids"]) for row in rows]
    results: list[dict[str, Any]] = [{} for _ in rows]
    for place, part in enumerate(batches_by_length(lengths, batch_size)):
        sequences = [(rows[i]["prompt_ids"], rows[i][f"{column}_ids"], False) for i in part]
        batch = collate_sequences(sequences, pad_token_id(tokenizer))
        batch = {name: value.to(model.device) for name, value in batch.items()}
        logits = _logits(model, batch, {} if base_cache is None else base_cache, place)
        base, policy, kl = _rows(logits, batch["actions"], blends)
        ends = batch["cu_seqlens"].tolist()
        for i, (begin, end) in zip(part, itertools.pairwise(ends), strict=True):
            results[i] = {
                "tokens": end - begin,
                "base_logp": float(base[begin:end].sum()),
                "policy_logp": policy[:, begin:end].sum(1).tolist(),
                "kl": kl[:, begin:end].sum(1).tolist(),
            }
    return results


def _rows(
    logits: Logits, actions: Tensor, blends: Sequence[StreamWeights]
) -> tuple[Tensor, Tensor, Tensor]:
    """base_logp [N], policy_logp and kl [blends, N], float64 on the CPU."""
    parts = []
    for start in range(0, actions.shape[0], CHUNK):
        part = slice(start, start + CHUNK)
        z_b, z_q = logits(part)
        chosen = actions[part]
        # The difference is small, so means of it are exact to more digits than those of logits.
        d = z_q - z_b
        lse_b = z_b.logsumexp(-1)
        p_b = (z_b - lse_b[:, None]).exp_()
        mean_b, mean_d = torch.linalg.vecdot(p_b, z_b), torch.linalg.vecdot(p_b, d)
        taken_b, taken_d = (z.gather(1, chosen[:, None])[:, 0] for z in (z_b, d))
        logps, kls = [], []
        for q, b in blends:
            lse = _blended_lse(z_b, z_q, chosen, lse_b, q, b)
            logps.append((q + b) * taken_b + q * taken_d - lse)
            kls.append((mean_b - lse_b) - ((q + b) * mean_b + q * mean_d - lse))
        parts.append((taken_b - lse_b, torch.stack(logps), torch.stack(kls)))
    base, policy, kl = (torch.cat(made, -1).double().cpu() for made in zip(*parts, strict=True))
    return base, policy, kl


def _blended_lse(
    z_b: Tensor, z_q: Tensor, actions: Tensor, lse_b: Tensor, q: float, b: float
) -> Tensor:
    """lse(q z_q + b z_b) [N], by the package's op: one read of the logits."""
    if q == 0.0:
        return torch.logsumexp(b * z_b, -1)
    alpha_0, alpha_tilde = 1.0 + b / q, 1.0 / q
    values = QF.residual_values(
        z_b, z_q, actions, alpha_0=alpha_0, alpha_tilde=alpha_tilde, center=1.0
    )
    return q * (values.value + alpha_0 * lse_b)


def _logits(
    model: QAdapterModel, batch: dict[str, Tensor], base_cache: dict[int, Tensor], place: int
) -> Logits:
    """Of both streams, a part of the rows at a time.

    From hidden states and a float32 product where the head is plain: bfloat16 logits would add a
    KL of their own.
    """
    ids, rows, mask = batch["input_ids"], batch["rows"], batch["attention_mask"]
    if not model.selects_hidden_rows:
        logits = model(ids, mask, rows)
        return lambda part: (logits[0][part].float(), logits[1][part].float())
    if place not in base_cache:
        base_cache[place] = model._base_hidden(ids, rows, {"attention_mask": mask})
    streams = base_cache[place], model._stream_hidden(ids, rows, {"attention_mask": mask})
    head = model.hf_model.get_output_embeddings()
    weight, bias = head.weight.float(), None if head.bias is None else head.bias.float()

    def of(part: slice) -> tuple[Tensor, Tensor]:
        base, q = (
            torch.nn.functional.linear(hidden[part].float(), weight, bias) for hidden in streams
        )
        return base, q

    return of
