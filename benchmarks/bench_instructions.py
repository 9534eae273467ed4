"""Instructions that the C++ kernels take: a figure that does not depend on the neighbours.

    python -m benchmarks instructions [--tool callgrind|perf] [--case "residual_fwd fp32" ...]

valgrind's callgrind counts what a call of a kernel executes, the mean of two, one thread. It knows
no AVX-512, so the AVX2 code is counted, or with ``--capability plain`` the portable one; what is
changed in the source changes in all of them. Where the machine has performance counters, perf
counts on the processor itself: the difference of runs with 2 and with 22 calls, over 20, which has
Python's share in it and serves the AVX-512 code. Counts of one compiler compare; times do not
follow from them.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import bench, recording, tables
from benchmarks.instruction_driver import CASES, elements
from benchmarks.report_suite import INSTRUCTIONS

ROOT = Path(__file__).parents[1]
CASE = ("kernel", "tool", "capability")
PERF_CALLS = (2, 22)


def driver(cases: list[str], *more: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.instruction_driver", *more, "--case", *cases]


def _environment(capability: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {
        **os.environ,
        "PYTHONPATH": path,
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "QADAPTER_CPU_CAPABILITY": capability,
    }


def _run(command: list[str], capability: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, env=_environment(capability), cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        last = "\n".join(done.stderr.splitlines()[-5:])
        raise RuntimeError(f"{command[0]} failed with status {done.returncode}:\n{last}")
    return done


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


def callgrind(cases: list[str], capability: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    # A profile has one count for each function: the dtypes take a run each.
    for dtype in dict.fromkeys(case.split()[1] for case in cases):
        group = [case for case in cases if case.split()[1] == dtype]
        with tempfile.TemporaryDirectory() as folder:
            command = ["valgrind", "--tool=callgrind", "--demangle=no"]
            command += [f"--callgrind-out-file={folder}/out"]
            _run([*command, *driver(group)], capability)
            profile = read_profile((Path(folder) / "out").read_text())
        counts |= {case: of_kernel(case.split()[0], profile) for case in group}
    return counts


def _perf_total(case: str, capability: str, calls: int) -> int:
    command = ["perf", "stat", "-x", ",", "-e", "instructions:u"]
    done = _run([*command, *driver([case], "--repeat", str(calls))], capability)
    line = next((s for s in done.stderr.splitlines() if "instructions" in s), "")
    if not line.split(",")[0].isdigit():
        raise RuntimeError(f"perf counts no instructions on this machine ({line.strip()})")
    return int(line.split(",")[0])


def perf(cases: list[str], capability: str) -> dict[str, int]:
    few, many = PERF_CALLS
    return {
        case: (_perf_total(case, capability, many) - _perf_total(case, capability, few))
        // (many - few)
        for case in cases
    }


TOOLS = {"callgrind": ("valgrind", callgrind), "perf": ("perf", perf)}


def missing_reason(tool: str) -> str:
    from qadapter.ops import cpp

    program = TOOLS[tool][0]
    if shutil.which(program) is None:
        return f"{program} is not installed"
    return cpp.why_not_loaded() or ""


def run(options: argparse.Namespace) -> recording.Recording:
    recorded = recording.Recording("instructions", options, CASE)
    cases = bench.grid(kernel=options.case, tool=[options.tool], capability=[options.capability])
    reason = missing_reason(options.tool)
    left = [c for c in cases if not (options.resume and recorded.has(c))]
    if reason:
        for case in left:
            recorded.put(case, [{"missing": reason}], reason)
        return recorded
    # One run of the tool for all that are left: most of its time is Python's and torch's start.
    counts: dict[str, int] = {}
    for case in recorded.todo(cases):
        if not counts:
            counts = TOOLS[options.tool][1]([c["kernel"] for c in left], options.capability)
        count, (size, what) = counts[case["kernel"]], elements(case["kernel"])
        row = {"instructions": count, "each": count / size, "per": what}
        recorded.put(case, [row], show([{**case, **row}]))
    return recorded


def show(rows: list[tables.Row]) -> str:
    return tables.table(tables.frame(rows), INSTRUCTIONS)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = bench.parser("instructions", __doc__, prog="python -m benchmarks instructions")
    parser.add_argument("--tool", choices=TOOLS, default="callgrind")
    parser.add_argument("--capability", choices=("plain", "avx2", "avx512"), default="avx2")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    options = bench.parse(parser, arguments, {})
    if options.tool == "callgrind" and options.capability == "avx512":
        parser.error("--capability avx512: valgrind knows no AVX-512; use --tool perf")
    if options.quick:
        options.case = options.case[:1]
    return options


def main(arguments: list[str] | None = None) -> int:
    print(show(run(parse(arguments)).rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
