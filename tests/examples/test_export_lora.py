"""The example of an export runs; its figures are 0 where they must be and small beside."""

import importlib
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("export_lora")


def test_it_runs(example, capsys):
    made = {strength: figures for strength, *figures in example.main([])}
    assert made.keys() == {0.25, 0.5, 1.0, 2.0}
    assert made[1.0][1] < 1e-6 < made[0.5][1]
    for moved, between in made.values():
        assert moved > 1e-3 and between < 0.1 * moved
    assert capsys.readouterr().out.count("KL(blend || exported)") == 4


def test_an_adapter_that_is_there(example, tmp_path):
    adapter = example.random_adapter(tmp_path)
    assert [s for s, *_ in example.main(["--adapter", str(adapter), "--strength", "3"])] == [3]
