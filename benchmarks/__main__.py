"""Runs a set of benchmarks, reports them, compares them.

    python -m benchmarks cpu-quick [--only logits linear] [--resume] [--output DIR]
    python -m benchmarks report                        tables and plots of README and docs
    python -m benchmarks compare OLD.json NEW.json     what got slower
    python -m benchmarks instructions                  of the C++ kernels, by valgrind
    python -m benchmarks quality [--set quick|full]    preference against forgetting, by method

A set measures the ceilings of the machine first, then one benchmark after the other, each into a
JSON file of its own, which is written after every case. Full sets write to benchmarks/results/,
quick ones to benchmarks/results/<set>/, which git ignores.
"""

import argparse
import importlib
import os
import sys
import time
from pathlib import Path

import torch

from benchmarks import bench, harness, recording
from benchmarks.sets import SETS, Step

COMMANDS = {"report": "report", "compare": "compare", "quality": "quality.__main__"}


def about_text(device: str, peaks: harness.Ceilings) -> str:
    """The machine, what runs on it, and what it reaches at best."""
    found = recording.environment(device)
    what = f"{found['cpu']}, {found['cores']} cores, {found['memory_gib']} GiB"
    if device == "cuda":
        what += f", {found['gpu']}, CUDA {found['cuda']}"
    versions = ", ".join(f"{name} {v}" for name, v in recording.versions().items())
    products = ", ".join(f"{name} {v:.3f} TFLOP/s" for name, v in peaks.gemm_tflop_s.items())
    return (
        f"{what}, {found['threads']} threads, load {found['load']:.1f}\n"
        f"Python {found['python']}, torch {found['torch']}, {versions}\n"
        f"backends: {', '.join(found['backends'])}\n"
        f"ceilings of this run: read {peaks.read_gb_s:.1f} GB/s, copy {peaks.copy_gb_s:.1f} GB/s "
        f"(read and written), matrix products: {products}"
    )


def run_step(step: Step, path: Path, title: str, options: argparse.Namespace) -> None:
    module = importlib.import_module(step.module)
    arguments = ["--quick"] if options.tiny else list(step.arguments)
    if options.data is not None and "data" in module.OPTIONS:
        arguments += ["--data", options.data]
    if options.resume:
        arguments.append("--resume")
    arguments += ["--device", options.device, "--threads", str(options.threads)]
    parsed = bench.parse(module, [*arguments, "--json", str(path)])
    parsed.ceilings, parsed.position = options.ceilings, title
    recorded = module.run(parsed)
    for who, what in recorded.more.get("cannot", {}).items():
        print(f"{who}: {what}")


def run_set(name: str, options: argparse.Namespace) -> int:
    chosen = SETS[name]
    options.device = options.device or chosen.device
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            f"{name} needs a CUDA device and torch sees none. `--device cpu --tiny` goes through "
            "it with tiny shapes on the CPU"
        )
    torch.set_num_threads(options.threads)
    folder = options.output or recording.RESULTS / ("" if not name.endswith("-quick") else name)
    if options.tiny and options.output is None:
        raise SystemExit("--tiny: say where its results go with --output; they measure nothing")
    steps = [s for s in chosen.steps if options.only is None or s.name in options.only]
    started = time.perf_counter()
    sizes = harness.CEILING_SIZES["quick" if options.tiny else options.device]
    options.ceilings = harness.ceilings(options.device, *sizes)
    print(f"{name}: {chosen.about}\n{about_text(options.device, options.ceilings)}", flush=True)
    failed: list[str] = []
    for number, step in enumerate(steps, start=1):
        path = Path(folder) / f"{step.name}-{options.device}.json"
        print(f"\n== {step.name} ({step.module}) -> {path}", flush=True)
        try:
            run_step(step, path, f"[{number}/{len(steps)}] ", options)
        except Exception as error:  # the others are worth having all the same
            failed.append(f"{step.name}: {type(error).__name__}: {error}")
            print(failed[-1], file=sys.stderr)
        print(f"{(time.perf_counter() - started) / 60:.1f} minutes so far", flush=True)
    if failed:
        print("\nnot measured:\n" + "\n".join(failed), file=sys.stderr)
    return 1 if failed else 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sets = ", ".join(f"{name} ({chosen.about})" for name, chosen in SETS.items())
    parser.add_argument("set", choices=SETS, metavar="SET", help=f"{sets}")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="steps of the set")
    parser.add_argument("--resume", action="store_true", help="go on with a run that was cut off")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where the JSON files go")
    parser.add_argument(
        "--data",
        metavar="FILE",
        help="preference pairs for training steps, or a Hub id; default: the demo's, short ones",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the set's")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: does everything run?")
    options = parser.parse_args(arguments)
    names = [step.name for step in SETS[options.set].steps]
    if unknown := [name for name in options.only or [] if name not in names]:
        parser.error(
            f"--only: {options.set} has no {', '.join(unknown)}; it has {', '.join(names)}"
        )
    return options


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    command = arguments[0] if arguments else ""
    if command in COMMANDS:
        module = importlib.import_module(f"benchmarks.{COMMANDS[command]}")
        return module.main(arguments[1:]) or 0
    if command == "instructions":
        bench.main(importlib.import_module("benchmarks.bench_instructions"), arguments[1:])
        return 0
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # what is measured is on this machine
    options = parse(arguments)
    return run_set(options.set, options)


if __name__ == "__main__":
    raise SystemExit(main())
