"""train and eval take data as people have it: several files, other names, rows that are bad."""

import json

import pytest

from qadapter.cli import main
from tests.tiny_models import make_base
from tests.tiny_text import preference_rows


def as_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def run(tmp_path, tiny_tokenizer):
    make_base("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")

    def train(*options):
        command = [
            "train", "--model", str(tmp_path / "base"), "--output", str(tmp_path / "out"),
            "--max-steps", "2", "--per-device-train-batch-size", "4", "--report-to", "none",
            "--use-cpu", "--save-strategy", "no",
        ]  # fmt: skip
        return main([*command, *map(str, options)])

    return train


def named(row):
    return {"ask": row["prompt"], "good": row["chosen"], "rejected": row["rejected"]}


def test_files_of_other_columns_with_bad_rows(run, tmp_path, capsys, caplog):
    rows = [named(row) for row in preference_rows(8)]
    (tmp_path / "a-0.jsonl").write_text(as_lines(rows[:4]) + "{oops\n")
    # Empty only for the tokenizer: white space is none of its words.
    blank = rows[0] | {"good": [{"role": "assistant", "content": "  "}]}
    (tmp_path / "a-1.jsonl").write_text(as_lines([*rows[4:], blank]))
    data = ["--data", tmp_path / "a-0.jsonl", tmp_path / "a-1.jsonl"]
    columns = ["--columns", "prompt=ask", "chosen=good"]
    assert run(*data, *columns) == 2
    assert "a-0.jsonl, line 5: not valid JSON" in capsys.readouterr().err
    assert run(*data, "--skip-bad-rows", "--columns", "prompt=ask") == 2
    assert "missing column(s) chosen" in capsys.readouterr().err
    held_out = ["--eval-data", tmp_path / "a-*.jsonl", "--eval-split", "test[:5]"]
    assert run(*data, *columns, "--skip-bad-rows", *held_out) == 0
    assert "Skipped 1 of 10 rows" in caplog.text and "1 x not valid JSON" in caplog.text
    assert "Skipped 1 of 9 rows of the data set: 1 x 'chosen' is empty" in caplog.text

    caplog.clear()
    command = ["eval", "--adapter", str(tmp_path / "out"), *map(str, data), *columns]
    assert main(command) == 2
    report = tmp_path / "report.json"
    assert main([*command, "--skip-bad-rows", "--json", str(report), "--split", "test[2:]"]) == 0
    figures = json.loads(report.read_text())["preference"]
    assert (figures["pairs"], figures["dropped"]) == (6, 1)
    assert "Skipped 1 of 10 rows" in caplog.text


def test_bad_options(run, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(as_lines(preference_rows(2)))
    for options, message in (
        (["--columns", "prompt"], "--columns: expected NAME=COLUMN, each name once, got 'prompt'"),
        (["--columns", "prompt=a", "prompt=b"], "each name once, got 'prompt=b'"),
        (["--columns", "answer=a"], "'answer' is read by nothing"),
        (["--data-config", "main"], "only a Hub data set or a folder has one"),
        (["--split", "train[5:]"], "no rows"),
    ):
        assert run("--data", tmp_path / "a.jsonl", *options) == 2
        assert message in capsys.readouterr().err
