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
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.recording import MACHINE
from benchmarks.tables import Column, Record, Row, frame, table, there
from qadapter import files

IDENTITY = (
    "sweep", "dtype", "model", "op", "who", "n", "d", "v", "b", "mode", "lora", "streams", "logits",
    "filters", "batch", "tokens", "length", "threads", "budget_mib", "kernel",
)  # fmt: skip
# What a row was measured on; another value makes another time.
SETTINGS = ("shape", "pairs", "max_length", "new_tokens", "cache", "clock", "shuffle", "backend")
TIMES = 2.0  # noises
WORDS = {
    "time": ("SLOWER", "FASTER"),
    "instructions": ("MORE INSTRUCTIONS", "FEWER INSTRUCTIONS"),
    "memory": ("MORE MEMORY", "LESS MEMORY"),
}


def _figure(row: Row, name: str) -> Row | None:
    """The time, the count or the peak in a column of a flat row; None if it has none of them."""
    if name.endswith(" median") and f"{name.removesuffix(' median')} best" in row:
        time = name.removesuffix(" median")
        median, p20, p80 = (row[f"{time} {part}"] for part in ("median", "p20", "p80"))
        noise = (p80 - p20) / 2 / median
        return {"kind": "time", "value": median, "best": row[f"{time} best"], "noise": noise}
    if name == "instructions" or name == "peak_mib" or name.endswith("peak MiB"):
        kind = "instructions" if name == "instructions" else "memory"
        return {"kind": kind, "value": row[name], "best": row[name], "noise": 0.0}
    return None


def measured(record: Record) -> pd.DataFrame:
    """Everything that can be compared, a row each: what it is of, kind, value, best and noise."""
    found: dict[str, Row] = {}
    rows = [*record["rows"], *record.get("parts", [])] if record["benchmark"] != "context" else []
    for row in frame(rows).to_dict("records"):
        own = {name: value for name, value in row.items() if there(value)}
        label = " ".join(f"{name}={own[name]}" for name in IDENTITY if name in own)
        for name in own:
            if figure := _figure(own, name):
                what = f"{record['benchmark']} {label} {name.removesuffix(' median')}"
                found[what] = {"what": what, **figure}
    return pd.DataFrame(found.values(), columns=["what", "kind", "value", "best", "noise"])


def same_conditions(old: Record, new: Record) -> list[str]:
    """What differs so that times cannot be compared."""
    then, now = old["environment"], new["environment"]
    pairs = [(f"machine: {k}", then.get(k), now.get(k)) for k in MACHINE if k != "torch"]
    pairs += [("benchmark", old["benchmark"], new["benchmark"])]
    pairs += [(k, old[k], new[k]) for k in SETTINGS if k in old and k in new]
    return [f"{name}: {a} and {b}" for name, a, b in pairs if a != b]


def differences(
    old: Record, new: Record, least: float = 0.05, least_counts: float = 0.01
) -> pd.DataFrame:
    """A row for everything that both have, with what is allowed and the ``verdict``: slower, faster
    or same."""
    if changed := same_conditions(old, new):
        raise ValueError(f"these results cannot be compared: {'; '.join(changed)}")
    found = measured(old).merge(measured(new), on=["what", "kind"], suffixes=(" old", " new"))
    time, memory = found["kind"] == "time", found["kind"] == "memory"
    noise = np.hypot(found["noise old"], found["noise new"])
    allowed = np.where(
        found["kind"] == "instructions", least_counts, np.maximum(least, TIMES * noise)
    )
    of_best = np.where(time, max(least, least_counts), least_counts)

    def worse(one: str, other: str) -> Any:
        grown = found[f"value {other}"] > found[f"value {one}"] * (1 + allowed)
        best = found[f"best {other}"] > found[f"best {one}"] * (1 + of_best)
        seen = ~memory | (found[f"value {other}"] > found[f"value {one}"] + 1)
        return grown & best & seen

    verdict = np.select([worse("old", "new"), worse("new", "old")], ["slower", "faster"], "same")
    return found.assign(noise=noise, allowed=allowed, verdict=verdict)


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


def _word(row: Row) -> str:
    more, less = WORDS[row["kind"]]
    return {"slower": more, "faster": less, "same": ""}[row["verdict"]]


COLUMNS: list[Column] = [
    ("", "what"),
    ("old", _value("value old")),
    ("new", _value("value new")),
    ("new / old", lambda row: row["value new"] / (row["value old"] or math.nan), "{:.3f}"),
    ("noise", "noise", "{:.1%}"),
    ("allowed", "allowed", "{:.1%}"),
    ("", _word),
]


def report(old: Record, new: Record, found: pd.DataFrame, options: argparse.Namespace) -> None:
    """Prints the noise, what changed (or everything), and how much is worse."""
    then, now = (record["environment"]["torch"] for record in (old, new))
    if then != now:
        print(f"  note: torch {then} then, {now} now")
    noise = found.loc[found["kind"] == "time", "noise"]
    if not noise.empty:
        print(
            f"  noise of a ratio of times: median {noise.median():.1%}, largest {noise.max():.1%}; "
            f"allowed is {TIMES:g} times a ratio's own, at least {options.least:.0%}"
        )
    if (found["kind"] == "instructions").any():
        print(f"  instruction counts: {options.least_counts:.1%} allowed")
    shown = found if options.all else found[found["verdict"] != "same"]
    if not shown.empty:
        print(table(shown, COLUMNS))
    worse, better = ((found["verdict"] == verdict).sum() for verdict in ("slower", "faster"))
    print(f"  {worse} worse, {better} better")


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
            worse = worse or bool((found["verdict"] == "slower").any())
    except ValueError as error:
        raise SystemExit(f"compare: {error}") from None
    return int(worse)


if __name__ == "__main__":
    raise SystemExit(main())
