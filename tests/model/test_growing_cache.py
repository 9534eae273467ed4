"""A cache that grows in place holds what transformers' own holds, whatever is done to it."""

import copy

import pytest
import torch
from transformers import DynamicCache

from qadapter.model.growing_cache import GrowingLayer, grow_in_place


def states(tokens, rows=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 2, tokens, 4, generator=generator) for _ in range(2)]


def caches():
    plain, growing = DynamicCache(), DynamicCache()
    grow_in_place(growing)
    return plain, growing


def update_both(plain, growing, tokens, rows=3, seed=0):
    for layer in range(2):
        one, other = (
            c.update(*states(tokens, rows, seed + layer), layer) for c in (plain, growing)
        )
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b)
    assert growing.get_seq_length() == plain.get_seq_length()
    assert all(type(layer) is GrowingLayer for layer in growing.layers)


def test_holds_what_it_was_given():
    both = caches()
    for turn, tokens in enumerate([5, 1, 1, 70, 1, 100, *[1] * 100]):
        update_both(*both, tokens, seed=turn)


def test_new_tokens_are_written_in_place():
    _, growing = caches()
    growing.update(*states(5), 0)
    before = growing.layers[0].keys
    copied = before.clone()
    growing.update(*states(1), 0)
    after = growing.layers[0].keys
    assert after.data_ptr() == before.data_ptr() and torch.equal(before, copied)


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.reorder_cache(torch.tensor([2, 0])),
        lambda cache: cache.batch_select_indices(torch.tensor([0, 1])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.crop(-3),
        lambda cache: cache.reset(),
        lambda cache: [setattr(layer, "keys", layer.keys.clone()) for layer in cache.layers],
    ],
)
def test_goes_on_after_a_change_of_what_it_holds(change):
    both = caches()
    update_both(*both, 6)
    update_both(*both, 1, seed=1)
    for cache in both:
        change(cache)
    rows = both[0].layers[0].keys.shape[0] if both[0].get_seq_length() else 3
    for turn in range(3):
        update_both(*both, 1, rows=rows, seed=turn)


def test_a_copy_has_room_of_its_own():
    plain, growing = caches()
    update_both(plain, growing, 4)
    other_plain, other = copy.deepcopy(plain), copy.deepcopy(growing)
    update_both(other_plain, other, 1, seed=7)
    update_both(plain, growing, 1, seed=9)
    update_both(other_plain, other, 1, seed=11)


def test_layers_of_another_kind_and_with_content_stay():
    cache = DynamicCache()
    cache.update(*states(3), 0)
    grow_in_place(cache)
    assert type(cache.layers[0]) is not GrowingLayer
    grow_in_place(None)
