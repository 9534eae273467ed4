"""The table of docs/serving.md: what both streams cost in vLLM."""

from collections.abc import Callable
from typing import Any

from benchmarks.tables import Column, Record, Row, about, frame, paragraphs, table

WHAT = {"first": "first tokens", "step": "each further step"}
OTHERS = {"streams": "both streams", "two servers": "two servers", "own": "our decoder"}


def _ratio(who: str) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        low, middle, high = (row[f"{who} over base {at}"] for at in ("min", "median", "max"))
        return f"{middle:.2f} ({low:.2f}-{high:.2f})"

    return text


def serving(record: Record) -> str:
    """A line for the first tokens of a batch and one for the steps after them."""
    rows: list[dict[str, Any]] = []
    for row in record["rows"]:
        for what, name in WHAT.items():
            found = {k.replace(f" {what}", ""): v for k, v in row.items() if f" {what}" in k}
            rate = row["streams tokens a second"] if what == "step" else None
            rows.append({"batch": row["batch"], "what": name, "rate": rate, **found})
    columns: list[Column] = [
        ("batch", "batch"),
        ("", "what"),
        ("base ms", "base ms median", "{:,.0f}"),
        *((f"{name}, times", _ratio(who)) for who, name in OTHERS.items()),
        ("both streams, tokens/s", "rate", "{:,.1f}"),
    ]
    held = record["KV tokens a GiB"]
    cache = (
        f"A GiB of cache holds {held['base']:,} tokens of the base, {held['streams']:,} of both."
    )
    turns = record["rows"][0]["turns"]
    load = f"Load of the machine at the start {record['environment']['load']:.0f}, {turns} turns."
    return paragraphs(about(record), table(frame(rows), columns), f"{cache} {load}")


TABLES = {"serving": ("serving", serving)}
