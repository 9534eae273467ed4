"""Instructions that the C++ kernels take: a figure that does not depend on the neighbours.

    python -m benchmarks instructions [--case "residual_fwd fp32" ...] [--capability plain]

valgrind's callgrind counts what a call of a kernel executes, the mean of two, one thread. It knows
no AVX-512, so the AVX2 code is counted, or with ``--capability plain`` the portable one; what is
changed in the source changes in all of them. Counts of one compiler compare; times do not follow
from them.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import bench, recording
from benchmarks.instruction_driver import CASES, ELEMENTS
from qadapter.ops import cpp

ROOT = Path(__file__).parents[1]
CASE = ("kernel", "capability")
OPTIONS: bench.Options = {
    "case": (list(CASES), list(CASES), list(CASES)[:1]),
    "capability": "avx2",
}
CHOICES = {"case": CASES, "capability": ("plain", "avx2")}


def read_profile(text: str) -> dict[str, tuple[int, int]]:
    """Function -> calls and instructions in them, what it calls included, of callgrind's output.

    A name is written once, behind a number that stands for it from then on. The line after
    ``calls=`` ends with the instructions of those calls.
    """
    names: dict[str, str] = {}
    found: dict[str, tuple[int, int]] = {}
    callee, calls = "", 0
    for line in text.splitlines():
        if match := re.match(r"c?fn=\((\d+)\)(?: (.+))?$", line):
            number, name = match.groups()
            if name:
                names[number] = name
            if line.startswith("cfn="):
                callee = names[number]
        elif line.startswith("calls="):
            calls = int(line[len("calls=") :].split()[0])
        elif calls:
            before = found.get(callee, (0, 0))
            found[callee] = before[0] + calls, before[1] + int(line.split()[-1])
            calls = 0
    return found


def of_kernel(kernel: str, profile: dict[str, tuple[int, int]]) -> int:
    """Instructions of a call. Names are the mangled ones of qadapter::kernel(...)."""
    start = f"_ZN8qadapter{len(kernel)}{kernel}E"
    own = [value for name, value in profile.items() if name.startswith(start)]
    if not own:
        raise RuntimeError(f"{kernel} did not run, or valgrind does not see its name")
    calls, count = (sum(column) for column in zip(*own, strict=True))
    return count // calls


def profile_of(cases: list[str], capability: str) -> dict[str, tuple[int, int]]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    more = {"PYTHONPATH": path, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **more, "QADAPTER_CPU_CAPABILITY": capability}
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", "--demangle=no"]
        command += [f"--callgrind-out-file={folder}/out"]
        command += [sys.executable, "-m", "benchmarks.instruction_driver", *cases]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            last = "\n".join(done.stderr.splitlines()[-5:])
            raise RuntimeError(f"valgrind failed with status {done.returncode}:\n{last}")
        return read_profile((Path(folder) / "out").read_text())


def missing_reason() -> str:
    if shutil.which("valgrind") is None:
        return "valgrind is not installed"
    return cpp.why_not_loaded() or ""


def run(options: argparse.Namespace) -> recording.Recording:
    recorded = recording.Recording("instructions", options, CASE)
    reason = missing_reason()
    # Most of a run of the tool is Python's and torch's start, so one counts many cases. A profile
    # has one count for each function, so the dtypes take a run each.
    profiles: dict[str, dict[str, tuple[int, int]]] = {}
    cases = recorded.left(bench.grid(kernel=options.case, capability=[options.capability]))
    for case in recorded.todo(cases):
        if reason:
            recorded.put(case, [{"who": case["kernel"], "missing": reason}])
            continue
        kernel, dtype = CASES[case["kernel"]]
        if dtype not in profiles:
            group = [c["kernel"] for c in cases if c["kernel"].endswith(dtype)]
            profiles[dtype] = profile_of(group, options.capability)
        count, (size, what) = of_kernel(kernel.__name__, profiles[dtype]), ELEMENTS[kernel]
        row = {"tool": "callgrind", "instructions": count, "each": count / size, "per": what}
        recorded.put(case, [row], f"{count:,} instructions, {count / size:.3f} per {what}")
    return recorded


if __name__ == "__main__":
    bench.main(sys.modules[__name__])
