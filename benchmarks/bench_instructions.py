"""Instructions that the C++ kernels take: a figure that does not depend on the neighbours.

    python -m benchmarks instructions [--tool callgrind|perf] [--case "residual_fwd fp32" ...]

valgrind's callgrind counts what a kernel itself executes, second call of two, one thread. It knows
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
from typing import Any

from benchmarks import harness, recording
from benchmarks.instruction_driver import CASES, elements

ROOT = Path(__file__).parents[1]
CASE = ("kernel", "tool", "capability")
ENTRIES = ("read_probe", *dict.fromkeys(case.split()[0] for case in CASES))
PERF_CALLS = (2, 22)


def _mangled(name: str) -> str:
    """Of qadapter::name, so that functions of nested names are not meant."""
    return f"_ZN8qadapter{len(name)}{name}E*"


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


def read_dumps(folder: Path) -> list[tuple[str, int]]:
    """(function, instructions) of callgrind's dumps in order."""
    found = []
    for path in folder.glob("out.*"):
        text = path.read_text()
        trigger = re.search(r"^desc: Trigger: --dump-after=_ZN8qadapter\d+(\w+)E", text, re.M)
        totals = re.search(r"^totals: (\d+)", text, re.M)
        if trigger and totals:
            name = next((e for e in ENTRIES if trigger.group(1).startswith(e + "E")), None)
            name = name or trigger.group(1)
            found.append((int(path.suffix[1:]), name, int(totals.group(1))))
    return [(name, count) for _, name, count in sorted(found)]


def of_cases(cases: list[str], dumps: list[tuple[str, int]]) -> dict[str, int]:
    """The last call of each case's kernel; cases lie between calls of read_probe."""
    segments: list[list[tuple[str, int]]] = [[]]
    for name, count in dumps:
        if name == "read_probe":
            segments.append([])
        else:
            segments[-1].append((name, count))
    segments = segments[1:-1]  # before the first mark and after the last there is nothing
    if len(segments) != len(cases):
        raise RuntimeError(f"expected {len(cases)} cases in the dumps, found {len(segments)}")
    counts = {}
    for case, segment in zip(cases, segments, strict=True):
        own = [count for name, count in segment if name == case.split()[0]]
        if not own:
            raise RuntimeError(f"{case}: its kernel did not run")
        counts[case] = own[-1]
    return counts


def callgrind(cases: list[str], capability: str) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        watch = [f"--{o}={_mangled(e)}" for e in ENTRIES for o in ("toggle-collect", "dump-after")]
        command = ["valgrind", "--tool=callgrind", "--demangle=no", "--collect-atstart=no"]
        command += [*watch, f"--callgrind-out-file={folder}/out"]
        _run([*command, *driver(cases)], capability)
        return of_cases(cases, read_dumps(Path(folder)))


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
    from qadapter import _cpp

    program = TOOLS[tool][0]
    if shutil.which(program) is None:
        return f"{program} is not installed"
    return _cpp.available()[1]


def run(options: argparse.Namespace) -> recording.Recording:
    recorded = recording.Recording("instructions", options, CASE)
    conditions = {"tool": options.tool, "capability": options.capability}
    cases = [{"kernel": case, **conditions} for case in options.case]
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


def show(rows: list[dict[str, Any]]) -> str:
    header = ["kernel", "code", "instructions", "each", "per"]
    lines = [
        [r["kernel"], r["capability"], f"{r['instructions']:,}", f"{r['each']:.3f}", r["per"]]
        for r in rows
        if "missing" not in r
    ]
    return harness.table(header, lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks instructions", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--tool", choices=TOOLS, default="callgrind")
    parser.add_argument("--capability", choices=("plain", "avx2", "avx512"), default="avx2")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    recording.shared_options(parser, "instructions")
    options = parser.parse_args(arguments)
    if options.tool == "callgrind" and options.capability == "avx512":
        parser.error("--capability avx512: valgrind knows no AVX-512; use --tool perf")
    if options.quick:
        options.case = options.case[:1]
    recording.finish_options(options)
    return options


def main(arguments: list[str] | None = None) -> int:
    recorded = run(parse(arguments))
    print(show(recorded.rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
