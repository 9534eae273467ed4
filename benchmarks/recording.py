"""What a benchmark keeps: rows by case in one JSON file, written after every case.

A run that is cut off keeps what it has. ``--resume`` goes on with the cases that are missing,
``--append`` measures the chosen cases again and keeps the others.
"""

import argparse
import contextlib
import datetime
import gc
import json
import os
import platform
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import qadapter
from benchmarks import harness
from benchmarks.tables import Row, markdown
from qadapter import files
from qadapter.ops import cpp

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "transformers",
    "peft",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "flashinfer-python",
    "triton",
)
# What must be the same for two times to be compared, or put into one file.
MACHINE = ("cpu", "gpu", "instruction_set", "cores", "threads", "torch")


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of the peers that are installed, and of what they run on."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def environment(device: str) -> dict[str, Any]:
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "cache_mib": harness.cache_bytes() >> 20,
        "memory_gib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "instruction_set": cpp.capability() if cpp.available()[0] else "none: no C++ extension",
        "backends": {info.name: info.reason for info in qadapter.backends() if info.available},
    }
    if device == "cuda":
        report["gpu"] = torch.cuda.get_device_name()
        report["cuda"] = torch.version.cuda
    return report


def plain(value: Any) -> Any:
    """As it will be read from the file."""
    return json.loads(json.dumps(value, default=asdict))


def ceilings(options: argparse.Namespace) -> harness.Ceilings:
    """The suite's, or measured now."""
    if options.ceilings is None:
        sizes = harness.CEILING_SIZES["quick" if options.quick else options.device]
        options.ceilings = harness.ceilings(options.device, *sizes, options.clock)
    return options.ceilings


def _flat(row: Row) -> Row:
    """With the fields of a dict within it, as `tables.frame` has them, without pandas."""
    found: Row = {}
    for name, value in row.items():
        inner = _flat(value) if isinstance(value, dict) else {"": value}
        found |= {f"{name} {key}".rstrip(): part for key, part in inner.items()}
    return found


def show(rows: list[Row]) -> str:
    """A line for each figure, a column for each competitor; and who is missing."""
    found = [_flat(row) for row in plain(rows) if "missing" not in row]
    names = dict.fromkeys(
        name
        for row in found
        for name, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    )

    def cell(value: Any) -> str:
        return "" if value is None else f"{value:,.4g}"

    lines = [[name, *(cell(row.get(name)) for row in found)] for name in names]
    missing = [f"{row['who']}: {row['missing']}" for row in rows if "missing" in row]
    runs = {row["who"]: getattr(row.get("ms"), "runs", 0) for row in rows}
    if max(runs.values(), default=0) > 1:
        missing += [f"{who}: timed once" for who, count in runs.items() if count == 1]
    tables = [markdown(["", *(row["who"] for row in found)], lines)] if lines else []
    return "\n".join([*tables, *missing])


class Recording:
    """The rows of one benchmark. ``case`` names the fields that say which case a row is of."""

    def __init__(
        self, name: str, options: argparse.Namespace, case: tuple[str, ...], **more: Any
    ) -> None:
        self.name, self.case, self.options = name, case, options
        self.path = Path(options.json or RESULTS / f"{name}-{options.device}.json")
        self.more: dict[str, Any] = {"clock": getattr(options, "clock", "wall"), **more}
        self.rows: list[Row] = []
        self.minutes = 0.0
        if (options.append or options.resume) and self.path.is_file():
            earlier = files.read_json(self.path)
            self._check(earlier)
            self.rows = earlier.pop("rows")
            self.minutes = earlier.pop("minutes", 0.0)
            self.more = {**earlier, **self.more}  # `write` has the other fields anew

    def _check(self, earlier: dict[str, Any]) -> None:
        then, now = earlier["environment"], environment(self.options.device)
        # of a file from before it was recorded, the instruction set is not known
        known = [n for n in MACHINE if n in then or n != "instruction_set"]
        pairs = [(name, then.get(name), now.get(name)) for name in known]
        settings = plain({name: what for name, what in self.more.items() if name != "cannot"})
        pairs += [(name, earlier[name], what) for name, what in settings.items() if name in earlier]
        changed = [f"{name} ({a} then, {b} now)" for name, a, b in pairs if a != b]
        if changed:
            raise ValueError(
                f"{self.path} was measured in other conditions: {', '.join(changed)}. "
                "Start over without --resume and --append, or write elsewhere with --json"
            )

    def _is_of(self, row: Row, case: Row) -> bool:
        return all(row.get(name) == case[name] for name in self.case)

    def left(self, cases: Iterable[Row]) -> list[Row]:
        """The cases to be measured: with ``--resume`` those that are not yet there."""
        done = self.rows if self.options.resume else []
        return [case for case in cases if not any(self._is_of(row, case) for row in done)]

    def todo(self, cases: Iterable[Row]) -> Iterator[Row]:
        """Those that are left, under a progress bar."""
        gc.collect()
        gc.freeze()  # what is imported is no garbage, and takes most of a collection to find so
        name = f"{getattr(self.options, 'position', '')}{self.name}"
        before = self.minutes
        with tqdm(self.left(cases), desc=name, unit="case", dynamic_ncols=True) as bar:
            for case in bar:
                bar.set_postfix_str(" ".join(str(case[name]) for name in self.case))
                yield case
                self.minutes = before + bar.format_dict["elapsed"] / 60
                self.write()

    def put(self, case: Row, rows: list[Row], text: str = "") -> None:
        """Takes the rows of a case in the place of earlier ones; shows the text, or the rows."""
        self.rows = [row for row in self.rows if not self._is_of(row, case)]
        self.rows += [{**case, **row} for row in rows]
        self.write()
        title = ", ".join(f"{name} {case[name]}" for name in self.case)
        tqdm.write(f"\n{title}\n{text or show(rows)}")

    def write(self) -> None:
        """A whole file or none; nothing for os.devnull."""
        if self.path == Path(os.devnull):
            return
        record: dict[str, Any] = {
            "benchmark": self.name,
            **self.more,
            "environment": environment(self.options.device),
            "versions": versions(),
        }
        if self.options.ceilings is not None:
            record["ceilings"] = self.options.ceilings
        record |= {"minutes": self.minutes, "rows": self.rows}
        text = json.dumps(record, indent=1, default=asdict) + "\n"
        with files.replacing_file(self.path) as temporary:
            temporary.write_text(text, encoding="utf-8")
