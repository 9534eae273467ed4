"""The command line: run (the default), sweep."""

import argparse
import os
import sys
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import datasets
import transformers

from benchmarks.quality import data as quality_data
from benchmarks.quality import decode_cost, matched, report, summary, sweep
from benchmarks.quality.settings import METHODS, SETS, Run, Set, changed
from benchmarks.quality.study import Study, run_all
from qadapter import files


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    run = commands.add_parser("run", help="the comparison of methods")
    search = commands.add_parser("sweep", help="settings of a method against each other")
    rules = ", ".join(quality_data.RULES)
    for add in (run.add_argument, search.add_argument):
        add("--set", choices=SETS, default="quick", help="default: %(default)s")
        add("--output", help="default: quality-output/<set>-<data>")
        add("--data", help="preference file to learn; default, what the project ships")
        add("--heldout", help="held-out pairs; default, a fifth of the prompts of --data")
        add("--unrelated", help="conversations that have nothing to do with --data")
        add("--rule", help=f"check answers by this rule: {rules}")
        add("--name", help="of the data; default, from its file")
        add("--model", default="smollm2", help="the base; default: %(default)s")
        add("--judges", nargs="*", default=["n-grams", "embeddings"])
        add("--seeds", type=int, nargs="+", help="default, the set's")
        add("--change", action="append", default=[], metavar="NAME=VALUE",
            help="of the set or of every training, such as pairs=64")  # fmt: skip
        add("--list", action="store_true", help="name the runs, and run nothing")
    run.add_argument("--methods", nargs="+", choices=METHODS, help="default, all")
    run.add_argument("--only", help="runs whose name holds this text")
    run.add_argument("--done", action="store_true", help="sum up the runs that are done already")
    run.add_argument("--json", help="where the summary goes; default <output>/summary.json")
    search.add_argument("--method", choices=METHODS, default="qadapter")
    search.add_argument("--vary", action="append", default=[], metavar="NAME=V,V,...")
    search.add_argument("--file", help="a JSON list of objects, a setting each")
    search.add_argument("--kl", type=float, nargs="+", default=matched.KLS)
    search.add_argument("--json", help="where the rows go; default <output>/sweep-<method>.json")
    search.add_argument("--answers", action="store_true", help="also make and judge answers")
    if not argv or argv[0] not in (*commands.choices, "-h", "--help"):
        argv = ["run", *argv]
    return parser.parse_args(argv)


def chosen_set(options: argparse.Namespace) -> Set:
    changes: dict[str, Any] = {}
    for text in options.change:
        name, found, value = text.partition("=")
        if not found:
            raise ValueError(f"--change: expected NAME=VALUE, got {text!r}")
        parsed = tuple(sweep.value_of(part) for part in value.split(",") if part)
        many = isinstance(getattr(SETS[options.set], name, None), tuple)
        changes[name] = parsed if many else parsed[0]
    if options.seeds:
        changes["seeds"] = tuple(options.seeds)
    return changed(SETS[options.set], changes)


def planned(options: argparse.Namespace, chosen: Set) -> list[Run]:
    if options.command == "sweep":
        settings = sweep.combinations(options.vary) if options.vary else []
        settings += sweep.from_file(options.file) if options.file else []
        runs = sweep.runs(options.method, settings, chosen.seeds)
    else:
        runs = [r for r in chosen.runs() if options.methods is None or r.method in options.methods]
        runs = [r for r in runs if options.only is None or options.only in r.name]
        if find_spec("trl") is None:
            # DPO is compared all the same: the package's own step makes TRL's losses.
            runs += [replace(r, method="dpo_own") for r in runs if r.method == "dpo"]
            runs = list(dict.fromkeys(runs))
    for run in runs:
        run.settings(chosen.usual)  # checks the names
    if not runs:
        raise ValueError("no run is left to do")
    return runs


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
    if options.command == "sweep":
        results, _ = run_all(study, runs, options.answers)
        record = summary.summarise_sweep(study, results, options.method, options.kl)
        files.write_json(options.json or study.output / f"sweep-{options.method}.json", record)
        print(report.settings_table(record))
        return
    if options.done:
        runs = [run for run in runs if study.result(run) is not None]
        if not runs:
            raise ValueError(f"--done: no run is done in {study.output}")
    results, missing = run_all(study, runs)
    record = summary.summarise(study, results, missing, decode_cost.decode_cost(study))
    path = options.json or study.output / "summary.json"
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
