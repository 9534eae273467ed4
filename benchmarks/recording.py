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
from dataclasses import asdict, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import harness
from qadapter import files

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
MACHINE = ("cpu", "gpu", "cores", "threads", "torch")


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
    import qadapter

    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "cache_mib": harness.cache_bytes() >> 20,
        "memory_gib": harness.total_memory() >> 30,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "backends": {info.name: info.reason for info in qadapter.backends() if info.available},
    }
    if device == "cuda":
        report["gpu"] = torch.cuda.get_device_name()
        report["cuda"] = torch.version.cuda
    return report


def results_path(name: str, device: str, path: str | None) -> Path:
    return Path(path) if path else RESULTS / f"{name}-{device}.json"


def _of_dataclass(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"cannot write a {type(value).__name__} to JSON")


def plain(value: Any) -> Any:
    """As it will be read from the file."""
    return json.loads(json.dumps(value, default=_of_dataclass))


def write(path: Path, record: dict[str, Any]) -> None:
    """A whole file or none; nothing for os.devnull."""
    if path == Path(os.devnull):
        return
    text = json.dumps(record, indent=1, default=_of_dataclass) + "\n"
    with files.replacing_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def ceilings(options: argparse.Namespace) -> harness.Ceilings:
    """The suite's, or measured now."""
    if options.ceilings is None:
        sizes = (16, 64) if options.quick else harness.CEILING_SIZES[options.device]
        clock = getattr(options, "clock", "wall")
        options.ceilings = harness.ceilings(options.device, *sizes, clock)
    return options.ceilings


class Recording:
    """The rows of one benchmark. ``case`` names the fields that say which case a row is of."""

    def __init__(
        self, name: str, options: argparse.Namespace, case: tuple[str, ...], **more: Any
    ) -> None:
        self.name, self.case, self.options = name, case, options
        self.path = results_path(name, options.device, options.json)
        self.more: dict[str, Any] = {"clock": getattr(options, "clock", "wall"), **more}
        self.rows: list[dict[str, Any]] = []
        self.minutes = 0.0
        if (options.append or options.resume) and self.path.is_file():
            earlier = files.read_json(self.path)
            self._check(earlier)
            self.rows = earlier["rows"]
            self.minutes = earlier.get("minutes", 0.0)
            self.more = {**self._kept(earlier), **self.more}

    def _kept(self, earlier: dict[str, Any]) -> dict[str, Any]:
        own = ("benchmark", "environment", "versions", "ceilings", "cannot", "minutes", "rows")
        return {name: value for name, value in earlier.items() if name not in own}

    def _check(self, earlier: dict[str, Any]) -> None:
        then, now = earlier["environment"], environment(self.options.device)
        changed = [
            f"{name} ({then.get(name)} then, {now.get(name)} now)"
            for name in MACHINE
            if then.get(name) != now.get(name)
        ]
        changed += [
            f"{name} ({earlier[name]} then, {value} now)"
            for name, value in plain(self.more).items()
            if name in earlier and earlier[name] != value
        ]
        if changed:
            raise ValueError(
                f"{self.path} was measured in other conditions: {', '.join(changed)}. "
                "Start over without --resume and --append, or write elsewhere with --json"
            )

    def has(self, case: dict[str, Any]) -> bool:
        return any(self._is_of(row, case) for row in self.rows)

    def _is_of(self, row: dict[str, Any], case: dict[str, Any]) -> bool:
        return all(row.get(name) == case[name] for name in self.case)

    def todo(self, cases: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The cases to be measured, under a progress bar; with ``--resume`` those not yet there."""
        left = [c for c in cases if not (self.options.resume and self.has(c))]
        gc.collect()
        gc.freeze()  # what is imported is no garbage, and takes most of a collection to find so
        name = f"{getattr(self.options, 'position', '')}{self.name}"
        with tqdm(left, desc=name, unit="case", dynamic_ncols=True) as bar:
            for case in bar:
                bar.set_postfix_str(" ".join(str(case[name]) for name in self.case))
                yield case
                self.minutes = self.minutes + bar.format_dict["elapsed"] / 60 - self._counted
                self._counted = bar.format_dict["elapsed"] / 60
                self.write()

    _counted = 0.0  # minutes of this run that are in `minutes` already

    def put(self, case: dict[str, Any], rows: list[dict[str, Any]], table: str) -> None:
        """Takes the rows of a case in the place of earlier ones, and shows the table."""
        self.rows = [row for row in self.rows if not self._is_of(row, case)]
        self.rows += [{**case, **row} for row in rows]
        self.write()
        title = ", ".join(f"{name} {case[name]}" for name in self.case)
        tqdm.write(f"\n{title}\n{table}")

    def write(self) -> None:
        record: dict[str, Any] = {
            "benchmark": self.name,
            "environment": environment(self.options.device),
            "versions": versions(),
            **self.more,
        }
        if self.options.ceilings is not None:
            record["ceilings"] = self.options.ceilings
        write(self.path, {**record, "minutes": self.minutes, "rows": self.rows})
