"""From tokenised pairs to packs: one row of real tokens a batch, what is the same there once."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qadapter.model import packed_attention
from qadapter.text.anchors import Anchor
from qadapter.text.collator import IGNORE_ACTION, tokens_of


class PackedPreferenceCollator:
    """Collate P tokenised pairs into one row of tokens without padding, for a packed forward.

    What is the same is there once. Pairs with the same prompt form a group: the prompt, then their
    different responses, each of which attends to the prompt (`model.packed_attention`). The last
    token of a response that ended is an action but no state, so it is left out. The call gives

    - ``input_ids``, ``position_ids`` int64 [1, T]; the positions of a response go on from its
      prompt's
    - ``rows``, ``actions``, ``cu_seqlens``: as :class:`PreferenceCollator`; a position that is a
      state of several sequences is in ``rows`` several times
    - where rows agree in position and action, ``unique_rows`` int64 [U] and ``unique_index``
      int64 [N]: rows that differ, and which of them each row is
    - the arguments of `qadapter.model.packed_attention.layout`, flash-attention's four among them
    - with ``anchors``, groups of their own behind the pairs, the dict of `PreferenceCollator`

    Args:
        share_prompt: False lays out every response behind a prompt of its own.
    """

    def __init__(self, share_prompt: bool = True) -> None:
        self.share_prompt = share_prompt

    def __call__(
        self, features: Sequence[Mapping[str, Any]], anchors: Sequence[Anchor] = ()
    ) -> dict[str, Any]:
        # (prompt, states behind it, actions) of the chosen, then of the rejected
        sequences = [
            _states_and_actions(*tokens_of(feature, column))
            for column in ("chosen", "rejected")
            for feature in features
        ]
        groups: dict[Any, dict[tuple[int, ...], int]] = {}
        for number, (prompt, states, _) in enumerate(sequences):
            own = prompt if self.share_prompt else number
            groups.setdefault(own, {}).setdefault(states, number)
        ids: list[int] = []
        starts: dict[Any, tuple[int, dict[tuple[int, ...], int]]] = {}
        for own, responses in groups.items():
            ids.extend(sequences[next(iter(responses.values()))][0])
            end, begin = len(ids) - 1, {}
            for states in responses:
                begin[states] = len(ids)
                ids.extend(states)
            starts[own] = end, begin
        rows: list[int] = []
        actions: list[int] = []
        ends = [0]
        for number, (prompt, states, taken) in enumerate(sequences):
            prompt_end, begin = starts[prompt if self.share_prompt else number]
            rows.extend((prompt_end, *range(begin[states], begin[states] + len(states))))
            actions.extend(taken)
            ends.append(len(rows))
        lengths = [
            [len(sequences[next(iter(responses.values()))][0]), *map(len, responses)]
            for responses in groups.values()
        ]
        batch = {
            "input_ids": torch.tensor([ids], dtype=torch.int64),
            "rows": torch.tensor(rows, dtype=torch.int64),
            "actions": torch.tensor(actions, dtype=torch.int64),
            "cu_seqlens": torch.tensor(ends, dtype=torch.int32),
            **_unique(rows, actions),
            **packed_attention.layout(lengths),
        }
        return _with_anchors(batch, lengths, anchors) if anchors else batch


def _with_anchors(
    batch: dict[str, Any], lengths: list[list[int]], anchors: Sequence[Anchor]
) -> dict[str, Any]:
    """One more group each, behind the pairs: ``anchors`` as in `PreferenceCollator`."""
    own = ("input_ids", "position_ids", *packed_attention.ARGUMENTS)
    pairs = {name: batch[name] for name in own if name in batch}
    at = pairs["input_ids"].shape[1]
    states: list[int] = []
    for anchor in anchors:
        states.extend(range(at + anchor.first, at + len(anchor.ids)))
        at += len(anchor.ids)
    ids = torch.tensor([token for anchor in anchors for token in anchor.ids], dtype=torch.int64)
    batch |= packed_attention.layout([*lengths, *([len(anchor.ids)] for anchor in anchors)])
    batch["input_ids"] = torch.cat((pairs["input_ids"], ids[None]), 1)
    batch["anchors"] = {"rows": torch.tensor(states, dtype=torch.int64), "pair_inputs": pairs}
    return batch


def _unique(rows: list[int], actions: list[int]) -> dict[str, torch.Tensor]:
    first: dict[tuple[int, int], int] = {}
    index = [first.setdefault(pair, len(first)) for pair in zip(rows, actions, strict=True)]
    if len(first) == len(rows):
        return {}
    unique = [0] * len(first)
    for row in reversed(range(len(rows))):
        unique[index[row]] = row
    return {"unique_rows": torch.tensor(unique), "unique_index": torch.tensor(index)}


def _states_and_actions(
    prompt: tuple[int, ...], response: tuple[int, ...], truncated: bool
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The prompt, the tokens behind it that are states, and the action of every row."""
    if truncated:
        return prompt, response, (*response, IGNORE_ACTION)
    return prompt, response[:-1], response
