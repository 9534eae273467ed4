"""Writes the tables and plots of README.md and docs/*.md from the committed results.

    python -m benchmarks report [--check]

A table goes between ``<!-- table:NAME -->`` and ``<!-- /table -->``, wherever there is such a pair.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from benchmarks import report_overall, report_serving
from benchmarks.quality import report as report_quality
from benchmarks.report_tables import TABLES as OWN
from benchmarks.tables import Record, about, replace

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

# marker -> (results, table)
TABLES = {**OWN, **report_serving.TABLES, **report_quality.TABLES}
# marker -> table of all results together
OVERALL: dict[str, Callable[[list[Record]], str]] = {
    "machines": report_overall.machines,
    "cannot": report_overall.cannot,
    "wins": report_overall.wins,
    "wins_short": report_overall.wins_short,
    "gpu": report_overall.gpu,
    "speed": report_overall.speed,
    "quality_short": report_quality.short,
}
NOTHING = "Not measured yet."


def records(results: str | None = None) -> list[Record]:
    """The committed results, of one benchmark or of all."""
    paths = sorted(RESULTS.glob("*.json" if results is None else f"{results}-*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def content(name: str) -> str:
    """What belongs between the markers of a table."""
    if name in OVERALL:
        return OVERALL[name](records()) or NOTHING
    results, make = TABLES[name]
    found = [record for record in records(results) if record["benchmark"] == results]
    made = (f"{about(record)}\n\n" * (name in OWN) + make(record) for record in found)
    return "\n\n".join(made) or NOTHING


def rewritten(text: str) -> str:
    """A page with all its tables as the results have them."""
    for name in (*TABLES, *OVERALL):
        if f"<!-- table:{name} -->" in text:
            text = replace(text, f"table:{name}", content(name))
    return text


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def stale() -> list[Path]:
    """Pages that show something else than the results hold."""
    return [page for page in pages() if rewritten(page.read_text()) != page.read_text()]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if pages are stale")
    parser.add_argument("--no-plots", action="store_true", help="tables alone")
    options = parser.parse_args([] if arguments is None else arguments)
    if options.check:
        for page in (found := stale()):
            print(f"{page}: not what the results hold")
        return 1 if found else 0
    for page in stale():
        page.write_text(rewritten(page.read_text()))
        print(f"wrote {page}")
    if not options.no_plots:
        from benchmarks import plots

        plots.draw(RESULTS, ROOT / "docs")
        report_quality.draw(RESULTS, ROOT / "docs")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
