"""Several data sets as one, drawn from by weights."""

from collections import Counter

import pytest
from datasets import Dataset, Features, Sequence, Value

from qadapter.text.mixture import mix


def tokens(first, count, **more):
    rows = {"prompt_ids": [[first + i] for i in range(count)]}
    rows |= {name: [[1]] * count for name in ("chosen_ids", "rejected_ids")}
    rows |= {name: [False] * count for name in ("chosen_truncated", "rejected_truncated")}
    return Dataset.from_dict(rows | {name: [value] * count for name, value in more.items()})


def drawn(mixed):
    return [row["prompt_ids"][0] for row in mixed]


def test_shares_are_the_weights():
    parts = [tokens(0, 900), tokens(1000, 300), tokens(2000, 900)]
    mixed = drawn(mix(parts, [2, 1, 1], seed=3))
    assert set(mixed) == {i for part in parts for i in drawn(part)}  # all of them
    of = Counter(i // 1000 for i in mixed)
    for number, share in enumerate((0.5, 0.25, 0.25)):
        # Draws: within four standard deviations.
        assert abs(of[number] / len(mixed) - share) < 4 * (0.25 / len(mixed)) ** 0.5
    once = drawn(mix(parts, [2, 1, 1], seed=3, stopping_strategy="first_exhausted"))
    assert len(once) == len(set(once)) and {*range(1000, 1300)} <= set(once)
    assert once == mixed[: len(once)] and not {*range(900)} <= set(once)


def test_the_same_arguments_make_the_same_mixture_also_of_streams():
    parts = [tokens(0, 20), tokens(1000, 50)]
    one = drawn(mix(parts, [0.3, 0.7]))
    assert drawn(mix(parts, [3, 7])) == one != drawn(mix(parts, [3, 7], seed=1))
    streams = mix([part.to_iterable_dataset() for part in parts], [3, 7])
    assert drawn(streams) == drawn(streams) == one


def test_other_columns_and_other_widths():
    narrow = Features(
        {name: Sequence(Value("int32")) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
        | {name: Value("bool") for name in ("chosen_truncated", "rejected_truncated")}
    )
    parts = [tokens(0, 5, source="a", length=2), tokens(1000, 5).cast(narrow)]
    mixed = mix(parts, [1, 1])
    assert len(mixed.column_names) == 5 and mixed.features["prompt_ids"].feature.dtype == "int64"
    parts = [tokens(0, 5, length=2), tokens(1000, 5, length=3)]
    assert "length" in mix(parts, [1, 1], also=["length"]).column_names


@pytest.mark.parametrize(
    ("weights", "how", "what"),
    [
        ([1], {}, "data_weights: expected one for each of 2 data sets, got 1"),
        ([1, 0], {}, "data_weights: expected a number above 0"),
        ([1, -1], {}, "data_weights: expected a number above 0"),
        ([1, float("nan")], {}, "data_weights: expected a finite number, got nan"),
        ([1, "2"], {}, "data_weights: expected a finite number, got '2'"),
        ([1, 1], {"stopping_strategy": "never"}, "data_stopping_strategy: expected"),
    ],
)
def test_bad_weights(weights, how, what):
    with pytest.raises(ValueError, match=what):
        mix([tokens(0, 3), tokens(10, 3)], weights, **how)


def test_a_stream_and_a_table():
    with pytest.raises(ValueError, match="streams alone or none"):
        mix([tokens(0, 3), tokens(10, 3).to_iterable_dataset()], [1, 1])
