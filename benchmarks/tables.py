"""Markdown tables: a data frame of what was measured, and a list of columns.

    rows = frame(record["rows"])            # nested fields are joined by spaces: "ms median"
    text = table(rows, [
        ("dtype", "dtype"),                             # title, field
        ("ms", "ms median", "{:.1f}"),                  # title, field, form
        ("share", lambda row: row["a"] / row["b"], "{:.0%}"),   # or a function of the row
    ])

A field is a column of the frame, or a function of a row (a dict) that gives the value; what is not
there, None or NaN is an empty cell. A form is a format string or a function of the value that gives
text. `beside` turns a row per competitor into one row per case, for tables that have competitors
side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a machine that measures need not have it
    import pandas as pd

Record = dict[str, Any]  # what a results file holds
Row = dict[str, Any]
Form = str | Callable[[Any], str]
Column = tuple[str, str | Callable[[Row], Any]] | tuple[str, str | Callable[[Row], Any], Form]

MILLISECONDS = ("ms median", "ms p20", "ms p80")


def frame(rows: Iterable[Row]) -> pd.DataFrame:
    """Of those that ran; the fields of a dict within a row become columns of their own."""
    import pandas as pd

    return pd.json_normalize([row for row in rows if "missing" not in row], sep=" ")


def beside(rows: pd.DataFrame, case: Sequence[str], needed: Sequence[str] = ()) -> pd.DataFrame:
    """One row a case, in order of appearance; of each competitor columns "<who> <field>".

    Only the cases in which all that are ``needed`` ran.
    """
    import pandas as pd

    keys = list(case)
    for who in needed:
        rows = rows[(rows["who"] == who).groupby([rows[key] for key in keys]).transform("any")]
    parts = [
        own.set_index(keys).drop(columns="who").add_prefix(f"{who} ")
        for who, own in rows.groupby("who", sort=False)
    ]
    cases = rows[keys].drop_duplicates()
    if not parts:
        return cases
    return cases.merge(pd.concat(parts, axis=1), left_on=keys, right_index=True, how="left")


def there(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def _cell(row: Row, column: Column) -> str:
    _, field, *form = column
    value = field(row) if callable(field) else row.get(field)
    if not there(value):
        return ""
    write = form[0] if form else "{}"
    return write(value) if callable(write) else write.format(value)


def table(rows: pd.DataFrame, columns: Sequence[Column]) -> str:
    """Markdown, aligned to the right."""
    lines = [[_cell(row, column) for column in columns] for row in rows.to_dict("records")]
    return markdown([column[0] for column in columns], lines)


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """The table itself, from cells that are text already."""
    widths = [max(map(len, cells)) for cells in zip(header, *lines, strict=True)]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(c.rjust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    ruler = "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|"
    return "\n".join([line(header), ruler, *map(line, lines)])


def field_like(start: str, end: str) -> Callable[[Row], Any]:
    """A field by what its name starts and ends with."""
    return lambda row: next(
        (row[name] for name in row if name.startswith(start) and name.endswith(end)), None
    )


def spread(digits: int, scale: float = 1.0, form: str = "{} ({}-{})") -> Callable[[Row], str]:
    """A function of a row: the median of its times with p20 and p80."""

    def text(row: Row) -> str:
        return form.format(*(f"{row[name] * scale:,.{digits}f}" for name in MILLISECONDS))

    return text


def interval(form: str = ".2f") -> Callable[[Sequence[float]], str]:
    """A form of (mean, low, high); ".0%" for shares, "+.2f" for differences."""
    return lambda values: "{} [{}, {}]".format(*(f"{value:{form}}" for value in values[:3]))


def paragraphs(*parts: str) -> str:
    """Those that are not empty, a blank line between."""
    return "\n\n".join(filter(None, parts))


INSTRUCTIONS = {
    "amx": "AMX",
    "avx512_bf16": "AVX-512 bf16",
    "avx512": "AVX-512",
    "avx2": "AVX2",
    "neon": "NEON",
}


def processor(record: Record) -> tuple[str, str]:
    """The GPU, or the CPU and its instructions as far as they were recorded."""
    machine = record["environment"]
    if "gpu" in machine:
        return machine["gpu"], ""
    return machine["cpu"], INSTRUCTIONS.get(machine.get("instruction_set", ""), "")


def conditions(record: Record, threads: bool = True) -> str:
    """The machine, torch and the date; without the threads where these are what varies."""
    machine = record["environment"]
    count = machine["threads"]
    used = f"{count} thread{'s' if count > 1 else ''}" if threads and "gpu" not in machine else ""
    what = ", ".join(filter(None, (*processor(record), used)))
    return f"{what}, torch {machine['torch']}, {machine['date'][:10]}"


FACTS = (
    "model", "lora", "dtype", "pairs", "data", "max_length", "new_tokens", "strength", "resolution"
)  # fmt: skip


def about(record: Record) -> str:
    """The line above a table: where, when and on what all of it was measured."""
    first = record["rows"][0]  # its model is that of all
    known = {**record, **({"model": first["model"]} if "model" in first else {})}
    found = {name: known[name] for name in FACTS if name in known} | record.get("shape", {})
    facts = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in found.items())
    installed = record.get("versions", {}).items()
    versions = ", ".join(f"{name} {version}" for name, version in installed)
    return "; ".join(filter(None, [conditions(record), versions, facts])) + "."


def left_out(rows: list[Row], detail: str) -> str:
    """Who is missing, where if not everywhere, and why, as a list; "" if nobody is."""
    everywhere = {row[detail] for row in rows}
    reasons: dict[tuple[str, str], dict[str, None]] = {}
    for row in rows:
        if "missing" in row:
            reasons.setdefault((row["who"], row["missing"]), {})[row[detail]] = None
    lines = []
    for (who, why), places in reasons.items():
        where = "" if everywhere <= places.keys() else f" ({'; '.join(places)})"
        lines.append(f"- {who}{where}: {why}.")
    return "\n".join(lines)


def replace(page: str, marker: str, content: str) -> str:
    """A page with what is between ``<!-- MARKER -->`` and ``<!-- /table -->`` replaced."""
    start, end = f"<!-- {marker} -->", "<!-- /table -->"
    begin = page.index(start) + len(start)
    return f"{page[:begin]}\n{content}\n{page[page.index(end, begin) :]}"
