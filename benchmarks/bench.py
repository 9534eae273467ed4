"""What the benchmarks share: options, cases, competitors that fail, what is printed.

A benchmark is a module with ``parse``, which gives options from a command line, and ``run``, which
measures its cases and records them (`recording.Recording`).
"""

import argparse
import itertools
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

import qadapter
from benchmarks import harness
from benchmarks.recording import Recording, plain
from benchmarks.tables import Row, frame, table

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Defaults = dict[str, dict[str, Any]]  # cpu, cuda, quick -> option -> value


def parser(name: str, about: str, **more: Any) -> argparse.ArgumentParser:
    """With what all benchmarks take; ``about`` may be a module's docstring."""
    made = argparse.ArgumentParser(description=about.splitlines()[0], **more)
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--quick", action="store_true", help="tiny shapes: does everything run?")
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    made.add_argument("--append", action="store_true", help="keep the results of other cases")
    made.add_argument("--resume", action="store_true", help="only the cases that are missing")
    made.add_argument("--json", help=f"default: benchmarks/results/{name}-<device>.json")
    return made


def peer_options(parser: argparse.ArgumentParser, peers: Collection[str]) -> None:
    """Against whom, and which of our backends."""
    parser.add_argument("--peers", nargs="*", choices=peers, default=list(peers))
    parser.add_argument("--backend", help="of ours; default: what is picked by itself")


def timing_options(parser: argparse.ArgumentParser, rounds: int, seconds: float) -> None:
    """How often, for how long and by which clock the functions of a case are timed."""
    parser.add_argument("--rounds", type=int, default=rounds, help="samples at most")
    parser.add_argument("--least", type=int, default=3, help="samples at least")
    parser.add_argument("--seconds", type=float, default=seconds, help="per case, past --least")
    parser.add_argument("--clock", choices=harness.CLOCKS, default="wall")


def parse(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    defaults: Defaults,
    ours: str | None = None,
) -> argparse.Namespace:
    """Options that were not given are those of the device, or the tiny ones of a quick run.

    With ``ours``, it is among the peers even where it was not asked for: others are compared to it.
    Quick runs say what they see and keep it only where they are told to.
    """
    options = parser.parse_args(arguments)
    which = "quick" if options.quick else options.device
    for name, value in defaults.get(which, {}).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.quick and hasattr(options, "least"):
        options.rounds = options.least = 1
    if ours is not None and ours not in options.peers:
        options.peers = [ours, *options.peers]
    if options.quick and options.json is None:
        options.json = os.devnull
    options.ceilings = None
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU here")
    return options


def main(
    parse: Callable[[], argparse.Namespace], run: Callable[[argparse.Namespace], Recording]
) -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    run(options)


def grid(**values: Iterable[Any]) -> list[dict[str, Any]]:
    """A case for each choice of one value per name; the last varies fastest."""
    choices = itertools.product(*values.values())
    return [dict(zip(values, choice, strict=True)) for choice in choices]


def backend(name: str | None) -> AbstractContextManager[Any]:
    """Ours runs in this one; None leaves the choice to the package."""
    return qadapter.use_backend(name) if name else nullcontext()


def first_runs(
    names: Iterable[str],
    run: Callable[[str], Row],
    ours: Collection[str],
    reason: Callable[[str], str] = lambda _: "",
) -> tuple[dict[str, Row], list[Row]]:
    """Each runs once (compilers compile): what ``run`` finds, and rows of who cannot, and why."""
    known: dict[str, Row] = {}
    missing: list[Row] = []
    for name in names:
        why = reason(name)
        if not why:
            try:
                known[name] = run(name)
            except Exception as error:  # a peer that fails must not end the comparison
                if name in ours:
                    raise
                why = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        if why:
            missing.append({"who": name, "missing": why})
    return known, missing


def timed(
    functions: dict[str, Callable[[], Any]], options: argparse.Namespace, size: int, **more: Any
) -> dict[str, harness.Timing]:
    """In turns, as `timing_options` have it. Inputs of ``size`` bytes that would stay in the cache
    are driven out of it before every call."""
    names = ("device", "rounds", "seconds", "least", "clock")
    more = {"cold": size < harness.COLD * harness.cache_bytes(), **more}
    return harness.interleaved(functions, **{n: getattr(options, n) for n in names}, **more)


def against(timing: harness.Timing, own: harness.Timing, who: str = "ours") -> Row:
    """How many times the time of somebody; by best times, too, which are steadier where other work
    runs on the machine."""
    return {
        f"times_{who}": timing.median / own.median,
        f"times_{who}_best": timing.best / own.best,
    }


def show(rows: list[Row]) -> str:
    """A line for each figure, a column for each competitor; and who is missing."""
    found = frame(plain(rows))
    lines = [f"{row['who']}: {row['missing']}" for row in rows if "missing" in row]
    if not found.empty:
        figures = found.set_index("who").select_dtypes("number").T.rename_axis("").reset_index()
        columns = [("", ""), *((who, who, "{:,.4g}") for who in found["who"])]
        lines.insert(0, table(figures, columns))
    return "\n".join(lines)
