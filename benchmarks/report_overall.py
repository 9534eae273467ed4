"""The tables of all results together: the machines, where peers win, what they cannot do, what is
not measured, and the speed in short."""

import re
from collections.abc import Iterator
from typing import Any

import pandas as pd

from benchmarks.report_tables import CASES, milliseconds
from benchmarks.tables import (
    INSTRUCTIONS,
    Column,
    Record,
    Row,
    conditions,
    frame,
    paragraphs,
    processor,
    table,
    there,
)


def machines(records: list[Record]) -> str:
    """Which results there are, of when and where, with their ceilings."""
    columns: list[Column] = [
        ("results", "benchmark"),
        ("date (UTC)", "environment date", lambda date: date[:16].replace("T", " ")),
        ("machine", "environment machine"),
        ("threads", "environment threads"),
        ("torch", "environment torch"),
        ("load", "environment load", "{:.1f}"),
        ("read GB/s", "ceilings read_gb_s", "{:.1f}"),
        ("copy GB/s", "ceilings copy_gb_s", "{:.1f}"),
        ("fp32 TFLOP/s", "ceilings gemm_tflop_s float32", "{:.3f}"),
        ("bf16 TFLOP/s", "ceilings gemm_tflop_s bfloat16", "{:.3f}"),
    ]
    shown = ("benchmark", "environment", "ceilings")
    rows = frame({name: r[name] for name in shown if r.get(name)} for r in records)
    of = [r["environment"].get("gpu") or r["environment"]["cpu"] for r in records]
    return table(rows.assign(**{"environment machine": of}), columns)


def cannot(records: list[Record]) -> str:
    """What each peer cannot do, as far as the results say."""
    found: dict[str, dict[str, None]] = {}
    for record in records:
        for who, what in record.get("cannot", {}).items():
            found.setdefault(who, {})[f"{record['benchmark']}: {what}"] = None
    lines = [f"- **{who}**. {'; '.join(texts)}." for who, texts in sorted(found.items())]
    return "\n".join(lines) or "Not said in these results."


def gpu(records: list[Record]) -> str:
    """What has been measured on a GPU."""
    found = [r for r in records if "gpu" in r["environment"]]
    if not found:
        return "No GPU figures: the GPU sets are **not measured yet**."
    names = ", ".join(f"{r['benchmark']} ({conditions(r)})" for r in found)
    return f"Measured on a GPU: {names}."


# Column of a frame -> the figure, of which less is better
FIGURES = {
    r"ms median": "time",
    r"peak_mib": "memory",
    r"error dh (.+) median": r"error of gradient, median of rows with p \1",
    r"error dh (.+) max": r"error of gradient, worst of rows with p \1",
    r"error (\w+) rms": r"error of \1, rms",
    r"error (\w+) (sum of \d+) max": r"error of \1, worst \2",
    r"error (\w+)": r"error of \1",
}
WINS = ["operation", "case", "who", "in", "by", "ours", "theirs"]
NO_WINS = "No peer is ahead in any figure of these results."


def _figures(rows: pd.DataFrame) -> dict[str, str]:
    """The columns in which one can be better than another: time and memory first."""
    found = {}
    for column in ["ms median", "peak_mib", *rows.columns]:
        for pattern, name in FIGURES.items():
            if match := re.fullmatch(pattern, column):
                found[column] = match.expand(name)
                break
    return found


def _shown(row: Row, column: str) -> str:
    if column == "ms median":
        return milliseconds(row)
    return f"{row[column]:,.0f} MiB" if column == "peak_mib" else f"{row[column]:.1e}"


def _wins_of(record: Record) -> Iterator[Row]:
    """Where somebody who does the same work takes less time or memory, or is more exact."""
    benchmark = record["benchmark"]
    rows = frame(row for row in record["rows"] if row["who"] != "products")
    names = _figures(rows)
    ours: dict[str, Row] = {}
    others: list[tuple[str, Row]] = []
    for row in rows.to_dict("records"):
        case = " ".join(str(row[name]) for name in CASES[benchmark])
        if row["who"].startswith("qadapter"):
            ours.setdefault(case, row)
        else:
            others.append((case, row))
    # Less than a mebibyte is below what the measuring sees.
    least = {"peak_mib": 1.0}
    for case, row in others:
        own = ours.get(case, {})
        for column, name in names.items():
            if not (there(row.get(column)) and there(own.get(column))):
                continue
            theirs, mine = (max(least.get(column, 0.0), who[column]) for who in (row, own))
            if theirs < mine:
                by = f"{theirs / mine:.2f}x ours"
                shown = _shown(own, column), _shown(row, column)
                yield dict(zip(WINS, (benchmark, case, row["who"], name, by, *shown), strict=True))


def _all_wins(records: list[Record]) -> pd.DataFrame:
    compared = ("logits", "linear", "linear_scaling", "sample")
    found = [line for r in records if r["benchmark"] in compared for line in _wins_of(r)]
    return pd.DataFrame(found, columns=WINS)


def wins(records: list[Record]) -> str:
    """Every figure in which a peer is better than we are."""
    lines = _all_wins(records)
    return NO_WINS if lines.empty else table(lines, [(name, name) for name in WINS])


def wins_short(records: list[Record]) -> str:
    """Of every operation and kind of figure the case where a peer is furthest ahead."""
    lines = _all_wins(records)
    if lines.empty:
        return NO_WINS
    ratio = lines["by"].str.removesuffix("x ours").astype(float)
    groups = lines.assign(ratio=ratio).groupby(["operation", "in"], sort=False)
    furthest = lines.loc[groups["ratio"].idxmin()].assign(cases=groups.size().to_list())
    return table(furthest, [*((name, name) for name in WINS), ("such cases", "cases")])


NAMES = {
    "TRL DPO": "TRL's DPO",
    "compile": "torch.compile",
    "eager": "eager PyTorch",
    "naive": "two forwards",
}
OURS = ("qadapter", "qadapter cpp", "qadapter triton", "two streams")


def trained_in(record: Record) -> str:
    """What training takes there: without such instructions PyTorch's products of bfloat16 crawl."""
    without = ("plain", "neon", "avx2", "avx512")
    return "fp32" if record["environment"].get("instruction_set") in without else "bf16"


# Results -> what it is, which case (the first such), instead of whom (the first who ran).
OPERATIONS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "linear": (
        "hidden, {d} x {v:,}",
        {"dtype": trained_in, "mode": "uncached"},
        ("compile", "eager"),
    ),
    "logits": (
        "logits, {dtype} {n} x {v:,}",
        {"dtype": "bf16", "op": "loss+backward"},
        ("compile", "eager"),
    ),
    "decode": (
        "a token, {model}, 2 x {batch} rows",
        {"mode": "sampled", "batch": 8},
        ("naive",),
    ),
    "sample": (
        "sampling, {dtype} {b} x {v:,}",
        {"filters": "top-k, top-p", "streams": "two", "logits": "peaked"},
        ("transformers", "eager"),
    ),
}


def duration(ms: float) -> str:
    if ms >= 1000:
        return f"{ms / 1000:.2f} s"
    return f"{ms:.0f} ms" if ms >= 100 else f"{ms:.1f} ms" if ms >= 1 else f"{ms:.2f} ms"


def in_short(ours: float, theirs: float) -> str:
    """Milliseconds as our time, and how many times it theirs is."""
    times = theirs / ours
    return f"{duration(ours)}, {times:.0f}x" if times >= 100 else f"{duration(ours)}, {times:.1f}x"


def _line(what: str, who: str, ours: float, theirs: float) -> Row:
    """Of the table of speed, in milliseconds."""
    return {"what": what, "peer": NAMES.get(who, who), "ours ms": ours, "peer ms": theirs}


def _operation(record: Record) -> Iterator[Row]:
    what, wanted, peers = OPERATIONS[record["benchmark"]]
    rows = frame(record["rows"])
    for name, value in wanted.items():
        rows = rows[rows[name] == (value(record) if callable(value) else value)]
    first = rows[list(CASES[record["benchmark"]])].head(1)
    who = {row["who"]: row for row in rows.merge(first).to_dict("records")}
    ours = next((who[name] for name in OURS if name in who), None)
    peer = next((name for name in peers if name in who), None)
    if ours is not None and peer is not None:
        text = what.format(**{**record.get("shape", {}), **ours})
        yield _line(text, peer, ours["ms median"], who[peer]["ms median"])


def _steps(record: Record) -> Iterator[Row]:
    """Our training step, and with the base cached: means of all batches."""
    what = f"a step, {record['model']}, {record['pairs']} pairs"
    for way, text in (("ours", what), ("cached", "the same, the base cached")):
        both = (way, "TRL DPO")
        rows = frame(r for r in record["rows"] if {f"{name} ms" for name in both} <= r.keys())
        if not rows.empty:
            yield _line(text, "TRL DPO", *(rows[f"{w} ms median"].mean() for w in both))


def _beside(machines: dict[str, list[Row]]) -> str:
    """A row an operation and peer, a column a machine."""
    rows: dict[tuple[str, str], Row] = {}
    for machine, lines in machines.items():
        for line in lines:
            row = rows.setdefault((line["what"], line["peer"]), {**line})
            row[machine] = in_short(line["ours ms"], line["peer ms"])
    columns: list[Column] = [("", "what"), ("instead of", "peer")]
    columns += [(machine, machine) for machine in machines]
    return table(pd.DataFrame(list(rows.values())), columns)


def speed(records: list[Record]) -> str:
    """Our time on each machine, and how many times it others take."""
    machines: dict[tuple[str, str], list[Row]] = {}
    about: dict[tuple[str, str], dict[str, None]] = {}
    for benchmark in ("train_step", *OPERATIONS):
        for record in records:
            if record["benchmark"] == benchmark:
                lines = _steps(record) if benchmark == "train_step" else _operation(record)
                machines.setdefault(processor(record), []).extend(lines)
                about.setdefault(processor(record), {})[conditions(record)] = None
    if not any(machines.values()):
        return ""
    order = list(INSTRUCTIONS.values())
    by_set = sorted(machines, key=lambda m: order.index(m[1]) if m[1] in order else -1)
    # The instruction set alone is a name where no two have it.
    sets = [instructions for _, instructions in machines]
    names = {m: m[1] if sets.count(m[1]) == 1 and m[1] else " ".join(m).strip() for m in machines}
    lines = {machine: ";\n  ".join(about[machine]) for machine in by_set}
    said = "\n".join(f"- {names[machine]}: {line}" for machine, line in lines.items())
    beside = _beside({names[machine]: machines[machine] for machine in by_set})
    return paragraphs(said, beside)
