"""What got slower between two results of one machine, beyond the noise.

    python -m benchmarks compare OLD.json NEW.json     (or two folders of results)

Times are matched by what they are of. The noise of a time is half of its p20 to p80 range, relative
to its median; a pair's is both together (root of the sum of squares). A time got slower if the new
median is longer than the old by more than twice that noise, and more than ``--least`` (5 %); and
the new best time is, too, as load of others on the machine moves medians more than best times.
Instruction counts have next to no noise: there ``--least-counts`` (1 %) alone rules. Memory is
shown where it grew by more than ``--least`` and 1 MiB.

The exit status is 1 if anything got slower, took more instructions or more memory.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.recording import MACHINE
from benchmarks.tables import Column, Record, Row, table
from qadapter import files

IDENTITY = (
    "sweep", "dtype", "model", "op", "who", "n", "d", "v", "b", "mode", "lora", "streams", "logits",
    "filters", "batch", "tokens", "length", "threads", "budget_mib", "kernel",
)  # fmt: skip
# What a row was measured on; another value makes another time.
SETTINGS = ("shape", "pairs", "max_length", "new_tokens", "cache", "clock", "shuffle", "backend")
TIMES = 2.0  # noises
WORDS = {
    "time": {"slower": "SLOWER", "faster": "FASTER"},
    "instructions": {"slower": "MORE INSTRUCTIONS", "faster": "FEWER INSTRUCTIONS"},
    "memory": {"slower": "MORE MEMORY", "faster": "LESS MEMORY"},
}


@dataclass(frozen=True)
class Measured:
    kind: str  # time, instructions, memory
    value: float
    best: float
    noise: float = 0.0


@dataclass(frozen=True)
class Difference:
    what: str
    kind: str
    old: float
    new: float
    noise: float
    allowed: float
    verdict: str  # slower, faster, same


def _found(value: Row, path: str) -> Iterator[tuple[str, Measured]]:
    """Times, counts and peaks anywhere in a row."""
    for name, part in value.items():
        where = f"{path} {name}".strip()
        if isinstance(part, dict) and {"median", "p20", "p80", "best"} <= part.keys():
            noise = (part["p80"] - part["p20"]) / 2 / part["median"]
            yield where, Measured("time", part["median"], part["best"], noise)
        elif isinstance(part, dict) and name != "error":
            yield from _found(part, where)
        elif name == "instructions":
            yield where, Measured("instructions", part, part)
        elif name == "peak_mib" or name.endswith("peak MiB"):
            yield where, Measured("memory", part, part)


def measured(record: Record) -> dict[str, Measured]:
    """Everything that can be compared, by what it is of."""
    found: dict[str, Measured] = {}
    for row in [*record["rows"], *record.get("parts", [])]:
        if record["benchmark"] == "context" or "missing" in row:
            continue
        label = " ".join(f"{name}={row[name]}" for name in IDENTITY if name in row)
        for path, value in _found(row, ""):
            found[f"{record['benchmark']} {label} {path}"] = value
    return found


def same_conditions(old: Record, new: Record) -> list[str]:
    """What differs so that times cannot be compared."""
    then, now = old["environment"], new["environment"]
    pairs = [(f"machine: {k}", then.get(k), now.get(k)) for k in MACHINE if k != "torch"]
    pairs += [("benchmark", old["benchmark"], new["benchmark"])]
    pairs += [(k, old[k], new[k]) for k in SETTINGS if k in old and k in new]
    return [f"{name}: {a} and {b}" for name, a, b in pairs if a != b]


def judge(
    what: str, old: Measured, new: Measured, least: float = 0.05, least_counts: float = 0.01
) -> Difference:
    noise = math.hypot(old.noise, new.noise)
    allowed = least_counts if old.kind == "instructions" else max(least, TIMES * noise)
    of_best = max(least, least_counts) if old.kind == "time" else least_counts

    def worse(one: Measured, other: Measured) -> bool:
        if old.kind == "memory" and other.value <= one.value + 1:
            return False
        return other.value > one.value * (1 + allowed) and other.best > one.best * (1 + of_best)

    verdict = "slower" if worse(old, new) else "faster" if worse(new, old) else "same"
    return Difference(what, old.kind, old.value, new.value, noise, allowed, verdict)


def differences(
    old: Record, new: Record, least: float = 0.05, least_counts: float = 0.01
) -> list[Difference]:
    if changed := same_conditions(old, new):
        raise ValueError(f"these results cannot be compared: {'; '.join(changed)}")
    before, after = measured(old), measured(new)
    return [
        judge(what, before[what], after[what], least, least_counts)
        for what in before
        if what in after
    ]


def _pairs(old: Path, new: Path) -> list[tuple[Path, Path]]:
    for path in (old, new):
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder")
    if old.is_dir() != new.is_dir():
        raise ValueError(f"expected two files or two folders, got {old} and {new}")
    if not old.is_dir():
        return [(old, new)]
    pairs = [(path, new / path.name) for path in sorted(old.glob("*.json"))]
    pairs = [pair for pair in pairs if pair[1].is_file()]
    if not pairs:
        raise ValueError(f"{old} and {new} have no results in common")
    return pairs


def _value(name: str) -> Any:
    return lambda row: f"{row[name]:,.3f}" if row["kind"] == "time" else f"{row[name]:,.0f}"


COLUMNS: list[Column] = [
    ("", "what"),
    ("old", _value("old")),
    ("new", _value("new")),
    ("new / old", lambda row: row["new"] / row["old"] if row["old"] else math.inf, "{:.3f}"),
    ("noise", "noise", "{:.1%}"),
    ("allowed", "allowed", "{:.1%}"),
    ("", lambda row: WORDS[row["kind"]].get(row["verdict"])),
]


def report(old: Record, new: Record, found: list[Difference], options: argparse.Namespace) -> None:
    """Prints the noise, what changed (or everything), and how much is worse."""
    then, now = (record["environment"]["torch"] for record in (old, new))
    if then != now:
        print(f"  note: torch {then} then, {now} now")
    if noises := sorted(d.noise for d in found if d.kind == "time"):
        print(
            f"  noise of a ratio of times: median {noises[len(noises) // 2]:.1%}, largest "
            f"{noises[-1]:.1%}; allowed is {TIMES:g} times a ratio's own, at least "
            f"{options.least:.0%}"
        )
    if any(d.kind == "instructions" for d in found):
        print(f"  instruction counts: {options.least_counts:.1%} allowed")
    if shown := [d for d in found if options.all or d.verdict != "same"]:
        print(table(pd.DataFrame(shown), COLUMNS))
    verdicts = [d.verdict for d in found]
    print(f"  {verdicts.count('slower')} worse, {verdicts.count('faster')} better")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--least", type=float, default=0.05, help="of times and memory")
    parser.add_argument("--least-counts", type=float, default=0.01, help="of instructions")
    parser.add_argument("--all", action="store_true", help="also what stayed the same")
    options = parser.parse_args(arguments)
    worse = False
    try:
        for paths in _pairs(options.old, options.new):
            old, new = map(files.read_json, paths)
            found = differences(old, new, options.least, options.least_counts)
            print(f"{old['benchmark']}: {paths[0]} and {paths[1]}, {len(found)} in common")
            report(old, new, found, options)
            worse = worse or any(d.verdict == "slower" for d in found)
    except ValueError as error:
        raise SystemExit(f"compare: {error}") from None
    return int(worse)


if __name__ == "__main__":
    raise SystemExit(main())
