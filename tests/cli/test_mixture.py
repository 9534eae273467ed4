"""Several data sets of a run, on the command line and in a file of options."""

import json
from types import SimpleNamespace

import pytest
import yaml

from qadapter.cli import main, mixture
from tests.tiny_models import make_base
from tests.tiny_text import preference_rows

ENTRIES = [{"path": "a.jsonl", "weight": 2}, {"path": "org/b", "weight": 0.5, "name": "x"}]


def test_a_list_of_data_sets_in_a_file():
    content = mixture.in_file({"model": "base", "datasets": ENTRIES})
    assert content == {
        "model": "base",
        "data": ["a.jsonl", "org/b"],
        "data_weights": [2, 0.5],
        "split": ["train", "train"],
        "data_config": ["", "x"],
    }
    assert mixture.in_file({"data": ["a"]}) == {"data": ["a"]}


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({"datasets": "a.jsonl"}, "expected a list of path and weight, got 'a.jsonl'"),
        ({"datasets": ["a.jsonl"]}, "expected a list of path and weight"),
        ({"datasets": ENTRIES[:1]}, "one is no mixture"),
        ({"datasets": [{"path": "a"}]}, "{'path': 'a'} has no weight"),
        ({"datasets": [{"weight": 1}]}, "{'weight': 1} has no path"),
        ({"datasets": [{"path": "a", "weigth": 1}]}, "'weigth' is not known; known are path"),
        ({"datasets": ENTRIES, "data": ["c"]}, "data cannot be given beside"),
        ({"datasets": ENTRIES, "data-weights": [1]}, "data_weights cannot be given beside"),
    ],
)
def test_what_is_no_list_of_data_sets(content, what):
    with pytest.raises(ValueError, match="--config: datasets: .*" + what):
        mixture.in_file(content)


@pytest.fixture
def files(tmp_path):
    rows = preference_rows(6)
    for name, part in (("a", rows[:4]), ("b", rows[4:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (tmp_path / f"{name}.jsonl").write_text(text)
    return [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]


def options(files, **more):
    rest = {"columns": None, "skip_bad_rows": False, "max_examples": None}
    rest |= {"split": ["train"], "data_config": None}
    return SimpleNamespace(data=files, **(rest | more))


def test_the_data_sets_are_loaded_apart_or_as_one(files):
    assert len(mixture.load(options(files), None)) == 6
    assert list(map(len, mixture.load(options(files), [2, 1]))) == [4, 2]
    sliced = options(files, split=["train[1:]", "train"], max_examples=2)
    first, second = mixture.load(sliced, [2, 1])
    assert first[0] == mixture.load(options(files), None)[1] and len(first) == len(second) == 2


@pytest.mark.parametrize(
    ("more", "weights", "what"),
    [
        ({}, [1], "--data_weights: expected one for each of --data, which has 2, got 1"),
        ({"split": ["a", "b", "c"]}, [1, 1], r"--split: expected 1 or 2, got \['a', 'b', 'c'\]"),
        ({"split": ["a", "b"]}, None, r"--split: expected 1, got \['a', 'b'\]"),
    ],
)
def test_other_numbers_than_of_data_sets(files, more, weights, what):
    with pytest.raises(ValueError, match=what):
        mixture.load(options(files, **more), weights)


def test_a_run(tmp_path, tiny_tokenizer, files, capsys, caplog):
    base = tmp_path / "base"
    make_base("llama").save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    content = {"datasets": [{"path": name, "weight": 3} for name in files], "use_cpu": True}
    content |= {"model": str(base), "output": str(tmp_path / "out"), "max_steps": 1}
    content |= {"report_to": "none", "save_strategy": "no", "skip_bad_rows": True}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    command = ["train", "--config", str(tmp_path / "run.yaml")]
    assert main(command) == 0
    assert "of data sets of {1: 4, 2: 2}" in caplog.text
    assert main([*command, "--data-weights", "1"]) == 2
    assert "--data_weights: expected one for each of --data" in capsys.readouterr().err
    assert main([*command, "--data-weights", "1", "0"]) == 2
    assert "data_weights: expected a number above 0" in capsys.readouterr().err
