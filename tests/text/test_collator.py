"""Each packed row is a state with its own action, whatever the padding."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qadapter.text.collator import PreferenceCollator
from qadapter.text.packing import PackedPreferenceCollator
from qadapter.text.tokenization import tokenize_preference
from tests.text.chat_tokenizer import EOS, PAIR, TOKENIZER, decode
from tests.text.tokenized_pairs import PAIRS


@settings(max_examples=200)
@given(pairs=PAIRS, multiple=st.sampled_from([None, 1, 4, 8]), pad=st.integers(0, 99))
def test_rows(pairs, multiple, pad):
    batch = PreferenceCollator(pad, multiple)(pairs)
    sequences = [
        (p["prompt_ids"], p[f"{c}_ids"], p[f"{c}_truncated"])
        for c in ("chosen", "rejected")
        for p in pairs
    ]
    ids, mask, rows, actions, ends = (
        batch[k] for k in ("input_ids", "attention_mask", "rows", "actions", "cu_seqlens")
    )
    longest = max(len(prompt) + len(response) for prompt, response, _ in sequences)
    width = ids.shape[1]
    assert ids.shape == mask.shape == (len(sequences), width)
    assert longest <= width < longest + (multiple or 1)
    assert width % (multiple or 1) == 0
    assert [t.dtype for t in (ids, mask, rows, actions, ends)] == [torch.int64] * 4 + [torch.int32]
    assert ends[0] == 0
    assert ends[-1] == len(rows) == len(actions)
    assert len(ends) == len(sequences) + 1
    flat = ids.flatten()
    for s, (prompt, response, truncated) in enumerate(sequences):
        length = len(prompt) + len(response)
        assert ids[s, :length].tolist() == prompt + response
        assert ids[s, length:].tolist() == [pad] * (width - length)
        assert mask[s].tolist() == [1] * length + [0] * (width - length)
        mine = rows[ends[s] : ends[s + 1]]
        taken = actions[ends[s] : ends[s + 1]]
        assert mine.tolist() == [
            s * width + len(prompt) - 1 + t for t in range(len(response) + truncated)
        ]
        if truncated:
            assert taken[-1] == -100
            assert mine[-1] == s * width + length - 1  # the state that it was cut at
            mine, taken = mine[:-1], taken[:-1]
        assert taken.tolist() == response
        assert torch.equal(flat[mine + 1], taken)
        assert ((mine + 1) // width == s).all()  # the action stands in the same sequence


@settings(max_examples=50)
@given(pairs=PAIRS)
def test_padding_changes_only_the_padding(pairs):
    narrow, wide = PreferenceCollator(7)(pairs), PreferenceCollator(8, 64)(pairs)
    for key in ("actions", "cu_seqlens"):
        assert torch.equal(narrow[key], wide[key])
    t, w = narrow["input_ids"].shape[1], wide["input_ids"].shape[1]
    assert torch.equal(narrow["rows"] // t, wide["rows"] // w)
    assert torch.equal(narrow["rows"] % t, wide["rows"] % w)
    # A pair keeps its rows whoever its neighbours are.
    alone = PreferenceCollator(7)(pairs[:1])
    n = int(alone["cu_seqlens"][1])
    assert torch.equal(alone["actions"][:n], narrow["actions"][:n])


def test_collator_refuses():
    with pytest.raises(ValueError, match="pad_token_id is None"):
        PreferenceCollator(None)
    with pytest.raises(ValueError, match="at least 1"):
        PreferenceCollator(0, 0)
    good = tokenize_preference(PAIR, TOKENIZER)
    for collate in (PreferenceCollator(0), PackedPreferenceCollator()):
        with pytest.raises(ValueError, match="without a token in its prompt or in 'rejected_ids'"):
            collate([good | {"rejected_ids": []}])
        raw = "features: expected tokenised pairs, .* got prompt, chosen, rejected"
        with pytest.raises(ValueError, match=raw):
            collate([PAIR])


def test_from_text_to_rows():
    """The whole way, checked by text: what each action is, and that nothing of the prompt is."""
    batch = PreferenceCollator(EOS)([tokenize_preference(PAIR, TOKENIZER)])
    ends = batch["cu_seqlens"].tolist()
    texts = [decode(batch["actions"][a:b].tolist()) for a, b in itertools.pairwise(ends)]
    assert texts == ["the sky is blue<|im_end|>", "the sky is green<|im_end|>"]
    first = batch["rows"][0]
    before = decode(batch["input_ids"].flatten()[: first + 1].tolist())
    assert before.endswith("<|im_start|>assistant\n")
