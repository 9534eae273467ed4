"""The speed in short, a line for each thing that takes time, for a page that has little room."""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from benchmarks.report_suite import CASES
from benchmarks.tables import Column, Record, Row, conditions, frame, paragraphs, table

NAMES = {
    "TRL DPO": "TRL's DPO",
    "compile": "torch.compile",
    "eager": "eager PyTorch",
    "naive": "two forwards",
}
OURS = ("qadapter", "qadapter cpp", "qadapter triton", "two streams")
# Results -> what it is, which case (the first such), instead of whom (the first who ran).
OPERATIONS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "linear": (
        "loss, hidden states, {dtype} {d} x {v:,}",
        {"dtype": "bf16", "mode": "uncached"},
        ("compile", "eager"),
    ),
    "logits": (
        "loss, logits, {dtype} {n} x {v:,}",
        {"dtype": "bf16", "op": "loss+backward"},
        ("compile", "eager"),
    ),
    "decode": (
        "a token, {model}, batch {batch}, two streams",
        {"mode": "sampled", "batch": 8},
        ("naive",),
    ),
    "sample": (
        "sampling a token, {dtype} {b} x {v:,}",
        {"filters": "top-k, top-p", "streams": "two", "logits": "peaked"},
        ("transformers", "eager"),
    ),
}
COLUMNS: list[Column] = [
    ("", "what"),
    ("ours", "ours ms", lambda ms: duration(ms)),
    ("MiB", "ours MiB", "{:.0f}"),
    ("instead of", "peer"),
    ("takes", lambda row: row["peer ms"] / row["ours ms"], "{:.1f}x"),
    ("its MiB", "peer MiB", "{:.0f}"),
]


def duration(ms: float) -> str:
    if ms >= 1000:
        return f"{ms / 1000:.2f} s"
    return f"{ms:.0f} ms" if ms >= 100 else f"{ms:.1f} ms" if ms >= 1 else f"{ms:.3f} ms"


def _operation(record: Record) -> Iterator[Row]:
    what, wanted, peers = OPERATIONS[record["benchmark"]]
    case = list(CASES[record["benchmark"]])
    rows = frame(record["rows"])
    for name, value in wanted.items():
        rows = rows[rows[name] == value]
    first = rows[case].head(1)
    who = {row["who"]: row for row in rows.merge(first).to_dict("records")}
    ours = next((who[name] for name in OURS if name in who), None)
    peer = next((name for name in peers if name in who), None)
    if ours is not None and peer is not None:
        yield {
            "what": what.format(**{**record.get("shape", {}), **ours}),
            "ours ms": ours["ms median"],
            "ours MiB": ours.get("peak_mib"),
            "peer": NAMES.get(peer, peer),
            "peer ms": who[peer]["ms median"],
            "peer MiB": who[peer].get("peak_mib"),
        }


def _steps(record: Record) -> Iterator[Row]:
    """Our training step, and with the base cached: means of all batches, the highest peak."""
    peer = "TRL DPO"
    what = f"a training step, {record['model']}, {record['pairs']} pairs"
    for way, text in (("ours", what), ("cached", "the same, the base cached")):
        rows = frame(row for row in record["rows"] if {f"{way} ms", f"{peer} ms"} <= row.keys())
        if not rows.empty:
            yield {
                "what": text,
                "ours ms": rows[f"{way} ms median"].mean(),
                "ours MiB": rows[f"{way} peak MiB"].max(),
                "peer": NAMES[peer],
                "peer ms": rows[f"{peer} ms median"].mean(),
                "peer MiB": rows[f"{peer} peak MiB"].max(),
            }


def speed(records: list[Record]) -> str:
    """A table for each machine: our time, and how many times it others take."""
    machines: dict[str, list[Row]] = {}
    for benchmark in ("train_step", *OPERATIONS):
        for record in records:
            if record["benchmark"] == benchmark:
                lines = _steps(record) if benchmark == "train_step" else _operation(record)
                machines.setdefault(conditions(record), []).extend(lines)
    made = (
        f"{machine}. Medians; MiB is what is added at the peak.\n\n"
        + table(pd.DataFrame(lines), COLUMNS)
        for machine, lines in machines.items()
        if lines
    )
    return paragraphs(*made)
