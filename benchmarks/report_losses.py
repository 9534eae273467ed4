"""The tables of the losses: from logits, from hidden states, and how the latter scales."""

from functools import partial

import pandas as pd

from benchmarks import tables
from benchmarks.tables import Column, Record, Row, conditions

PEERS = ("eager", "compile", "CCE", "CCE exact", "Liger", "TRL", "torch LCE", "QuACK")
CASE = ("dtype", "d", "v", "mode")
LABEL: list[Column] = [
    ("dtype", "dtype"),
    ("D x V", lambda row: f"{row['d']} x {row['v']:,}"),
    ("mode", "mode"),
]


def logits(record: Record) -> str:
    """One line per dtype and operation: our time, and how many times it the peers take."""
    columns: list[Column] = [
        ("dtype", "dtype"),
        ("operation", "op"),
        ("ms", "qadapter ms median", "{:.1f}"),
        ("of ceiling", "qadapter share_of_ceiling", "{:.0%}"),
        ("torch.compile", "compile times_ours", "{:.1f}x"),
        ("eager", "eager times_ours", "{:.1f}x"),
        ("MiB", "qadapter peak_mib", "{:.0f}"),
        ("MiB compile", "compile peak_mib", "{:.0f}"),
        ("MiB eager", "eager peak_mib", "{:.0f}"),
    ]
    shape = record["shape"]
    alpha_0, alpha_tilde, center = shape["alphas"]
    title = (
        f"Operations on logits, N={shape['n']}, V={shape['v']:,}, alpha_0={alpha_0:g}, "
        f"alpha_tilde={alpha_tilde:g}, center={center:g} ({conditions(record)}). The ceiling is "
        f"the read and copy bandwidth measured in the same run "
        f"({record['ceilings']['read_gb_s']:.0f} and {record['ceilings']['copy_gb_s']:.0f} GB/s); "
        "the columns torch.compile and eager say how many times our time the reference takes; "
        "memory is what the operation adds."
    )
    return tables.paragraphs(
        title, tables.table(tables.beside(tables.frame(record["rows"]), ("dtype", "op")), columns)
    )


def _sorted(record: Record) -> pd.DataFrame:
    """By dtype, size of the head, mode and competitor, ours first."""
    names = ["fp32", "bf16", "fp16", *record["modes"], "qadapter", *PEERS]
    order = {name: place for place, name in enumerate(names)}
    rows = tables.frame(record["rows"])
    rows = rows[rows["who"].isin(names)].assign(size=rows["d"] * rows["v"])
    by = ["dtype", "size", "mode", "who"]
    return rows.sort_values(by, key=lambda field: field.map(lambda value: order.get(value, value)))


def _peers(rows: pd.DataFrame) -> list[str]:
    return [who for who in PEERS if (rows["who"] == who).any()]


def _versions(record: Record) -> str:
    names = {"cut-cross-entropy": "CCE", "liger-kernel": "Liger", "trl": "TRL"}
    versions = record["versions"]
    return "".join(f", {names[p]} {versions[p]}" for p in names if p in versions)


def _least_memory(row: Row, peers: list[str]) -> str:
    found = [(row[f"{who} peak_mib"], who) for who in peers if tables.there(row[f"{who} peak_mib"])]
    return f"{min(found)[0]:.0f} ({min(found)[1]})" if found else ""


def linear(record: Record, small: bool = True) -> str:
    """One line per case: our time, and how many times it the peers take. ``small`` has the
    smallest and the largest head only."""
    rows = _sorted(record)
    peers = _peers(rows)
    if small:
        rows = rows[rows["size"].isin([rows["size"].min(), rows["size"].max()])]
    columns: list[Column] = [
        *LABEL,
        ("ms", "qadapter ms median", "{:,.0f}"),
        ("GFLOP/s", "qadapter gflop_s", "{:,.0f}"),
        ("of products", "qadapter times_products", "{:.2f}x"),
        *((who, f"{who} times_ours", "{:.2f}x") for who in peers),
        ("MiB", "qadapter peak_mib", "{:.0f}"),
        ("MiB eager", "eager peak_mib", "{:.0f}"),
        ("least of the peers", partial(_least_memory, peers=peers)),
    ]
    title = (
        f"The loss and its gradient from hidden states, N={record['shape']['n']} "
        f"({conditions(record)}{_versions(record)}). uncached: nothing known of the base, three "
        "matrix products; cached: its statistics known; merged: known, and alpha_0=0.3, center=0; "
        'two products each. "Of products" is our time over those bare matrix products, measured in '
        "the same run; GFLOP/s counts them alone; the peers' columns say how many times our time "
        "they take (below 1 they are faster); MiB is what a step adds at its peak, the gradient "
        "included."
    )
    return tables.paragraphs(title, tables.table(tables.beside(rows, CASE), columns))


def linear_full(record: Record) -> str:
    """All sizes; and who is left out, and why."""
    return tables.paragraphs(linear(record, small=False), tables.left_out(record["rows"], "mode"))


def linear_memory(record: Record) -> str:
    rows = _sorted(record)
    peaks = [(who, f"{who} peak_mib", "{:.0f}") for who in ("qadapter", *_peers(rows))]
    title = (
        f"MiB that a step adds at its peak, the gradient included, N={record['shape']['n']} "
        f"({conditions(record)})."
    )
    return tables.paragraphs(title, tables.table(tables.beside(rows, CASE), [*LABEL, *peaks]))


def linear_accuracy(record: Record, full: bool = False) -> str:
    """Errors against float64 of each dtype's largest head, ours beside eager or, in full, all."""
    rows = _sorted(record)
    shown = _peers(rows) if full else ["eager"]
    largest = rows.groupby("dtype")["size"].transform("max")
    rows = rows[(rows["size"] == largest) & rows["who"].isin(["qadapter", *shown])]
    medians = {"p < 0.9": "<0.9", "0.9-0.99": "0.9-0.99", "> 0.99": ">0.99"}
    columns: list[Column] = [
        *LABEL,
        ("", "who"),
        *((name, f"error dh {band} median", "{:.1e}") for name, band in medians.items()),
        ("worst", "error dh >0.99 max", "{:.1e}"),
        ("r", "error reward rms", "{:.1e}"),
        ("sum of r", tables.field_like("error reward sum of", "max"), "{:.1e}"),
    ]
    title = (
        f"Errors against float64 from the same inputs, N={record['shape']['n']} "
        f"({conditions(record)}): of a row of the gradient, relative, by the policy's probability "
        "of the action (median, and the worst row of the last band); of r = q - value, root mean "
        "square per token, and the worst sum of 512 tokens. A half of the rows is in the first "
        "band, a quarter in each of the others."
    )
    return tables.paragraphs(title, tables.table(rows, columns))


SWEEPS = {
    "rows": ("n", "rows"),
    "vocab": ("v", "vocabulary"),
    "hidden": ("d", "hidden size"),
    "threads": ("threads", "threads"),
}


def _sweep(record: Record, sweep: str) -> str:
    """Against one thing that varies; "" where nobody measured that."""
    x, label = SWEEPS[sweep]
    measured = [row for row in record["rows"] if row["sweep"] == sweep]
    if not measured:
        return ""
    who = [w for w in ("qadapter", "eager", "compile") if any(r["who"] == w for r in measured)]
    columns: list[Column] = [(label, x, "{:,}")]
    for name in who:
        columns.append((f"{name} ms", f"{name} ms median", "{:,.1f}"))
        columns.append((f"{name} MiB", f"{name} peak_mib", "{:,.0f}"))
    columns.append(("products ms", "products ms median", "{:,.1f}"))
    fixed = ", ".join(f"{n.upper()}={measured[0][n]:,}" for n in ("n", "v", "d") if n != x)
    points = tables.beside(tables.frame(measured), (x,)).sort_values(x)
    return f"Against {label}, {fixed}:\n\n{tables.table(points, columns)}"


def scaling(record: Record) -> str:
    """A table for each thing that varies."""
    title = (
        f"The loss and its gradient from hidden states, {record['rows'][0]['dtype']} "
        f"({conditions(record)}); products: the bare matrix products, in the same run."
    )
    reasons = {f"- {r['who']}: {r['missing']}." for r in record["rows"] if "missing" in r}
    sweeps = (_sweep(record, sweep) for sweep in SWEEPS)
    return tables.paragraphs(title, *sweeps, "\n".join(sorted(reasons)))
