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

from benchmarks import harness
from benchmarks.recording import MACHINE
from qadapter import files

IDENTITY = (
    "sweep", "dtype", "model", "op", "who", "n", "d", "v", "b", "mode", "lora", "streams", "logits",
    "filters", "batch", "tokens", "length", "threads", "budget_mib", "kernel",
)  # fmt: skip
# What a row was measured on; another value makes another time.
SETTINGS = ("shape", "pairs", "max_length", "new_tokens", "cache", "clock", "shuffle", "backend")
TIMES = 2.0  # noises


@dataclass(frozen=True)
class Measured:
    kind: str  # time, instructions, memory
    value: float
    best: float
    noise: float


@dataclass(frozen=True)
class Difference:
    what: str
    kind: str
    old: float
    new: float
    noise: float
    allowed: float
    verdict: str  # slower, faster, same

    @property
    def ratio(self) -> float:
        return self.new / self.old if self.old else math.inf


def _is_time(value: Any) -> bool:
    return isinstance(value, dict) and {"median", "p20", "p80", "best"} <= value.keys()


def _found(value: dict[str, Any], path: str) -> Iterator[tuple[str, Measured]]:
    """Times, counts and peaks anywhere in a row."""
    for name, part in value.items():
        where = f"{path} {name}".strip()
        if _is_time(part):
            noise = (part["p80"] - part["p20"]) / 2 / part["median"]
            yield where, Measured("time", part["median"], part["best"], noise)
        elif isinstance(part, dict) and name != "error":
            yield from _found(part, where)
        elif name == "instructions":
            yield where, Measured("instructions", part, part, 0.0)
        elif name == "peak_mib" or name.endswith("peak MiB"):
            yield where, Measured("memory", part, part, 0.0)


def measured(record: dict[str, Any]) -> dict[str, Measured]:
    """Everything that can be compared, by what it is of."""
    found: dict[str, Measured] = {}
    for row in [*record["rows"], *record.get("parts", [])]:
        if record["benchmark"] == "context" or "missing" in row:
            continue
        label = " ".join(f"{name}={row[name]}" for name in IDENTITY if name in row)
        for path, value in _found(row, ""):
            found[f"{record['benchmark']} {label} {path}"] = value
    return found


def same_conditions(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
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
    grown = new.value > old.value * (1 + allowed) and new.best > old.best * (1 + least_counts)
    shrunk = old.value > new.value * (1 + allowed) and old.best > new.best * (1 + least_counts)
    if old.kind == "time":
        grown = grown and new.best > old.best * (1 + least)
        shrunk = shrunk and old.best > new.best * (1 + least)
    if old.kind == "memory":
        grown, shrunk = grown and new.value > old.value + 1, shrunk and old.value > new.value + 1
    verdict = "slower" if grown else "faster" if shrunk else "same"
    return Difference(what, old.kind, old.value, new.value, noise, allowed, verdict)


def differences(
    old: dict[str, Any], new: dict[str, Any], least: float = 0.05, least_counts: float = 0.01
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
    return [pair for pair in pairs if pair[1].is_file()]


WORDS = {
    "time": ("slower", "faster"),
    "instructions": ("more instructions", "fewer instructions"),
    "memory": ("more memory", "less memory"),
}


def _verdict(difference: Difference) -> str:
    if difference.verdict == "same":
        return ""
    return WORDS[difference.kind][difference.verdict == "faster"].upper()


def show(found: list[Difference], everything: bool) -> str:
    header = ["", "old", "new", "new / old", "noise", "allowed", ""]
    lines = [
        [
            d.what,
            *(f"{value:,.3f}" if d.kind == "time" else f"{value:,.0f}" for value in (d.old, d.new)),
            f"{d.ratio:.3f}",
            f"{d.noise:.1%}",
            f"{d.allowed:.1%}",
            _verdict(d),
        ]
        for d in found
        if everything or d.verdict != "same"
    ]
    return harness.table(header, lines) if lines else ""


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
    worse = 0
    try:
        pairs = _pairs(options.old, options.new)
        if not pairs:
            raise ValueError(f"{options.old} and {options.new} have no results in common")
        for old_path, new_path in pairs:
            old, new = files.read_json(old_path), files.read_json(new_path)
            found = differences(old, new, options.least, options.least_counts)
            torches = [r["environment"]["torch"] for r in (old, new)]
            print(f"{old['benchmark']}: {old_path} and {new_path}, {len(found)} in common")
            if torches[0] != torches[1]:
                print(f"  note: torch {torches[0]} then, {torches[1]} now")
            times = [d for d in found if d.kind == "time"]
            if times:
                noises = sorted(d.noise for d in times)
                print(
                    f"  noise of a ratio of times: median {noises[len(noises) // 2]:.1%}, largest "
                    f"{noises[-1]:.1%}; allowed is {TIMES:g} times a ratio's own, at least "
                    f"{options.least:.0%}"
                )
            if any(d.kind == "instructions" for d in found):
                print(f"  instruction counts: {options.least_counts:.1%} allowed")
            if table := show(found, options.all):
                print(table)
            worse += sum(d.verdict == "slower" for d in found)
            better = sum(d.verdict == "faster" for d in found)
            print(f"  {sum(d.verdict == 'slower' for d in found)} worse, {better} better")
    except ValueError as error:
        raise SystemExit(f"compare: {error}") from None
    return 1 if worse else 0


if __name__ == "__main__":
    raise SystemExit(main())
