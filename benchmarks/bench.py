"""What the benchmarks share: options, cases, competitors that fail, the clock.

A benchmark is a module with ``OPTIONS``, and ``run``, which measures its cases and records them
(`recording.Recording`). Its docstring says what the options mean.
"""

import argparse
import itertools
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

import qadapter
from benchmarks import harness
from benchmarks.tables import Row

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PLACES = ("cpu", "cuda", "quick")
# Option -> default, or a tuple of the defaults on a CPU, on a GPU, and of a quick run. A type in
# the place of a default: there is none.
Options = dict[str, Any]


def timing(rounds: int, seconds: float) -> Options:
    """How often, for how long (past the least number) and by which clock a case is timed; ``far``:
    who takes more than so many times as long as we do is timed once."""
    often: Options = {"rounds": (rounds, rounds, 1), "least": (3, 3, 1), "far": float("inf")}
    return {**often, "seconds": seconds, "clock": "wall"}


def _default(value: Any, place: str) -> Any:
    return value[PLACES.index(place)] if isinstance(value, tuple) else value


def parse(module: Any, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a benchmark, and those that all have.

    ``CHOICES`` of a module has what an option may be, where that is not anything. Quick runs say
    what they see and keep it only where they are told to.
    """
    parser = argparse.ArgumentParser(
        description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=PLACES[:2], default="cpu")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does everything run?")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--append", action="store_true", help="keep the results of other cases")
    parser.add_argument("--resume", action="store_true", help="only the cases that are missing")
    parser.add_argument("--json", help="default: benchmarks/results/<name>-<device>.json")
    choices = {"clock": harness.CLOCKS, **getattr(module, "CHOICES", {})}
    for name, value in module.OPTIONS.items():
        first = _default(value, "cpu")
        flag, of = f"--{name.replace('_', '-')}", type(first) if type(first) is not type else first
        if of is bool:
            parser.add_argument(flag, action="store_true", default=None)
        elif of is list:
            kind = type(first[0]) if first else str
            parser.add_argument(flag, nargs="*", type=kind, choices=choices.get(name))
        else:
            parser.add_argument(flag, type=of, choices=choices.get(name))
    options = parser.parse_args(arguments)
    for name, value in module.OPTIONS.items():
        default = _default(value, "quick" if options.quick else options.device)
        if getattr(options, name) is None and not isinstance(default, type):
            setattr(options, name, default)
    if options.quick and options.json is None:
        options.json = os.devnull
    options.ceilings = None
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU here")
    return options


def main(module: Any, arguments: Sequence[str] | None = None) -> None:
    """A benchmark on its own: ``python -m benchmarks.bench_<name>``."""
    options = parse(module, arguments)
    torch.set_num_threads(options.threads)
    module.run(options)


def grid(**values: Iterable[Any]) -> list[Row]:
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
    functions: dict[str, Callable[[], Any]],
    options: argparse.Namespace,
    size: int,
    own: str,
    before: Mapping[str, Callable[[], Any]] | None = None,
    **more: Any,
) -> dict[str, harness.Timing]:
    """In turns, as `timing` has it. Inputs of ``size`` bytes that would stay in the cache are
    driven out of it before every call. With ``--far`` a call of each is timed ahead of that, and
    who is that many times slower than ``own`` keeps this one time (``runs`` is 1). The cache stays
    as it is in a quick run, whose times mean nothing."""
    names = ("device", "rounds", "seconds", "least", "clock")
    cold = not options.quick and size < harness.COLD * harness.cache_bytes()
    more = {"cold": cold, **more}
    slow: dict[str, harness.Timing] = {}
    if options.far < float("inf"):
        first = {
            name: harness.once(function, (before or {}).get(name), options.device, options.clock)
            for name, function in functions.items()
        }
        slow = {name: t for name, t in first.items() if t.best > options.far * first[own].best}
    rest = {name: function for name, function in functions.items() if name not in slow}
    settings = {n: getattr(options, n) for n in names}
    found = harness.interleaved(rest, before=before, **settings, **more)
    return {name: slow.get(name) or found[name] for name in functions}


def against(timing: harness.Timing, own: harness.Timing, who: str = "ours") -> Row:
    """How many times the time of somebody; by best times, too, which are steadier where other work
    runs on the machine."""
    return {
        f"times_{who}": timing.median / own.median,
        f"times_{who}_best": timing.best / own.best,
    }
