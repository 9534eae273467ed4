"""The command line: the comparison of methods, or with --vary one method's settings compared."""

import argparse
import os
import sys
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import datasets
import transformers

from benchmarks.bench import grid
from benchmarks.quality import data as quality_data
from benchmarks.quality import decode_cost, report, summary
from benchmarks.quality.settings import METHODS, SETS, TRL, Run, Set, changed
from benchmarks.quality.study import Study, run_all
from qadapter import files


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    add = parser.add_argument
    add("--set", choices=SETS, default="quick", help="default: %(default)s")
    add("--output", help="default: quality-output/<set>-<data>")
    add("--data", help="preference file to learn; default, what the project ships")
    add("--heldout", help="held-out pairs; default, a fifth of the prompts of --data")
    add("--unrelated", help="conversations that have nothing to do with --data")
    add("--rule", help=f"check answers by this rule: {', '.join(quality_data.RULES)}")
    add("--name", help="of the data; default, from its file")
    add("--model", default="smollm2", help="the base; default: %(default)s")
    add("--judges", nargs="*", default=["n-grams", "embeddings"])
    add("--seeds", type=int, nargs="+", help="default, the set's")
    add("--change", action="append", default=[], metavar="NAME=VALUE",
        help="of the set or of every training, such as pairs=64")  # fmt: skip
    add("--vary", action="append", default=[], metavar="NAME=VALUE,...",
        help="compare a method's settings, every combination, by scores alone")  # fmt: skip
    add("--methods", nargs="+", choices=METHODS, help="default, all; with --vary qadapter")
    add("--only", help="runs whose name holds this text")
    add("--list", action="store_true", help="name the runs, and run nothing")
    add("--done", action="store_true", help="sum up the runs that are done already")
    add("--json", help="where the summary goes; default <output>/summary.json, sweep-<method>.json")
    return parser.parse_args(argv)


def assignments(flag: str, texts: list[str]) -> dict[str, tuple[Any, ...]]:
    """NAME=VALUE,... of every text."""
    made = {}
    for text in texts:
        name, found, values = text.partition("=")
        if not found or not name:
            raise ValueError(f"{flag}: expected NAME=VALUE,..., got {text!r}")
        made[name] = tuple(_value(value) for value in values.split(",") if value)
    return made


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def chosen_set(options: argparse.Namespace) -> Set:
    changes: dict[str, Any] = {}
    for name, values in assignments("--change", options.change).items():
        many = isinstance(getattr(SETS[options.set], name, None), tuple)
        if not many and len(values) != 1:
            raise ValueError(f"--change: expected one value of {name}, got {len(values)}")
        changes[name] = values if many else values[0]
    if options.seeds:
        changes["seeds"] = tuple(options.seeds)
    return changed(SETS[options.set], changes)


def planned(options: argparse.Namespace, chosen: Set) -> list[Run]:
    if options.vary:
        if len(options.methods or ["qadapter"]) > 1:
            raise ValueError(f"--vary: expected one of --methods, got {' '.join(options.methods)}")
        (method,) = options.methods or ["qadapter"]
        runs = varied(method, options.vary, chosen.seeds)
    else:
        wanted = options.methods or []
        runs = [r for r in chosen.runs() if r.method in wanted or not wanted]
        more = set(wanted) - {run.method for run in runs}  # that the set itself does not run
        runs += [Run(m, seed) for seed in chosen.seeds for m in wanted if m in more]
    runs = [r for r in runs if options.only is None or options.only in r.name]
    for run in runs:
        run.settings(chosen.usual)  # checks the names
    if not runs:
        raise ValueError("no run is left to do")
    return runs


def available(study: Study, runs: list[Run]) -> tuple[list[Run], dict[str, str]]:
    """What is trained or can be here, and of the methods that cannot why.

    DPO is compared all the same: the package's own step makes TRL's losses.
    """
    out = [run for run in runs if run.method in TRL and study.done(run, "training.json") is None]
    if find_spec("trl") is not None or not out:
        return runs, {}
    found = [run for run in runs if run not in out]
    found += [replace(run, method="dpo_own") for run in out if run.method == "dpo"]
    missing = {run.method: 'needs TRL: pip install "qadapter[trl]"' for run in out}
    return list(dict.fromkeys(found)), missing


def varied(method: str, vary: list[str], seeds: tuple[int, ...]) -> list[Run]:
    """The usual settings first, then every combination; all of a seed before the next."""
    settings = [{}, *grid(**assignments("--vary", vary))]
    variants = [tuple(sorted(changes.items())) for changes in settings]
    return [Run(method, seed, 0.0, changes) for seed in seeds for changes in variants]


def measure(options: argparse.Namespace) -> None:
    chosen = chosen_set(options)
    runs = planned(options, chosen)
    if options.list:
        print("\n".join(run.name for run in runs))
        return
    datasets.disable_progress_bars()  # one bar is enough
    transformers.utils.logging.disable_progress_bar()
    data = quality_data.load(
        options.data, options.heldout, options.unrelated, options.rule, options.name
    )
    output = options.output or f"quality-output/{options.set}-{data.name}"
    study = Study(chosen, data, output, options.model, tuple(options.judges))
    runs, missing = available(study, runs)
    if options.done:
        runs = [run for run in runs if study.done(run) is not None]
        if not runs:
            raise ValueError(f"--done: no run is done in {study.output}")
    results = run_all(study, runs, answered=not options.vary)
    if options.vary:
        name = f"sweep-{runs[0].method}.json"
        record = summary.summarise_sweep(study, results, runs[0].method)
    else:
        name = "summary.json"
        record = summary.summarise(study, results, missing, decode_cost.decode_cost(study))
    path = options.json or study.output / name
    files.write_json(path, record)
    print(f"{report.text(record)}\n\nsummary {path}")


def main(argv: list[str] | None = None) -> int:
    try:
        measure(parse(sys.argv[1:] if argv is None else argv))
    except (ValueError, OSError) as error:
        print(f"quality: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
