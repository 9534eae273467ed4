"""What all tables of `benchmarks.report` say of how they came about."""

from typing import Any


def conditions(record: dict[str, Any]) -> str:
    machine = record["environment"]
    count = machine["threads"]
    threads = f"{count} thread{'s' if count > 1 else ''}"
    what = machine.get("gpu") or f"{machine['cpu']}, {threads}"
    return f"{what}, torch {machine['torch']}, {machine['date'][:10]}"


def left_out(rows: list[dict[str, Any]], detail: str) -> str:
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
