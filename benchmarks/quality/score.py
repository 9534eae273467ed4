"""Log-likelihoods and KL of many policies made of the same two streams, sequence by sequence."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality.data import Row, batches_by_length
from benchmarks.quality.stats import Matrix
from qadapter import QAdapterModel
from qadapter import functional as QF
from qadapter.composition import StreamWeights, stream_weights
from qadapter.text.collator import collate_sequences
from qadapter.text.tokenization import pad_token_id

CHUNK = 256  # rows whose float32 logits exist at a time
Logits = Callable[[slice], list[Tensor]]  # float32, of the base and the LoRA, of some rows
Hidden = dict[str, dict[int, Tensor]]  # of the base: what is scored, batch


def strength(s: float) -> StreamWeights:
    return StreamWeights(s, 1.0 - s)


def trained(alpha_0: float, alpha_tilde: float, center: float) -> StreamWeights:
    return stream_weights((alpha_0, alpha_tilde, center))


def figures(
    model: QAdapterModel,
    tokenizer: Any,
    heldout: list[Row],
    unrelated: list[Row],
    blends: Sequence[StreamWeights],
    hidden: Hidden,
) -> list[dict[str, dict[str, list[float]]]]:
    """Per blend ``pairs`` and ``unrelated``, item by item.

    Of held-out pairs gain, and that of the chosen alone, in nats, and whether the mean
    log-likelihoods of the two responses are in order; of unrelated conversations their tokens, and
    sums over them in nats.
    """
    c, r, u = (
        score(model, tokenizer, rows, side, blends, base_cache=hidden.setdefault(what, {}))
        for what, rows, side in (
            ("chosen", heldout, "chosen"),
            ("rejected", heldout, "rejected"),
            ("unrelated", unrelated, "chosen"),
        )
    )
    chosen, rejected, change = (each["policy_logp"] - each["base_logp"] for each in (c, r, u))
    in_order = c["policy_logp"] / c["tokens"] > r["policy_logp"] / r["tokens"]
    pairs = {"gain": chosen - rejected, "in_order": in_order.astype(float), "chosen": chosen}
    tokens = np.broadcast_to(u["tokens"], change.shape)
    made = {"pairs": pairs, "unrelated": {"tokens": tokens, "kl": u["kl"], "nll_change": -change}}
    return [
        {of: {n: v[i].round(5).tolist() for n, v in each.items()} for of, each in made.items()}
        for i in range(len(blends))
    ]


@torch.no_grad()
def score(
    model: QAdapterModel,
    tokenizer: Any,
    rows: list[Row],
    column: str,
    blends: Sequence[StreamWeights],
    batch_size: int = 4,
    base_cache: dict[int, Tensor] | None = None,
) -> dict[str, Matrix]:
    """For the response ``column`` of every row: its ``tokens``, and sums over them in nats.

    ``base_logp`` [rows]; ``policy_logp`` and ``kl``, KL(base || policy), [blends, rows].
    ``base_cache`` keeps the base's hidden states from call to call: for the same rows, column and
    batch size alone.
    """
    model.eval()
    cache = {} if base_cache is None else base_cache
    lengths = [len(row["prompt_ids"]) + len(row[f"{column}_ids"]) for row in rows]
    made = {name: np.zeros((len(blends), len(rows))) for name in ("policy_logp", "kl")}
    made |= {"tokens": np.zeros(len(rows), dtype=int), "base_logp": np.zeros(len(rows))}
    for place, part in enumerate(batches_by_length(lengths, batch_size)):
        sequences = [(rows[i]["prompt_ids"], rows[i][f"{column}_ids"], False) for i in part]
        batch = collate_sequences(sequences, pad_token_id(tokenizer))
        batch = {name: value.to(model.device) for name, value in batch.items()}
        figures = _rows(_logits(model, batch, cache, place), batch["actions"], blends)
        ends = batch["cu_seqlens"].tolist()
        for i, (begin, end) in zip(part, itertools.pairwise(ends), strict=True):
            made["tokens"][i] = end - begin
            for name, values in figures.items():
                made[name][..., i] = values[..., begin:end].sum(-1)
    return made


def _rows(logits: Logits, actions: Tensor, blends: Sequence[StreamWeights]) -> dict[str, Tensor]:
    """base_logp [N], policy_logp and kl [blends, N], float64 on the CPU."""
    parts = []
    q, b = torch.tensor(blends, device=actions.device)[..., None].unbind(1)
    for chosen in actions.split(CHUNK):
        start = CHUNK * len(parts)
        z_b, z_q = logits(slice(start, start + CHUNK))
        # The difference is small, so means of it are exact to more digits than those of logits.
        d = z_q - z_b
        lse_b = z_b.logsumexp(-1)
        p_b = (z_b - lse_b[:, None]).exp_()
        mean_b, mean_d = torch.linalg.vecdot(p_b, z_b), torch.linalg.vecdot(p_b, d)
        taken_b, taken_d = (z.gather(1, chosen[:, None])[:, 0] for z in (z_b, d))
        lse = torch.stack([_blended_lse(z_b, z_q, chosen, lse_b, *blend) for blend in blends])
        logp = (q + b) * taken_b + q * taken_d - lse
        kl = (mean_b - lse_b) - ((q + b) * mean_b + q * mean_d - lse)
        parts.append((taken_b - lse_b, logp, kl))
    made = (torch.cat(each, -1).double().cpu() for each in zip(*parts, strict=True))
    return dict(zip(("base_logp", "policy_logp", "kl"), made, strict=True))


def _blended_lse(
    z_b: Tensor, z_q: Tensor, actions: Tensor, lse_b: Tensor, q: float, b: float
) -> Tensor:
    """lse(q z_q + b z_b) [N], by the package's op: one read of the logits."""
    if q == 0.0:
        return torch.logsumexp(b * z_b, -1)
    alpha_0 = 1.0 + b / q
    values = QF.residual_values(z_b, z_q, actions, alpha_0=alpha_0, alpha_tilde=1.0 / q, center=1.0)
    return q * (values.value + alpha_0 * lse_b)


def _logits(
    model: QAdapterModel, batch: dict[str, Tensor], base_cache: dict[int, Tensor], place: int
) -> Logits:
    """From hidden states and a float32 product where the head is plain: bfloat16 logits would add
    a KL of their own."""
    ids, rows, mask = batch["input_ids"], batch["rows"], batch["attention_mask"]
    if not model.selects_hidden_rows:
        both = model(ids, mask, rows)
        return lambda part: [z[part].float() for z in both]
    if place not in base_cache:
        base_cache[place] = model._base_hidden(ids, rows, {"attention_mask": mask})
    streams = base_cache[place], model._stream_hidden(ids, rows, {"attention_mask": mask})
    head = model.hf_model.get_output_embeddings()
    weight, bias = head.weight.float(), None if head.bias is None else head.bias.float()
    linear = torch.nn.functional.linear
    return lambda part: [linear(hidden[part].float(), weight, bias) for hidden in streams]
