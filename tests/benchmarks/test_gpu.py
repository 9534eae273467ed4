"""The GPU run: a step that hangs or fails costs no other; a log that was cut off still counts."""

import json
import subprocess
import sys
import time

import pytest

from benchmarks import gpu

LOG = """
collected 5 items
tests/ops/test_kl.py::test_one[cuda-top-k, top-p] PASSED                 [ 20%]
tests/ops/test_kl.py::test_two FAILED                                    [ 40%]
tests/ops/test_kl.py::test_three SKIPPED (no GPU)                        [ 60%]
tests/ops/test_kl.py::test_four 
"""  # noqa: W291 - as pytest leaves it while a test runs


def test_outcomes_of_a_log_that_was_cut_off():
    assert gpu.outcomes(LOG) == {
        "passed": 1,
        "skipped": 1,
        "failed": ["tests/ops/test_kl.py::test_two"],
        "unfinished": ["tests/ops/test_kl.py::test_four"],
    }
    assert gpu.outcomes("")["unfinished"] == []
    assert gpu.outcomes(LOG.rpartition("tests/")[0])["unfinished"] == []


def test_every_step_has_its_own_time(tmp_path):
    report = gpu.Report(tmp_path / "report.json")
    steps = [
        gpu.Step("hangs", gpu.python("-c", "import time; print('began'); time.sleep(99)"), 2.0),
        gpu.Step("fails", gpu.python("-c", "raise SystemExit('no such GPU')"), 30.0),
        gpu.Step("runs", gpu.python("-c", "import os; print(os.environ['HF_HUB_OFFLINE'])"), 30.0),
    ]
    texts = {}

    def ended(step, text):
        texts[step.name] = text
        report.write(step, end=text)
        assert step.name in json.loads(report.path.read_text())["steps"]

    began = time.monotonic()
    gpu.run(steps, began + 60, tmp_path, False, ended)
    assert time.monotonic() - began < 50
    found = json.loads(report.path.read_text())["steps"]
    assert found["hangs"]["out_of_time"] and found["hangs"]["code"] < 0
    assert not found["fails"]["out_of_time"] and found["fails"]["code"] == 1
    assert found["runs"]["code"] == 0 and texts["runs"].strip() == "1"
    assert "no such GPU" in texts["fails"]


@pytest.mark.parametrize("tiny", [False, True])
def test_all_fits_into_six_minutes(tmp_path, tiny):
    """By what each may take at most; and benchmarks are there, with the options that are given."""
    steps = gpu.bench_steps(tmp_path, tiny)
    assert {"logits", "linear", "sample", "decode"} <= {step.name for step in steps}
    assert sum(seconds for _, _, seconds, _ in gpu.BENCH) <= gpu.TOTAL_S["bench"]
    assert all(step.seconds < gpu.TOTAL_S["check"] for step in gpu.check_steps(tiny))
    assert max(gpu.TOTAL_S.values()) <= 360


def test_what_is_measured_needs_few_packages():
    """Figures are made into tables and pictures elsewhere, and pairs are read elsewhere."""
    few = """
import sys
sys.modules.update(dict.fromkeys(("pandas", "datasets", "matplotlib", "psutil", "peft")))
from benchmarks import bench_linear, bench_logits, recording
print(recording.show([{"who": "a", "ms": {"best": 2.5}}, {"who": "b", "missing": "c"}]))
"""
    done = subprocess.run([sys.executable, "-c", few], capture_output=True, text=True, cwd=gpu.ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| ms best | 2.5 |" in done.stdout and "b: c" in done.stdout
