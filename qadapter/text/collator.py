"""From tokenised pairs to a padded batch, and the bookkeeping of the loss: one *row* per state.

A response of n tokens behind a prompt of L tokens gives n rows, at the positions L-1 ... L+n-2; row
t is the state s_t, and its action is the token that follows. The end-of-sequence token is an action
like any other, and after it the episode is over (its value is 0), so it has no row of its own. A
response that was cut off at ``max_length`` did not end there: it gets one more row, at its last
token, without an action (-100), which only gives the value of the state that it was cut at.

`qadapter.text.packing` makes the same rows without padding.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qadapter.text.anchors import Anchor

IGNORE_ACTION = -100


class PreferenceCollator:
    """Collate P tokenised pairs into one batch of 2P sequences and the N state rows of the loss.

    The call takes a list of what :func:`tokenize_preference` returns and gives a dict of tensors:

    - ``input_ids`` int64 [2P, T], right padded; sequence i is the chosen, P + i the rejected
      response of pair i
    - ``attention_mask`` int64 [2P, T]
    - ``rows`` int64 [N]: flat positions of the states in [2P * T], sequence after sequence
      (``hidden.view(-1, H)[rows]``)
    - ``actions`` int64 [N]: the token taken in each state; -100 in the one extra row of a truncated
      response
    - ``cu_seqlens`` int32 [2P + 1]: rows of sequence s are ``cu_seqlens[s]:cu_seqlens[s + 1]``
    - with ``anchors``, whose sequences come last, a dict of that name: ``rows`` int64 [A], flat
      positions of their states, and ``pair_inputs``, the inputs of a pass over the pairs alone

    Args:
        pad_token_id: the id in the padding; any id will do, nothing reads it.
        pad_to_multiple_of: round T up, for example to 8 for tensor cores.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int | None = None) -> None:
        if pad_token_id is None:
            raise ValueError(
                "pad_token_id is None; any id will do, such as the tokenizer's eos_token_id"
            )
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of must be at least 1, not {pad_to_multiple_of}")
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(
        self, features: Sequence[Mapping[str, Any]], anchors: Sequence[Anchor] = ()
    ) -> dict[str, Any]:
        sequences = []
        for column in ("chosen", "rejected"):
            for feature in features:
                prompt, response, truncated = tokens_of(feature, column)
                sequences.append((list(prompt), list(response), truncated))
        shape = self.pad_token_id, self.pad_to_multiple_of
        if not anchors:
            return collate_sequences(sequences, *shape)
        # As one more response each: its states are the rows of a truncated one behind `first`.
        more = [(list(a.ids[: a.first + 1]), list(a.ids[a.first + 1 :]), True) for a in anchors]
        batch: dict[str, Any] = collate_sequences([*sequences, *more], *shape)
        count = len(sequences)
        pair_rows = int(batch["cu_seqlens"][count])
        batch["anchors"] = {
            "rows": batch["rows"][pair_rows:],
            "pair_inputs": {k: batch[k][:count] for k in ("input_ids", "attention_mask")},
        }
        for name, stop in (("rows", pair_rows), ("actions", pair_rows), ("cu_seqlens", count + 1)):
            batch[name] = batch[name][:stop]
        return batch


def tokens_of(
    feature: Mapping[str, Any], column: str
) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
    """Prompt and response of a tokenised pair, and whether the response was cut."""
    name = f"{column}_ids"
    if "prompt_ids" not in feature or name not in feature:
        raise ValueError(
            f"features: expected tokenised pairs, with prompt_ids and {name}, as prepare_dataset "
            f"makes them, got {', '.join(map(str, feature)) or 'nothing'}"
        )
    prompt, response = tuple(feature["prompt_ids"]), tuple(feature[name])
    if not prompt or not response:
        raise ValueError(f"a pair without a token in its prompt or in '{name}'")
    return prompt, response, bool(feature.get(f"{column}_truncated", False))


def collate_sequences(
    sequences: Sequence[tuple[list[int], list[int], bool]],
    pad_token_id: int,
    pad_to_multiple_of: int | None = None,
) -> dict[str, torch.Tensor]:
    """:class:`PreferenceCollator`'s tensors for (prompt ids, response ids, truncated) triples."""
    width = max((len(prompt) + len(response) for prompt, response, _ in sequences), default=0)
    if pad_to_multiple_of:
        width = -(-width // pad_to_multiple_of) * pad_to_multiple_of

    input_ids = torch.full((len(sequences), width), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    rows: list[int] = []
    actions: list[int] = []
    ends = [0]
    for s, (prompt, response, truncated) in enumerate(sequences):
        length = len(prompt) + len(response)
        input_ids[s, :length] = torch.tensor(prompt + response, dtype=torch.int64)
        attention_mask[s, :length] = 1
        first = s * width + len(prompt) - 1
        rows.extend(range(first, first + len(response) + truncated))
        actions.extend(response)
        if truncated:
            actions.append(IGNORE_ACTION)
        ends.append(len(rows))
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "rows": torch.tensor(rows, dtype=torch.int64),
        "actions": torch.tensor(actions, dtype=torch.int64),
        "cu_seqlens": torch.tensor(ends, dtype=torch.int32),
    }
