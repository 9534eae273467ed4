"""Log-likelihoods and KL of many policies made of the same two streams, sequence by sequence."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality.data import Row, batches_by_length
from benchmarks.quality.stats import Matrix
from qadapter import QAdapterModel, reference
from qadapter import functional as QF
from qadapter.composition import StreamWeights, stream_weights
from qadapter.model import packed_attention
from qadapter.outputs import BaseMoments
from qadapter.text.collator import PreferenceCollator
from qadapter.text.packing import PackedPreferenceCollator
from qadapter.text.tokenization import pad_token_id

CHUNK = 256  # rows whose float32 logits exist at a time
PAIR = ("chosen", "rejected")
Logits = Callable[[slice], list[Tensor]]  # float32, of the base and the LoRA, of some rows


class Stream(NamedTuple):
    """Hidden states of a batch, and of the base `QF.base_moments` where KL is asked for."""

    hidden: Tensor
    moments: BaseMoments | None = None


Known = dict[str, dict[int, Stream]]  # what is scored, batch


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
    known: Known,
    own: Known,
) -> list[dict[str, dict[str, list[float]]]]:
    """Per blend ``pairs`` and ``unrelated``, item by item.

    ``known`` and ``own`` keep the hidden states of the base, and of these weights of the LoRA.
    Of held-out pairs gain, and that of the chosen alone, in nats, and whether the mean
    log-likelihoods of the two responses are in order; of unrelated conversations their tokens, and
    sums over them in nats.
    """
    both, u = (
        score(
            model,
            tokenizer,
            rows,
            columns,
            blends,
            known=known.setdefault(what, {}),
            own=own.setdefault(what, {}),
            with_kl=with_kl,
        )
        for what, rows, columns, with_kl in (
            ("pairs", heldout, PAIR, False),
            ("unrelated", unrelated, PAIR[:1], True),
        )
    )
    change, per_token = u["policy_logp"] - u["base_logp"], both["policy_logp"] / both["tokens"]
    chosen, rejected = np.split(both["policy_logp"] - both["base_logp"], 2, axis=-1)
    in_order = np.greater(*np.split(per_token, 2, axis=-1))
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
    columns: Sequence[str],
    blends: Sequence[StreamWeights],
    batch_size: int = 4,
    known: dict[int, Stream] | None = None,
    own: dict[int, Stream] | None = None,
    with_kl: bool = True,
) -> dict[str, Matrix]:
    """For the response of every row, or the responses of both `columns`, all of the first before
    all of the second: its ``tokens``, and sums over them in nats.

    ``base_logp`` [responses]; ``policy_logp`` and ``kl``, KL(base || policy), [blends, responses].
    A prompt is computed once for both. ``known`` keeps what is the base's from call to call, for
    the same rows, columns and batch size alone, ``own`` what is the LoRA's.
    """
    model.eval()
    known, own = ({} if cache is None else cache for cache in (known, own))
    first, last = columns[0], columns[-1]
    packs = packed_attention.enable(model.hf_model) is None
    collate = PackedPreferenceCollator() if packs else PreferenceCollator(pad_token_id(tokenizer))
    count = len(rows) * len(columns)
    made = {name: np.zeros((len(blends), count)) for name in ("policy_logp", "kl")}
    made |= {"tokens": np.zeros(count, dtype=int), "base_logp": np.zeros(count)}
    lengths = [len(row["prompt_ids"]) + sum(len(row[f"{c}_ids"]) for c in columns) for row in rows]
    head: Any = model.hf_model.get_output_embeddings()
    weights = [None if w is None else w.float() for w in (head.weight, head.bias)]
    for place, part in enumerate(batches_by_length(lengths, batch_size)):
        pairs = [
            {"prompt_ids": row["prompt_ids"]}
            | {f"{to}_ids": row[f"{c}_ids"] for to, c in zip(PAIR, (first, last), strict=True)}
            for row in (rows[i] for i in part)
        ]
        batch = {n: v.to(model.device) if isinstance(v, Tensor) else v
                 for n, v in collate(pairs).items()}  # fmt: skip
        ends = batch.pop("cu_seqlens")[: len(part) * len(columns) + 1].tolist()
        at, actions = (batch.pop(name)[: ends[-1]] for name in ("rows", "actions"))
        for name in ("unique_rows", "unique_index"):
            batch.pop(name, None)
        logits = _logits(model, batch, at, weights, known, own, place, with_kl)
        figures = _figures(*logits, actions, blends, with_kl)
        numbers = [c * len(rows) + i for c in range(len(columns)) for i in part]
        for i, (begin, end) in zip(numbers, itertools.pairwise(ends), strict=True):
            made["tokens"][i] = end - begin
            for name, values in figures.items():
                made[name][..., i] = values[..., begin:end].sum(-1)
    return made


def _logits(
    model: QAdapterModel,
    batch: dict[str, Any],
    rows: Tensor,
    weights: list[Tensor | None],
    known: dict[int, Stream],
    own: dict[int, Stream],
    place: int,
    with_kl: bool,
) -> tuple[Logits, Stream, Stream]:
    """Where the head is plain, logits are a float32 product of hidden states (bfloat16 logits would
    add a KL of their own), made once for all blends: the fused operation, which makes them once
    for each, takes longer."""
    ids, none = batch.pop("input_ids"), Stream(torch.empty(0))
    if not model.selects_hidden_rows:
        both = model(ids, rows=rows, **batch)
        return lambda part: [z[part].float() for z in both], none, none
    if place not in known:
        hidden, head = model._base_hidden(ids, rows, batch), model.hf_model.get_output_embeddings()
        made = QF.base_moments(hidden, head.weight, bias=head.bias) if with_kl else None
        known[place] = Stream(hidden, made and BaseMoments(*made))
    if place not in own:
        own[place] = Stream(model._stream_hidden(ids, rows, batch))
    streams, linear = (known[place], own[place]), torch.nn.functional.linear
    return lambda part: [linear(s.hidden[part].float(), *weights) for s in streams], *streams


def _figures(
    logits: Logits,
    base: Stream,
    own: Stream,
    actions: Tensor,
    blends: Sequence[StreamWeights],
    with_kl: bool,
) -> dict[str, Tensor]:
    """base_logp [N], policy_logp and (``with_kl``) kl [blends, N], float64 on the CPU."""
    parts = []
    for start in range(0, len(actions), CHUNK):
        at = slice(start, start + CHUNK)
        z_b, z_q = logits(at)
        base_logp = QF.residual_values(z_b, z_q, actions[at]).base_logp
        logp, kls = [], []
        for q, b in blends:
            if q == 0.0:  # the base itself
                logp.append(base_logp)
                kls.append(torch.zeros_like(base_logp))
                continue
            composition = {"alpha_0": 1.0 + b / q, "alpha_tilde": 1.0 / q, "center": 1.0}
            values = QF.residual_values(z_b, z_q, actions[at], **composition)
            logp.append(values.policy_logp)
            if base.moments is not None:
                moments = base.moments.rows(at)
                kls.append(QF.kl_to_base(values.value, own.hidden[at], moments, **composition))
            elif with_kl:
                kls.append(reference.kl_base_policy(z_b, z_q, **composition))
        part = {"base_logp": base_logp, "policy_logp": torch.stack(logp)}
        parts.append(part | ({"kl": torch.stack(kls)} if kls else {}))
    return {n: torch.cat([p[n] for p in parts], -1).double().cpu() for n in parts[0]}
