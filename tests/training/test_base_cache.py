"""The base's values come back from disk as they were computed, or damage is named."""

import json
import pickle

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from qadapter.text.data import prepare_dataset
from qadapter.training import base_cache
from qadapter.training.base_cache import (
    BaseCache,
    example_key,
    identity,
    pair_rows,
    precompute,
)
from tests.tiny_models import make_model
from tests.tiny_text import preference_rows
from tests.training.ragged_pairs import (
    COLLATE,
    KEY,
    NOTHING,
    RAGGED,
    Base,
    alone,
    filled,
    pair,
    ragged,
    shards,
)


@pytest.fixture
def one_shard_a_batch(monkeypatch):
    monkeypatch.setattr(base_cache, "FLUSH_SECONDS", -1.0)


# Values.


@pytest.mark.parametrize("with_hidden", [False, True])
@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_round_trip(tmp_path, one_shard_a_batch, with_hidden, batch_tokens):
    """Whatever the grouping, each pair has the values of a batch of its own."""
    cache = filled(tmp_path / "cache", with_hidden, batch_tokens=batch_tokens)
    again = BaseCache.open(tmp_path / "cache", NOTHING, with_hidden)
    assert len(cache) == len(again) == 5
    assert len(shards(tmp_path / "cache")) == {1: 5, 40: 3, 4096: 1}[batch_tokens]
    base = Base()
    names = ["base_lse", "base_logp", "base_hidden"][: 3 if with_hidden else 2]
    for feature in RAGGED:
        expected = alone(base, feature)
        for read in (cache[example_key(feature)], again[example_key(feature)]):
            assert list(read) == names
            for name in names:
                torch.testing.assert_close(read[name], expected[name], rtol=1e-4, atol=1e-5)
    batch = again.batch(RAGGED)
    expected = base.base_statistics(COLLATE(RAGGED))
    for name in names:
        torch.testing.assert_close(batch[name], expected[name], rtol=1e-4, atol=1e-5)


def test_the_model_fills_a_cache(tmp_path, tiny_tokenizer):
    """With `QAdapterModel.base_statistics` and a real data set; nothing of the adapter is in it."""
    model = make_model()
    dataset = prepare_dataset(Dataset.from_list(preference_rows(6)), tiny_tokenizer, max_length=16)
    cache = BaseCache.open(tmp_path, identity(model, tiny_tokenizer, 16), with_hidden=True)
    assert precompute(model, dataset, cache, COLLATE, progress=False) == (6, 0)
    expected = Base().base_statistics(COLLATE(list(dataset)))
    for name, values in cache.batch(list(dataset)).items():
        torch.testing.assert_close(values, expected[name], rtol=1e-4, atol=1e-5)


def test_values_are_copies_and_hidden_states_keep_their_dtype(tmp_path):
    hidden = torch.randn(2, 4).bfloat16()
    values = {"base_lse": torch.ones(2), "base_logp": -hidden[:, 0], "base_hidden": hidden}
    cache = BaseCache.open(tmp_path, NOTHING, with_hidden=True)
    cache.add(KEY, values, (1, 1))
    for _ in range(2):  # in memory, then from disk
        for tensor in cache[KEY].values():
            tensor.zero_()
        read = cache[KEY]
        assert torch.equal(read["base_hidden"], hidden)
        assert torch.equal(read["base_lse"], torch.ones(2))
        assert torch.equal(read["base_logp"], -hidden[:, 0].float())
        cache.flush()


def test_hidden_states_can_be_added_to_a_cache_and_ignored(tmp_path):
    filled(tmp_path)
    with_hidden = BaseCache.open(tmp_path, NOTHING, with_hidden=True)
    assert len(with_hidden) == 0 and example_key(RAGGED[0]) not in with_hidden
    filled(tmp_path, with_hidden=True)
    assert with_hidden.reload() == 1
    assert with_hidden[example_key(RAGGED[0])]["base_hidden"].shape == (7, 32)
    without = BaseCache.open(tmp_path, NOTHING)
    assert len(without) == 5 and "base_hidden" not in without[example_key(RAGGED[0])]


def test_pairs_computed_once_and_only_what_lacks(tmp_path, capsys):
    cache = filled(tmp_path)
    base = Base()
    assert precompute(base, ragged(), cache, COLLATE) == (0, 6)
    assert base.pairs == []
    more = Dataset.from_list([*RAGGED, pair(2, 2, 2), pair(2, 2, 2)])
    done = precompute(base, more, cache, COLLATE, description="More pairs")
    assert done == (1, 7) and base.pairs == [1] and len(cache) == 6
    assert "More pairs" in capsys.readouterr().err


def test_batches_keep_to_the_budget(tmp_path):
    rows = [{**pair(5, 5, 3), "chosen_ids": [i] * (1 + i % 9)} for i in range(40)]
    shapes = []

    def collate(features):
        batch = COLLATE(features)
        shapes.append(tuple(batch["input_ids"].shape))
        return batch

    cache, dataset = BaseCache.open(tmp_path, NOTHING), Dataset.from_list(rows)
    precompute(Base(), dataset, cache, collate, batch_tokens=100, progress=False)
    assert sum(count for count, _ in shapes) == 80 and max(shapes)[0] > 2
    assert all(count * width <= 100 for count, width in shapes)
    assert [width for _, width in shapes] == sorted((w for _, w in shapes), reverse=True)
    with pytest.raises(ValueError, match="batch_tokens: expected at least 1, got 0"):
        precompute(Base(), dataset, cache, collate, batch_tokens=0)


# Interruptions and writers.


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_goes_on(tmp_path, error):
    cache = BaseCache.open(tmp_path, NOTHING)
    with pytest.raises(error):
        precompute(
            Base(fail_at=3, error=error), ragged(), cache, COLLATE, batch_tokens=1, progress=False
        )
    cache = BaseCache.open(tmp_path, NOTHING)
    assert len(cache) == 3
    base = Base()
    assert precompute(base, ragged(), cache, COLLATE, batch_tokens=1, progress=False) == (2, 4)
    assert base.pairs == [1, 1]
    whole = Base().base_statistics(COLLATE(RAGGED))
    torch.testing.assert_close(cache.batch(RAGGED)["base_lse"], whole["base_lse"])


def test_shards_are_written_by_size_too(tmp_path, monkeypatch):
    monkeypatch.setattr(base_cache, "FLUSH_BYTES", 1)
    cache = filled(tmp_path, batch_tokens=1)
    assert len(shards(tmp_path)) == 5 and cache.pending_bytes == 0


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    cache = BaseCache.open(tmp_path, NOTHING)
    cache.add(KEY, {"base_lse": torch.ones(2), "base_logp": -torch.ones(2)}, (1, 1))

    def save_half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(base_cache, "save_file", save_half)
        with pytest.raises(OSError, match=r"base-00000-.*No space left"):
            cache.flush()
    assert [path.name for path in tmp_path.iterdir()] == ["identity.json"]
    assert KEY in cache
    cache.flush()
    assert torch.equal(BaseCache.open(tmp_path, NOTHING)[KEY]["base_lse"], torch.ones(2))


def test_others_see_new_shards_after_a_reload(tmp_path):
    reader = BaseCache.open(tmp_path, NOTHING)
    writers = [BaseCache.open(tmp_path, NOTHING) for _ in range(2)]
    for number, writer in enumerate(writers):
        values = {"base_lse": torch.full((2,), float(number)), "base_logp": torch.zeros(2)}
        writer.add(f"{number:032x}", values, (1, 1))
        writer.flush()  # both think that theirs is the first shard
    assert len(reader) == 0
    with pytest.raises(KeyError, match="is not in the base cache"):
        reader[f"{0:032x}"]
    assert reader.reload() == 2 and reader.reload() == 0
    assert [reader[f"{i:032x}"]["base_lse"][0].item() for i in range(2)] == [0.0, 1.0]


@pytest.mark.parametrize("how", ["fork", "pickle"])
def test_other_processes_read_it(tmp_path, how):
    cache = filled(tmp_path, with_hidden=True)
    expected = cache.batch(RAGGED)  # so that a worker inherits the open file
    if how == "fork":
        options = {"num_workers": 1, "multiprocessing_context": "fork"}
        (read,) = DataLoader(RAGGED, len(RAGGED), collate_fn=cache.batch, **options)
    else:
        late = pair(2, 2, 3)
        cache.add(example_key(late), alone(Base(), late), pair_rows(late))
        other = pickle.loads(pickle.dumps(cache))
        assert len(other) == 6 and other.batch([late]).keys() == expected.keys()
        read = other.batch(RAGGED)
    for name, tensor in expected.items():
        assert torch.equal(read[name], tensor)


# Damage and misuse.


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_shard_is_named(tmp_path, keep):
    filled(tmp_path)
    (shard,) = shards(tmp_path)
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"{shard.name} is damaged .* Delete this file"):
        BaseCache.open(tmp_path, NOTHING)
    shard.unlink()
    assert len(BaseCache.open(tmp_path, NOTHING)) == 0


def test_no_flipped_bit_gives_a_wrong_number(tmp_path):
    cache = filled(tmp_path, with_hidden=True)
    right = {key: cache[key] for key in map(example_key, RAGGED)}
    (shard,) = shards(tmp_path)
    content = shard.read_bytes()
    for place in [*range(0, 1200, 7), *range(1200, len(content), 211)]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        shard.unlink()  # what is open keeps its contents
        shard.write_bytes(damaged)
        message, read = "", {}
        try:
            cache = BaseCache.open(tmp_path, NOTHING, with_hidden=True)
            read = {key: cache[key] for key in right if key in cache}
        except ValueError as error:
            message = str(error)
        assert not message or f"{shard.name} is damaged" in message
        for key, values in read.items():
            assert all(torch.equal(tensor, right[key][name]) for name, tensor in values.items())


def test_hidden_states_are_read_pair_by_pair(tmp_path):
    """Damage to those of one pair is found when it is asked for, and only then."""
    filled(tmp_path, with_hidden=True)
    (shard,) = shards(tmp_path)
    content = bytearray(shard.read_bytes())
    header = int.from_bytes(content[:8], "little")
    start = json.loads(content[8 : 8 + header])["base_hidden"]["data_offsets"][0]
    content[8 + header + start] ^= 1
    shard.write_bytes(content)
    cache = BaseCache.open(tmp_path, NOTHING, with_hidden=True)
    longest, *others = sorted(RAGGED, key=lambda f: -len(f["prompt_ids"] + f["chosen_ids"]))
    with pytest.raises(ValueError, match=rf"{shard.name} is damaged \(hidden states of rows 0:"):
        cache.batch([longest])
    assert cache.batch(others)["base_hidden"].isfinite().all()
    assert BaseCache.open(tmp_path, NOTHING).batch(RAGGED)["base_lse"].isfinite().all()


def test_values_that_do_not_fit_are_refused(tmp_path):
    cache = BaseCache.open(tmp_path, NOTHING, with_hidden=True)
    good = alone(Base(), RAGGED[0])
    rows = pair_rows(RAGGED[0])
    for change, message in [
        ({"base_lse": good["base_lse"][1:]}, r"base_lse: expected 5 \+ 2 rows .* \[6\]"),
        ({"base_logp": good["base_logp"][:, None]}, r"base_logp: expected .* shape \[7, 1\]"),
        ({"base_hidden": good["base_hidden"][0]}, r"base_hidden: expected .* 2 dimension"),
        ({"base_lse": good["base_lse"] * float("nan")}, "base_lse: not finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            cache.add("00" * 16, {**good, **change}, rows)
    with pytest.raises(ValueError, match="base_hidden expected, got base_lse"):
        cache.add("00" * 16, {"base_lse": good["base_lse"], "base_logp": good["base_logp"]}, rows)
    assert len(cache) == 0
    cache.add(example_key(RAGGED[0]), good, (2, 5))
    with pytest.raises(ValueError, match=r"expected 5 \+ 2 rows .* got 2 \+ 5"):
        cache.batch(RAGGED[:1])


@pytest.mark.parametrize("wrong", ["one row too many", "another collator"])
def test_statistics_of_other_rows_are_refused(tmp_path, wrong):
    base = Base()
    collate, right = COLLATE, base.base_statistics
    if wrong == "one row too many":
        base.base_statistics = lambda batch: {
            name: torch.cat([values, values[:1]]) for name, values in right(batch).items()
        }
        message = "base_lse: expected 39 rows of a batch, got 40"
    else:
        flags = {"chosen_truncated": False, "rejected_truncated": False}
        message = r"collator: expected 10 \+ 1 rows .* got 9 \+ 1"

        def collate(features):
            return COLLATE([{**feature, **flags} for feature in features])

    with pytest.raises(ValueError, match=message):
        precompute(base, ragged(), BaseCache.open(tmp_path, NOTHING), collate, progress=False)
