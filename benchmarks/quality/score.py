"""Log-likelihoods and KL of many policies made of the same two streams, sequence by sequence."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality.data import Row, batches_by_length
from benchmarks.quality.stats import Matrix
from qadapter import QAdapterModel, reference
from qadapter import functional as QF
from qadapter.composition import StreamWeights, stream_weights
from qadapter.model import packed_attention
from qadapter.ops import cpp
from qadapter.outputs import BaseMoments, ResidualValues
from qadapter.text.collator import PreferenceCollator
from qadapter.text.packing import PackedPreferenceCollator
from qadapter.text.tokenization import pad_token_id

CHUNK = 256  # rows whose float32 logits exist at a time
PAIR = ("chosen", "rejected")
Part = tuple[slice, Callable[..., ResidualValues]]  # some rows, and their values by composition


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
        if model.selects_hidden_rows:
            base, lora = _streams(model, batch, at, known, own, place, with_kl)
            parts = _parts(base, lora, model.hf_model.get_output_embeddings(), actions)
            kl = partial(_kl_of_moments, base, lora)
        else:
            z = [z.float() for z in model(batch.pop("input_ids"), rows=at, **batch)]
            parts = [(slice(None), partial(QF.residual_values, *z, actions))]
            kl = partial(_kl_of_logits, z)
        figures = _figures(parts, blends, kl if with_kl else None)
        numbers = [c * len(rows) + i for c in range(len(columns)) for i in part]
        for i, (begin, end) in zip(numbers, itertools.pairwise(ends), strict=True):
            made["tokens"][i] = end - begin
            for name, values in figures.items():
                made[name][..., i] = values[..., begin:end].sum(-1)
    return made


def _streams(
    model: QAdapterModel,
    batch: dict[str, Any],
    rows: Tensor,
    known: dict[int, Stream],
    own: dict[int, Stream],
    place: int,
    with_kl: bool,
) -> tuple[Stream, Stream]:
    """The base's, and what these weights of the LoRA make of the same rows."""
    ids = batch.pop("input_ids")
    if place not in known:
        hidden, head = model._base_hidden(ids, rows, batch), model.hf_model.get_output_embeddings()
        made = QF.base_moments(hidden, head.weight, bias=head.bias) if with_kl else None
        known[place] = Stream(hidden, made and BaseMoments(*made))
    if place not in own:
        own[place] = Stream(model._stream_hidden(ids, rows, batch))
    return known[place], own[place]


def _parts(base: Stream, own: Stream, head: Any, actions: Tensor) -> Iterator[Part]:
    """Of a plain head. Sums are float32: logits in bfloat16 would add a KL of their own.

    The fused operation makes its products once for each composition: where those of 16 bits are
    not fast, it takes longer than float32 logits made once for all.
    """
    weight, bias, linear = head.weight, head.bias, torch.nn.functional.linear
    if weight.is_cuda or (weight.dtype == torch.bfloat16 and cpp.capability() == "amx"):
        operands = (base.hidden, own.hidden, weight, actions)
        yield slice(None), partial(QF.linear_residual_values, *operands, bias=bias)
        return
    weight, bias = (None if w is None else w.float() for w in (weight, bias))
    for start in range(0, len(actions), CHUNK):
        at = slice(start, start + CHUNK)
        logits = [linear(stream.hidden[at].float(), weight, bias) for stream in (base, own)]
        yield at, partial(QF.residual_values, *logits, actions[at])


def _kl_of_moments(
    base: Stream, own: Stream, at: slice, values: ResidualValues, **composition: float
) -> Tensor:
    moments = cast(BaseMoments, base.moments).rows(at)
    return QF.kl_to_base(values.value, own.hidden[at], moments, **composition)


def _kl_of_logits(
    logits: list[Tensor], at: slice, values: ResidualValues, **composition: float
) -> Tensor:
    return reference.kl_base_policy(*logits, **composition)


def _figures(
    parts: Iterable[Part], blends: Sequence[StreamWeights], kl: Callable[..., Tensor] | None
) -> dict[str, Tensor]:
    """base_logp [N], policy_logp and, by ``kl(rows, values, **composition)``, kl [blends, N];
    float64 on the CPU."""
    parts_made = []
    for at, values in parts:
        base_logp = values().base_logp
        logp, kls = [], []
        for q, b in blends:
            if q == 0.0:  # the base itself
                logp.append(base_logp)
                kls.append(torch.zeros_like(base_logp))
                continue
            composition = {"alpha_0": 1.0 + b / q, "alpha_tilde": 1.0 / q, "center": 1.0}
            found = values(**composition)
            logp.append(found.policy_logp)
            if kl:
                kls.append(kl(at, found, **composition))
        part = {"base_logp": base_logp, "policy_logp": torch.stack(logp)}
        parts_made.append(part | ({"kl": torch.stack(kls)} if kl else {}))
    return {n: torch.cat([p[n] for p in parts_made], -1).double().cpu() for n in parts_made[0]}
