"""The tables that are of no single operation: everything measured, the machines, the instructions,
where peers win, what they cannot do, what is not measured."""

from collections.abc import Iterator

import pandas as pd

from benchmarks import tables
from benchmarks.tables import Column, Record, Row, conditions

CASES = {  # what tells the rows of one competitor apart
    "logits": ("dtype", "op"),
    "linear": ("dtype", "d", "v", "mode"),
    "linear_scaling": ("sweep", "n", "d", "v", "threads"),
    "sample": ("dtype", "b", "v", "streams", "logits", "filters"),
    "decode": ("model", "batch", "mode", "lora"),
}
MODELS = {
    "logits": "GB/s counts one read of both logits in forward, one read and one write in backward; "
    "the ceiling is the time of those reads and writes at the bandwidths of the same run.",
    "linear": "GFLOP/s counts 2 N D V for each product that the mode needs, whatever a competitor "
    "does beyond them; the ceiling is the matrix product measured before the run.",
    "sample": "GB/s counts one read of the logits; the ceiling is a bare read of the same tensors.",
    "decode": "Time from one token to the next; MiB is what prefill and the first tokens add.",
}


def _ms(row: Row) -> str:
    ms = row["ms median"]
    return tables.spread(0 if ms >= 1000 else 1 if ms >= 100 else 3)(row)


def _rate(row: Row) -> str:
    if tables.there(row.get("gb_s")):
        return f"{row['gb_s']:.1f} GB/s"
    return f"{row['gflop_s']:,.0f} GFLOP/s" if tables.there(row.get("gflop_s")) else ""


def _error(row: Row) -> str:
    """The one figure of a row's errors against float64 that its table shows."""
    for name in ("gradient", "value"):
        if tables.there(row.get(f"error {name}")):
            return f"{name} {row[f'error {name}']:.1e}"
    bands = [v for k, v in row.items() if k.startswith("error dh") and k.endswith("max")]
    return f"gradient {max(bands):.1e}" if any(map(tables.there, bands)) else ""


def everything(record: Record) -> str:
    """Every row of an operation: time, rate, ceiling, memory, error, ratio."""
    name = record["benchmark"]
    case = CASES[name]
    columns: list[Column] = [
        *((field, field, lambda v: f"{v:,}" if isinstance(v, int) else v) for field in case),
        ("who", "who"),
        ("median (p20-p80) ms", _ms),
        ("rate", _rate),
        ("of ceiling", lambda r: r.get("share_of_ceiling", r.get("share_of_read")), "{:.0%}"),
        ("MiB", "peak_mib", "{:.0f}"),
        ("worst error", _error),
        ("x ours", "times_ours", "{:.2f}x"),
    ]
    title = f"{name} ({conditions(record)}). {MODELS[name]}"
    rows = record["rows"]
    return tables.paragraphs(
        title, tables.table(tables.frame(rows), columns), tables.left_out(rows, case[-1])
    )


INSTRUCTIONS: list[Column] = [
    ("kernel", "kernel"),
    ("code", "capability"),
    ("instructions", "instructions", "{:,}"),
    ("each", "each", "{:.3f}"),
    ("per", "per"),
]


def instructions(record: Record) -> str:
    rows = tables.frame(record["rows"])
    if rows.empty:
        return f"Instructions were not counted: {record['rows'][0]['missing']}"
    title = (
        f"Instructions of the C++ kernels ({conditions(record)}; {rows['tool'][0]}): fixed inputs, "
        "one thread, the kernel's own only."
    )
    return tables.paragraphs(title, tables.table(rows, INSTRUCTIONS))


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
    rows = tables.frame({name: r[name] for name in shown if r.get(name)} for r in records)
    of = [r["environment"].get("gpu") or r["environment"]["cpu"] for r in records]
    return tables.table(rows.assign(**{"environment machine": of}), columns)


def cannot(records: list[Record]) -> str:
    """What each peer cannot do, as far as the results say."""
    found: dict[str, dict[str, None]] = {}
    for record in records:
        for who, what in record.get("cannot", {}).items():
            found.setdefault(who, {})[f"{record['benchmark']}: {what}"] = None
    lines = [f"- **{who}**. {'; '.join(texts)}." for who, texts in sorted(found.items())]
    return "\n".join(lines) or "Not said in these results."


def _figures(row: Row) -> Iterator[tuple[str, float, str]]:
    """Everything of a row in which one can be better than another: its name, its value, of which
    less is better, and as it is shown."""
    timing = {f"ms {name}": value for name, value in row["ms"].items()}
    yield "time", timing["ms median"], _ms(timing)
    if "peak_mib" in row:
        # Less than a mebibyte is below what the measuring sees.
        yield "memory", max(1.0, row["peak_mib"]), f"{row['peak_mib']:,.0f} MiB"
    error = row.get("error") or {}
    exact = {name: value for name, value in error.items() if isinstance(value, float)}
    for band, found in error.get("dh", {}).items():
        exact[f"gradient, median of rows with p {band}"] = found["median"]
        exact[f"gradient, worst of rows with p {band}"] = found["max"]
    for name in ("reward", "value"):
        if isinstance(found := error.get(name), dict):
            exact[f"{name}, rms"] = found["rms"]
            exact |= {f"{name}, worst {k}": v["max"] for k, v in found.items() if k[:3] == "sum"}
    for name, value in exact.items():
        if value is not None:
            yield f"error of {name}", value, f"{value:.1e}"


WINS = ["operation", "case", "who", "in", "by", "ours", "theirs"]
NO_WINS = "No peer is ahead in any figure of these results."


def _wins_of(record: Record) -> Iterator[Row]:
    """Where somebody who does the same work takes less time or memory, or is more exact."""
    benchmark = record["benchmark"]
    rows = [
        (" ".join(str(row[name]) for name in CASES[benchmark]), row)
        for row in record["rows"]
        if "missing" not in row and row["who"] != "products"
    ]
    ours: dict[str, dict[str, tuple[float, str]]] = {}
    for case, row in rows:
        if row["who"].startswith("qadapter"):
            ours.setdefault(case, {name: (value, text) for name, value, text in _figures(row)})
    for case, row in rows:
        if row["who"].startswith("qadapter"):
            continue
        for name, value, text in _figures(row):
            own, shown = ours.get(case, {}).get(name, (0.0, ""))
            if value < own:
                by = f"{value / own:.2f}x ours"
                line = (benchmark, case, row["who"], name, by, shown, text)
                yield dict(zip(WINS, line, strict=True))


def _all_wins(records: list[Record]) -> pd.DataFrame:
    compared = ("logits", "linear", "linear_scaling", "sample")
    found = [line for r in records if r["benchmark"] in compared for line in _wins_of(r)]
    return pd.DataFrame(found, columns=WINS)


def wins(records: list[Record]) -> str:
    """Every figure in which a peer is better than we are."""
    lines = _all_wins(records)
    return NO_WINS if lines.empty else tables.table(lines, [(name, name) for name in WINS])


def wins_short(records: list[Record]) -> str:
    """Of every operation and kind of figure the case where a peer is furthest ahead."""
    lines = _all_wins(records)
    if lines.empty:
        return NO_WINS
    groups = lines.assign(ratio=lines["by"].str.removesuffix("x ours").astype(float)).groupby(
        ["operation", "in"], sort=False
    )
    furthest = lines.loc[groups["ratio"].idxmin()].assign(cases=groups.size().to_list())
    return tables.table(furthest, [*((name, name) for name in WINS), ("such cases", "cases")])


def gpu(records: list[Record]) -> str:
    """What has been measured on a GPU."""
    found = [r for r in records if "gpu" in r["environment"]]
    if not found:
        return "No GPU figures: the GPU sets are **not measured yet**."
    names = ", ".join(f"{r['benchmark']} ({conditions(r)})" for r in found)
    return f"Measured on a GPU: {names}."
