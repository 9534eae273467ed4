"""``qadapter train``: options from a file, and in several processes by accelerate's launcher."""

import os
import sys
from dataclasses import fields
from types import SimpleNamespace

import pytest
import yaml

from qadapter.cli import launching, main, run_file
from qadapter.cli.train import TrainArguments


@pytest.fixture
def not_started(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    started = []
    monkeypatch.setattr(launching, "run", lambda start, output: started.append(start) or 0)
    return started


def written(folder, content):
    path = folder / "run.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


def test_options_of_a_file_come_before_those_of_the_command_line(tmp_path):
    path = written(
        tmp_path,
        "model: base\ndata: [a.jsonl, b.jsonl]\nlearning-rate: 1e-4\npacking: false\n"
        "max_steps:\nlr_scheduler_kwargs: {power: 2}\n",
    )
    content, left = run_file.read(["--model", "other", f"--config={path}", "--seed", "1"])
    assert left == ["--model", "other", "--seed", "1"]
    names = ["model", "data", "learning_rate", "packing", "max_steps", "lr_scheduler_kwargs"]
    assert run_file.as_arguments(content, names) == [
        "--model=base",
        *("--data", "a.jsonl", "b.jsonl"),
        "--learning_rate=1e-4",
        "--packing=false",
        '--lr_scheduler_kwargs={"power": 2}',
    ]
    assert run_file.read(["--model", "base"]) == ({}, ["--model", "base"])


def test_the_environment_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("QADAPTER_TRIED", "before")
    content, _ = run_file.read(["--config", written(tmp_path, {"env": {"QADAPTER_TRIED": 3}})])
    assert os.environ["QADAPTER_TRIED"] == "3" and content == {}


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({"learning_rat": 1}, "no option learning_rat; did you mean learning_rate?"),
        ({"config": "other.yaml"}, "no option config"),
        ("- model", "expected options by name, got list"),
        ("a: [", "not valid YAML"),
        ({"env": ["A"]}, "env: expected names and values"),
    ],
)
def test_what_is_no_file_of_options(tmp_path, capsys, content, what):
    assert main(["train", "--config", written(tmp_path, content)]) == 2
    assert what in capsys.readouterr().err


def test_a_file_that_is_not_there(capsys):
    assert main(["train", "--config", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err
    assert main(["train", "--config"]) == 2
    assert "--config: expected a value" in capsys.readouterr().err


def test_a_run_from_a_file(tmp_path, not_started):
    content = {
        "model": "base",
        "data": ["pairs.jsonl"],
        "accelerate_config": "fsdp2",
        "num_processes": 8,
    }
    path = written(tmp_path, content)
    assert main(["train", "--config", path, "--data", "mine.jsonl", "--num-processes", "4"]) == 0
    (start,) = not_started
    assert start[:4] == [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    assert start[4] == str(launching.config_path("fsdp2"))
    assert start[5:] == [
        *("--num_processes", "4", "-m", "qadapter.cli", "train"),
        *("--data", "pairs.jsonl", "--model=base", "--data", "mine.jsonl"),
    ]


def test_what_is_left_of_a_run_that_failed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("subprocess.run", lambda start: SimpleNamespace(returncode=1))
    assert launching.run(["start"], str(tmp_path)) == 1
    assert "a process has ended (above); there is no checkpoint" in capsys.readouterr().err
    for step, files in ((2, ["trainer_state.json"]), (4, [])):
        (tmp_path / f"checkpoint-{step}").mkdir()
        for name in files:
            (tmp_path / f"checkpoint-{step}" / name).write_text("{}")
    assert launching.run(["start"], str(tmp_path)) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "starting: start" and len(said) == 2
    assert said[1].endswith(f"--resume goes on from {tmp_path / 'checkpoint-2'}")
    monkeypatch.setattr("subprocess.run", lambda start: SimpleNamespace(returncode=0))
    assert launching.run(["start"], str(tmp_path)) == 0
    assert "error" not in capsys.readouterr().err


def test_a_process_that_was_started_starts_none(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    arguments = ["--accelerate_config", "fsdp2", "--model", "base"]
    assert launching.command(arguments) == (None, ["--model", "base"])


def test_what_cannot_be_started(not_started, monkeypatch):
    with pytest.raises(ValueError, match="expected multi_gpu, fsdp2, zero2, zero3 or a file"):
        launching.command(["--accelerate-config", "fsdp3"])
    with pytest.raises(ValueError, match="no effect without --accelerate-config"):
        launching.command(["--num-processes", "2"])
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 1)
    with pytest.raises(ValueError, match="2 accelerators or more, and torch sees 1"):
        launching.command(["--accelerate-config", "zero2"])
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 8)
    start, left = launching.command(["--accelerate-config", "zero2", "--model", "base"])
    assert start[5:7] == ["--num_processes", "8"] and left == ["--model", "base"]


@pytest.mark.parametrize("name", launching.SHIPPED)
def test_what_is_shipped_is_what_accelerate_takes(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(launching.config_path(name)))
    assert config.mixed_precision == "bf16" and config.num_machines == 1
    assert config.gpu_ids is None and config.num_processes == -1
    kind = {"multi_gpu": "MULTI_GPU", "fsdp2": "FSDP"}.get(name, "DEEPSPEED")
    assert str(config.distributed_type).endswith(kind)
    assert config.fsdp_config.get("fsdp_version", 2) == 2
    assert not config.fsdp_config.get("fsdp_cpu_ram_efficient_loading", False)
    assert not config.deepspeed_config.get("zero3_init_flag", False)
    if name.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(name[-1])


def test_the_options_are_in_the_help():
    assert {"config", "accelerate_config", "num_processes"} <= {
        option.name for option in fields(TrainArguments)
    }
