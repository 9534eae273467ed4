"""The tables of docs/benchmarks.md that are of no single operation: everything measured, scaling,
contexts, parts, instructions; where peers win; what they cannot do; what is not measured."""

from typing import Any

from benchmarks import harness
from benchmarks.report_common import conditions, left_out

Record = dict[str, Any]
Row = dict[str, Any]
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
TIMING = "median (p20-p80) ms"


def _ms(timing: dict[str, float]) -> str:
    digits = 0 if timing["median"] >= 1000 else 1 if timing["median"] >= 100 else 3
    return "{:,.{d}f} ({:,.{d}f}-{:,.{d}f})".format(
        timing["median"], timing["p20"], timing["p80"], d=digits
    )


def _rate(row: Row) -> str:
    if "gb_s" in row:
        return f"{row['gb_s']:.1f} GB/s"
    return f"{row['gflop_s']:,.0f} GFLOP/s" if "gflop_s" in row else ""


def _share(row: Row) -> str:
    share = row.get("share_of_ceiling", row.get("share_of_read"))
    return "" if share is None else f"{share:.0%}"


def _times_ours(row: Row) -> str:
    ratio = row.get("times_ours")
    return "" if ratio is None else f"{ratio:.2f}x"


def main_error(row: Row) -> tuple[str, float] | None:
    """The one figure of a row's errors against float64 that its table shows."""
    error = row.get("error") or {}
    if "gradient" in error:
        return "gradient", error["gradient"]
    if isinstance(error.get("value"), float):
        return "value", error["value"]
    if "dh" in error:
        return "gradient", max(band["max"] for band in error["dh"].values())
    return None


def _error(row: Row) -> str:
    found = main_error(row)
    return "" if found is None else f"{found[0]} {found[1]:.1e}"


def everything(record: Record) -> str:
    """Every row of an operation: time, rate, ceiling, memory, error, ratio."""
    name = record["benchmark"]
    case = CASES[name]
    rows = [row for row in record["rows"] if "missing" not in row]
    lines = [
        [
            *(f"{row[c]:,}" if isinstance(row[c], int) else str(row[c]) for c in case),
            row["who"],
            _ms(row["ms"]),
            _rate(row),
            _share(row),
            f"{row['peak_mib']:.0f}" if "peak_mib" in row else "",
            _error(row),
            _times_ours(row),
        ]
        for row in rows
    ]
    header = [*case, "who", TIMING, "rate", "of ceiling", "MiB", "worst error", "x ours"]
    title = f"{name} ({conditions(record)}). {MODELS[name]}"
    missing = left_out(record["rows"], case[-1])
    return "\n\n".join([title, harness.table(header, lines), *([missing] if missing else [])])


SWEEPS = {
    "rows": ("n", "rows"),
    "vocab": ("v", "vocabulary"),
    "hidden": ("d", "hidden size"),
    "threads": ("threads", "threads"),
}


def _scaling_cell(row: Row | None) -> list[str]:
    if row is None or "missing" in row:
        return ["", ""]
    peak = f"{row['peak_mib']:,.0f}" if "peak_mib" in row else ""
    return [f"{row['ms']['median']:,.1f}", peak]


def scaling(record: Record) -> str:
    """A table for each thing that varies."""
    tables = []
    for sweep, (x, label) in SWEEPS.items():
        rows = [row for row in record["rows"] if row["sweep"] == sweep]
        if not rows:
            continue
        points = sorted({row[x] for row in rows})
        found = {(row[x], row["who"]): row for row in rows}
        who = [w for w in ("qadapter", "eager", "compile") if any((p, w) in found for p in points)]
        header = [label, *(f"{w} {unit}" for w in who for unit in ("ms", "MiB")), "products ms"]
        lines = []
        for point in points:
            cells = [cell for w in who for cell in _scaling_cell(found.get((point, w)))]
            products = _scaling_cell(found.get((point, "products")))[0]
            lines.append([f"{point:,}", *cells, products])
        first = rows[0]
        fixed = ", ".join(f"{n.upper()}={first[n]:,}" for n in ("n", "v", "d") if n != x)
        tables.append(f"Against {label}, {fixed}:\n\n{harness.table(header, lines)}")
    title = (
        f"The loss and its gradient from hidden states, {record['rows'][0]['dtype']} "
        f"({conditions(record)}); products: the bare matrix products, in the same run."
    )
    reasons = {f"- {r['who']}: {r['missing']}." for r in record["rows"] if "missing" in r}
    return "\n\n".join([title, *tables, *(["\n".join(sorted(reasons))] if reasons else [])])


def context(record: Record) -> str:
    """One line a budget: the longest responses that fit."""
    rows = {(row["budget_mib"], row["who"]): row for row in record["rows"]}
    who = list(dict.fromkeys(row["who"] for row in record["rows"]))

    def cell(row: Row | None) -> str:
        if row is None:
            return ""
        if not row["length"]:
            return "none"
        return f"{'at least ' if row['at_least'] else ''}{row['length']:,}"

    budgets = sorted({budget for budget, _ in rows})
    lines = [[f"{b:,}", *(cell(rows.get((b, w))) for w in who)] for b in budgets]
    missing = [f"- {w}: {reason}." for w, reason in record.get("missing", {}).items()]
    title = (
        f"The longest responses, in tokens each of two, whose training step adds no more than so "
        f"many MiB to the loaded model, {record['model']}, found by measuring peaks to "
        f"{record['resolution']} tokens ({conditions(record)})."
    )
    parts = [title, harness.table(["MiB", *who], lines), *(["\n".join(missing)] if missing else [])]
    return "\n\n".join(parts)


PARTS = ("base trunk", "adapter trunk", "head and loss", "trunk backward", "optimiser")


def step_parts(record: Record) -> str:
    """Where the time of our training step goes."""
    rows = [row for row in record["rows"] if "parts" in row]
    if not rows:
        return f"Not measured yet ({record['benchmark']})."
    lines = []
    for row in rows:
        parts, total = row["parts"], row["parts"]["step"]["median"]
        cells = [f"{parts[p]['median']:,.1f} ({parts[p]['median'] / total:.0%})" for p in PARTS]
        rest = f"{parts['rest']:,.1f} ({parts['rest'] / total:.0%})"
        lines.append([str(row["tokens"]), str(row["packed"]), *cells, rest, f"{total:,.1f}"])
    title = (
        f"Milliseconds of the parts of our training step, {record['model']}, each measured alone "
        f"({conditions(record)}). Head and loss: forward and backward from hidden states; the "
        "optimiser is AdamW on the LoRA weights."
    )
    header = ["tokens", "packed", *PARTS, "rest", "step"]
    return f"{title}\n\n{harness.table(header, lines)}"


def instructions(record: Record) -> str:
    rows = [row for row in record["rows"] if "missing" not in row]
    lines = [
        [r["kernel"], r["capability"], f"{r['instructions']:,}", f"{r['each']:.3f}", r["per"]]
        for r in rows
    ]
    title = (
        f"Instructions of the C++ kernels ({conditions(record)}; {rows[0]['tool']}): fixed inputs, "
        "one thread, the kernel's own only."
        if rows
        else "Instructions were not counted: " + record["rows"][0]["missing"]
    )
    header = ["kernel", "code", "instructions", "each", "per"]
    return f"{title}\n\n{harness.table(header, lines)}" if rows else title


def machines(records: list[Record]) -> str:
    """Which results there are, of when and where, with their ceilings."""
    lines = []
    for record in records:
        machine, peaks = record["environment"], record.get("ceilings") or {}
        products = peaks.get("gemm_tflop_s", {})
        lines.append(
            [
                record["benchmark"],
                machine["date"][:16].replace("T", " "),
                machine.get("gpu") or machine["cpu"],
                str(machine["threads"]),
                machine["torch"],
                f"{machine['load']:.1f}" if machine.get("load") is not None else "",
                *(f"{peaks[n]:.1f}" if peaks else "" for n in ("read_gb_s", "copy_gb_s")),
                *(f"{products[n]:.3f}" if n in products else "" for n in ("float32", "bfloat16")),
            ]
        )
    header = ["results", "date (UTC)", "machine", "threads", "torch", "load", "read GB/s"]
    header += ["copy GB/s", "fp32 TFLOP/s", "bf16 TFLOP/s"]
    return harness.table(header, lines)


def cannot(records: list[Record]) -> str:
    """What each peer cannot do, as far as the results say."""
    found: dict[str, dict[str, None]] = {}
    for record in records:
        for who, what in record.get("cannot", {}).items():
            found.setdefault(who, {})[f"{record['benchmark']}: {what}"] = None
    lines = [f"- **{who}**. {'; '.join(texts)}." for who, texts in sorted(found.items())]
    return "\n".join(lines) or "Not said in these results."


Figure = tuple[float, str]  # smaller is better; as it is shown


def _figures(row: Row) -> dict[str, Figure]:
    """Everything of a row in which one can be better than another."""
    made = {"time": (row["ms"]["median"], _ms(row["ms"]))}
    if "peak_mib" in row:
        # Less than a mebibyte is below what the measuring sees.
        made["memory"] = (max(1.0, row["peak_mib"]), f"{row['peak_mib']:,.0f} MiB")
    error = row.get("error") or {}
    exact: dict[str, float | None] = {n: v for n, v in error.items() if isinstance(v, float)}
    for band, found in error.get("dh", {}).items():
        exact[f"gradient, median of rows with p {band}"] = found["median"]
        exact[f"gradient, worst of rows with p {band}"] = found["max"]
    for name in ("reward", "value"):
        found = error.get(name)
        if isinstance(found, dict):
            exact[f"{name}, rms"] = found["rms"]
            exact |= {f"{name}, worst {k}": v["max"] for k, v in found.items() if k[:3] == "sum"}
    return made | {f"error of {n}": (v, f"{v:.1e}") for n, v in exact.items() if v is not None}


def _wins_of(record: Record) -> list[list[str]]:
    """Where somebody who does the same work takes less time or memory, or is more exact."""
    name, lines = record["benchmark"], []
    case = CASES[name]
    ours: dict[tuple[Any, ...], dict[str, Figure]] = {}
    for row in record["rows"]:
        key = tuple(row[c] for c in case)
        if "missing" not in row and row["who"].startswith("qadapter"):
            ours.setdefault(key, _figures(row))
    for row in record["rows"]:
        own = ours.get(tuple(row[c] for c in case), {})
        if "missing" in row or row["who"] == "products" or row["who"].startswith("qadapter"):
            continue
        label = [name, " ".join(str(row[c]) for c in case), row["who"]]
        for figure, (value, text) in _figures(row).items():
            if figure in own and value < own[figure][0]:
                ratio = f"{value / own[figure][0]:.2f}x ours"
                lines.append([*label, figure, ratio, own[figure][1], text])
    return lines


def _all_wins(records: list[Record]) -> list[list[str]]:
    compared = ("logits", "linear", "linear_scaling", "sample")
    return [line for r in records if r["benchmark"] in compared for line in _wins_of(r)]


WINS = ["operation", "case", "who", "in", "by", "ours", "theirs"]
NO_WINS = "No peer is ahead in any figure of these results."


def wins(records: list[Record]) -> str:
    """Every figure in which a peer is better than we are."""
    lines = _all_wins(records)
    return harness.table(WINS, lines) if lines else NO_WINS


def wins_short(records: list[Record]) -> str:
    """Of every operation and kind of figure the case where a peer is furthest ahead."""
    groups: dict[tuple[str, str], list[list[str]]] = {}
    for line in _all_wins(records):
        groups.setdefault((line[0], line[3]), []).append(line)
    if not groups:
        return NO_WINS
    lines = []
    for found in groups.values():
        furthest = min(found, key=lambda line: float(line[4].split("x")[0]))
        lines.append([*furthest, str(len(found))])
    return harness.table([*WINS, "such cases"], lines)


def gpu(records: list[Record]) -> str:
    """What has been measured on a GPU."""
    found = [r for r in records if "gpu" in r["environment"]]
    if not found:
        return "No GPU figures: the GPU sets are **not measured yet**."
    names = ", ".join(f"{r['benchmark']} ({conditions(r)})" for r in found)
    return f"Measured on a GPU: {names}."
