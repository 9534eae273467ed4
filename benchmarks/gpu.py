"""A GPU in two calls of six minutes: whether everything is right on it, then how fast it is.

    python3 -m benchmarks.gpu check [--output DIR]    make gpu-check
    python3 -m benchmarks.gpu bench [--output DIR]    make gpu-bench

For a machine that is lent for minutes and has little on it: python3 with torch, Triton, pytest and
transformers (decoding also takes PEFT), this tree, and the extensions that were built elsewhere.
Nothing is installed or fetched. Every step is a process of its own under a time limit of its own,
and what is known is written to gpu-check.json or gpu-bench.json whenever one ends, so that a step
that hangs, crashes or comes too late costs no other. --output defaults to $OUT, else gpu-results.

`check` runs what `pytest -m gpu` would, but for the slow tests, in as many shares at once as there
are cores. Every test that failed, and those that did not come to an end, are named, with the end of
what their share printed. `bench` writes the JSON of each benchmark beside its own file, as
`python -m benchmarks` does; every process measures copy and matrix product for itself.

--tiny goes through all of it without a GPU, in Triton's interpreter (that of Triton 3.6 needs numpy
older than 2.4), and measures nothing.
"""

import argparse
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOTAL_S = {"check": 345.0, "bench": 350.0}  # a call may take six minutes
SHARES = 12
TAIL = 6000  # characters of a log that are kept
OUTCOME = re.compile(r"^(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b", re.MULTILINE)

MACHINE = """
import json, subprocess, sys, torch, qadapter
from importlib.metadata import version, PackageNotFoundError
found = {"python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda}
for name in ("triton", "transformers", "pytest", "peft"):
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        found[name] = None
if torch.cuda.is_available():
    found["gpu"] = torch.cuda.get_device_name()
    found["capability"] = torch.cuda.get_device_capability()
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,memory.total",
             "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
        found["driver, clock, memory"] = done.stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        found["driver, clock, memory"] = str(error)
found["backends"] = {b.name: [b.available, b.reason] for b in qadapter.backends()}
print(json.dumps(found))
"""


@dataclass
class Step:
    """A command, the seconds that it may take, and what became of it."""

    name: str
    command: list[str]
    seconds: float
    found: dict[str, Any] = field(default_factory=dict)


def environment(tiny: bool) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    own = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    own |= {"OMP_NUM_THREADS": "1", **({"TRITON_INTERPRET": "1"} if tiny else {})}
    return {**os.environ, **own}


def run(steps: list[Step], until: float, logs: Path, tiny: bool, ended: Any) -> None:
    """All at once; ``ended`` is called with each as it ends, or as its time does."""
    running = {}
    for step in steps:
        log = (logs / f"{step.name}.log").open("w+b")
        process = subprocess.Popen(
            step.command,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment(tiny),
            start_new_session=True,
        )
        running[step.name] = (step, process, log, time.monotonic())
    while running:
        for name, (step, process, log, started) in list(running.items()):
            now = time.monotonic()
            late = now > min(started + step.seconds, until)
            if process.poll() is None and not late:
                continue
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            log.seek(0)
            text = log.read().decode(errors="replace")
            log.close()
            step.found = {
                "command": step.command[1:],
                "seconds": round(now - started, 1),
                "code": process.returncode,
                "out_of_time": late,
            }
            del running[name]
            ended(step, text)
        time.sleep(0.2)


def outcomes(text: str) -> dict[str, Any]:
    """Of a share's tests, from what pytest -v prints while it runs."""
    by_name = dict(OUTCOME.findall(text))
    listed = list(by_name.values())
    bad = [name for name, outcome in by_name.items() if outcome in ("FAILED", "ERROR")]
    last = text.rstrip().rpartition("\n")[2]
    unfinished = last.startswith("tests/") and "::" in last and not OUTCOME.match(last)
    return {
        "passed": listed.count("PASSED"),
        "skipped": listed.count("SKIPPED"),
        "failed": bad,
        "unfinished": [last] if unfinished else [],  # its name is printed ahead of the test
    }


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def check_steps(tiny: bool) -> list[Step]:
    shares = 2 if tiny else max(1, min(SHARES, os.cpu_count() or 1))
    options = ["-v", "--tb=short", "-p", "no:cacheprovider", "--color=no"]
    if tiny:
        options += ["tests/kernels/test_linear_bwd.py", "tests/kernels/test_linear_head.py"]
    else:
        options += ["-m", "gpu and not slow", "tests/kernels", "tests/csrc/cuda", "tests/ops"]
    return [
        Step(f"share-{i}", python("-m", "pytest", "--share", f"{i}/{shares}", *options), 320.0)
        for i in range(shares)
    ]


LOGITS = "--n 8192 --dtype bf16 --seconds 4"
LINEAR = "--n 8192 --size 4096x128256 --dtype bf16 --mode uncached cached"
# name, benchmark, seconds, arguments
BENCH = (
    ("logits", "logits", 55.0, f"{LOGITS} --peers qadapter eager"),
    ("linear", "linear", 65.0, f"{LINEAR} --seconds 8 --peers qadapter eager"),
    ("sample", "sample", 45.0, "--streams two --filters plain 'top-k, top-p' --peers eager"),
    ("logits-ext", "logits", 40.0, f"{LOGITS} --backend cuda --peers qadapter"),
    ("linear-ext", "linear", 45.0, f"{LINEAR} --seconds 5 --backend cuda --peers qadapter"),
    (
        "decode",
        "decode",
        100.0,
        "--model llama-8b --batch-sizes 1 --new-tokens 48 --mode sampled --lora all "
        "--cache dynamic --rounds 2",
    ),
)
# In the interpreter a row takes tens of milliseconds.
TINY = {
    "logits": "--backend triton --n 4 --dtype bf16 --op backward --peers qadapter",
    "linear": "--backend triton --n 4 --pairs 1 --size 64x1000 --dtype bf16 --mode cached --peers",
    "sample": "--dtype bf16 --streams two --filters plain --peers eager",
    "decode": "--batch-sizes 1 --mode greedy --lora all",
}


def bench_steps(output: Path, tiny: bool) -> list[Step]:
    """The kernels of the CUDA extension where it is there: it has to be built before."""
    steps = []
    without_peft = importlib.util.find_spec("peft") is None
    for name, benchmark, seconds, more in BENCH:
        of_extension = "--backend" in more
        if of_extension and (tiny or not list((ROOT / "qadapter").glob("_C_cuda.*"))):
            continue
        if name == "decode" and without_peft:
            print("decode is left out: PEFT is not installed")
            continue
        arguments = ["--device", "cuda", *shlex.split(more)]
        if tiny:
            arguments = ["--quick", "--threads", "1", *shlex.split(TINY[benchmark])]
        path = str(output / f"{name}-{'tiny' if tiny else 'cuda'}.json")
        command = python("-m", f"benchmarks.bench_{benchmark}", *arguments, "--json", path)
        steps.append(Step(name, command, 600.0 if tiny else seconds))
    return steps


class Report:
    """What is known so far, in one file."""

    def __init__(self, path: Path) -> None:
        self.path, self.known = path, {"steps": {}}

    def write(self, step: Step, **more: Any) -> None:
        self.known["steps"][step.name] = {**step.found, **more}
        temporary = self.path.with_suffix(".new")
        temporary.write_text(json.dumps(self.known, indent=1) + "\n")
        temporary.replace(self.path)
        what = ", ".join(f"{key} {value}" for key, value in more.items() if key != "end")
        took = f"{step.found['seconds']:.0f} s, code {step.found['code']}"
        print(f"{step.name}: {took}{', out of time' * step.found['out_of_time']} {what}")
        if step.found["code"] != 0 and "end" in more:
            print("\n".join(more["end"].splitlines()[-12:]))
        sys.stdout.flush()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("check", "bench"))
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", "gpu-results")))
    parser.add_argument("--tiny", action="store_true", help="without a GPU: does everything run?")
    options = parser.parse_args(arguments)
    until = time.monotonic() + (3600.0 if options.tiny else TOTAL_S[options.what])
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    logs = Path(tempfile.mkdtemp(prefix="qadapter-gpu-"))
    report = Report(output / f"gpu-{options.what}.json")

    def of_machine(step: Step, text: str) -> None:
        if step.found["code"] == 0:
            report.known["machine"] = json.loads(text.splitlines()[-1])
        report.write(step, end=text[-TAIL:])

    def of_tests(step: Step, text: str) -> None:
        found = outcomes(text)
        good = step.found["code"] == 0
        report.write(step, **found, **({} if good else {"end": text[-TAIL:]}))

    def of_benchmark(step: Step, text: str) -> None:
        report.write(step, end=text[-TAIL:])

    run([Step("machine", python("-c", MACHINE), 90.0)], until, logs, options.tiny, of_machine)
    if not options.tiny and "gpu" not in report.known.get("machine", {}):
        print("torch sees no GPU here; --tiny goes through everything without one")
        return 2
    if options.what == "check":
        run(check_steps(options.tiny), until, logs, options.tiny, of_tests)
    else:
        for step in bench_steps(output, options.tiny):
            run([step], until, logs, options.tiny, of_benchmark)
    steps = report.known["steps"]
    bad = [name for name, found in steps.items() if found["code"] != 0]
    if options.what == "check":
        totals = {k: sum(s.get(k, 0) for s in steps.values()) for k in ("passed", "skipped")}
        failed = [name for s in steps.values() for name in s.get("failed", [])]
        print(f"{totals['passed']} passed, {len(failed)} failed, {totals['skipped']} skipped")
    print(f"{report.path}; logs in {logs}; not well: {', '.join(bad) or 'nothing'}")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
