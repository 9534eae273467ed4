"""`pytest -m gpu` means every test that runs on a GPU, also where little else is installed."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
ROOT = Path(__file__).resolve().parents[2]
# Nothing is run: that torch says it sees a GPU is enough to collect what would run on one.
AS_IF = """
import sys
import pytest, torch
torch.cuda.is_available = lambda: True
torch.cuda.get_device_name = lambda *_: "none"
class Missing:
    def find_spec(self, name, *_):
        if name.split(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *_: None if name in {missing!r} else real(name)
sys.meta_path.insert(0, Missing())
raise SystemExit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def collected(*arguments, missing=()):
    command = [sys.executable, "-c", AS_IF.format(missing=missing), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode in (0, 5), done.stdout[-3000:] + done.stderr[-1000:]
    return [line for line in done.stdout.splitlines() if "::" in line], done.stdout


def test_all_that_runs_on_a_gpu_is_marked():
    files = ("tests/kernels/test_residual.py", "tests/kernels/test_compiled.py")
    files += ("tests/ops/test_kl.py", "tests/ops/test_residual.py")
    every, _ = collected(*files)
    marked, _ = collected("-m", "gpu and not slow", *files)
    of_kernels = [name for name in every if "kernels/test_residual" in name]
    of_backends = [name for name in every if "-cuda" in name]
    assert len(of_kernels) > 30 and any("[triton-cuda" in name for name in of_backends)
    assert any("-cpu" in name for name in every) and any("test_compiled" in name for name in every)
    assert set(of_kernels + of_backends) == set(marked)
    chosen = ("-m", "gpu and not slow", *files)
    shares = [collected("--share", f"{i}/2", *chosen)[0] for i in range(2)]
    assert sorted(shares[0] + shares[1]) == sorted(marked)
    assert abs(len(shares[0]) - len(shares[1])) <= 1


def test_files_that_need_what_is_not_there_are_skipped():
    files = ("tests/training/test_arguments.py", "tests/ops/test_kl.py")
    names, output = collected(*files, missing=("datasets",))
    assert names and all("test_kl" in name for name in names)
    assert "error" not in output
