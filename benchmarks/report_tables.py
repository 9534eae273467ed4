"""The tables of one benchmark each. What their columns mean stands on the pages around them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pandas as pd

from benchmarks.tables import (
    Column,
    Record,
    Row,
    beside,
    field_like,
    frame,
    left_out,
    paragraphs,
    spread,
    table,
    there,
)


def _each(who: list[str], field: str, form: str, title: str = "{}") -> list[Column]:
    """A column for each competitor of a frame that has them side by side."""
    return [(title.format(name), f"{name} {field}", form) for name in who]


def _present(rows: pd.DataFrame, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if (rows["who"] == name).any()]


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
        *_each(["compile", "eager"], "peak_mib", "{:.0f}", "MiB {}"),
    ]
    return table(beside(frame(record["rows"]), ("dtype", "op")), columns)


LOSSES = ("eager", "compile", "CCE", "CCE exact", "Liger", "TRL", "torch LCE", "QuACK")
LINEAR = ("dtype", "d", "v", "mode")
LABEL: list[Column] = [
    ("dtype", "dtype"),
    ("D x V", lambda row: f"{row['d']} x {row['v']:,}"),
    ("mode", "mode"),
]


def _linear_rows(record: Record) -> pd.DataFrame:
    """By dtype, size of the head, mode and competitor, ours first."""
    names = ["fp32", "bf16", "fp16", *record["modes"], "qadapter", *LOSSES]
    order = {name: place for place, name in enumerate(names)}
    rows = frame(record["rows"])
    rows = rows[rows["who"].isin(names)].assign(size=rows["d"] * rows["v"])
    by = ["dtype", "size", "mode", "who"]
    return rows.sort_values(by, key=lambda field: field.map(lambda value: order.get(value, value)))


def _least_memory(row: Row, peers: list[str]) -> str:
    found = [(row[f"{who} peak_mib"], who) for who in peers if there(row[f"{who} peak_mib"])]
    return f"{min(found)[0]:.0f} ({min(found)[1]})" if found else ""


def linear(record: Record, full: bool = False) -> str:
    """One line per case: our time, and how many times it the peers take. In full all sizes, and who
    is left out and why; else the smallest and the largest head."""
    rows = _linear_rows(record)
    peers = _present(rows, LOSSES)
    if not full:
        rows = rows[rows["size"].isin([rows["size"].min(), rows["size"].max()])]
    columns: list[Column] = [
        *LABEL,
        ("ms", "qadapter ms median", "{:,.0f}"),
        ("GFLOP/s", "qadapter gflop_s", "{:,.0f}"),
        ("of products", "qadapter times_products", "{:.2f}x"),
        *_each(peers, "times_ours", "{:.2f}x"),
        ("MiB", "qadapter peak_mib", "{:.0f}"),
        ("MiB eager", "eager peak_mib", "{:.0f}"),
        ("least of the peers", partial(_least_memory, peers=peers)),
    ]
    missing = left_out(record["rows"], "mode") if full else ""
    return paragraphs(table(beside(rows, LINEAR), columns), missing)


def linear_memory(record: Record) -> str:
    rows = _linear_rows(record)
    who = ["qadapter", *_present(rows, LOSSES)]
    return table(beside(rows, LINEAR), [*LABEL, *_each(who, "peak_mib", "{:.0f}")])


def linear_accuracy(record: Record, full: bool = False) -> str:
    """Errors against float64 of each dtype's largest head, ours beside eager or, in full, all."""
    rows = _linear_rows(record)
    shown = _present(rows, LOSSES) if full else ["eager"]
    largest = rows.groupby("dtype")["size"].transform("max")
    rows = rows[(rows["size"] == largest) & rows["who"].isin(["qadapter", *shown])]
    medians = {"p < 0.9": "<0.9", "0.9-0.99": "0.9-0.99", "> 0.99": ">0.99"}
    columns: list[Column] = [
        *LABEL,
        ("", "who"),
        *((name, f"error dh {band} median", "{:.1e}") for name, band in medians.items()),
        ("worst", "error dh >0.99 max", "{:.1e}"),
        ("r", "error reward rms", "{:.1e}"),
        ("sum of r", field_like("error reward sum of", "max"), "{:.1e}"),
    ]
    return table(rows, columns)


SWEEPS = {
    "rows": ("n", "rows"),
    "vocab": ("v", "vocabulary"),
    "hidden": ("d", "hidden size"),
    "threads": ("threads", "threads"),
}


def scaling(record: Record) -> str:
    """A table for each thing that varies."""
    parts = []
    rows = frame(record["rows"])
    for sweep, own in rows.groupby("sweep", sort=False):
        x, label = SWEEPS[sweep]
        columns: list[Column] = [(label, x, "{:,}")]
        for name in _present(own, ("qadapter", "eager", "compile")):
            columns.append((f"{name} ms", f"{name} ms median", "{:,.1f}"))
            columns.append((f"{name} MiB", f"{name} peak_mib", "{:,.0f}"))
        columns.append(("products ms", "products ms median", "{:,.1f}"))
        fixed = ", ".join(f"{n.upper()}={own[n].iloc[0]:,}" for n in ("n", "v", "d") if n != x)
        parts.append(f"Against {label}, {fixed}, {own['dtype'].iloc[0]}:")
        parts.append(table(beside(own, (x,)).sort_values(x), columns))
    reasons = {f"- {r['who']}: {r['missing']}." for r in record["rows"] if "missing" in r}
    return paragraphs(*parts, "\n".join(sorted(reasons)))


LORAS = {"all": "all layers", "upper": "upper half"}
DECODE: list[Column] = [("batch", "batch"), ("", "mode"), ("LoRA on", "lora", LORAS.__getitem__)]


def _ratio(row: Row, who: str, of: str) -> float | None:
    one, other = (row.get(f"{name} ms median") for name in (who, of))
    return one / other if there(one) and there(other) else None


def decode(record: Record) -> str:
    """One line per case: the base's time, and how many times it everybody else takes."""
    ratios = {
        "of base": ("two streams", "base"),
        "naive of base": ("naive", "base"),
        "naive of two streams": ("naive", "two streams"),
        "lora of base": ("lora", "base"),
        "one stream": ("one stream", "base"),
        "two adapters": ("two adapters", "base"),
        "two streams of one": ("two streams", "one stream"),
    }
    columns: list[Column] = [
        *DECODE,
        *_each(["base", "two streams"], "ms median", "{:.1f}", "{} ms"),
        *((name, partial(_ratio, who=who, of=of), "{:.2f}x") for name, (who, of) in ratios.items()),
    ]
    case, needed = ("mode", "lora", "batch"), ("base", "two streams")
    return table(beside(frame(record["rows"]), case, needed), columns)


def decode_full(record: Record) -> str:
    columns: list[Column] = [
        *DECODE,
        ("", "who"),
        ("ms a token (p20-p80)", spread(1)),
        ("mean", "mean_ms", "{:.1f}"),
        ("of base", "times_base", "{:.2f}x"),
        ("of naive", "times_naive", "{:.2f}x"),
        ("first token ms", "prefill_ms", "{:.0f}"),
    ]
    return paragraphs(table(frame(record["rows"]), columns), left_out(record["rows"], "mode"))


def decode_parts(record: Record) -> str:
    columns: list[Column] = [
        *DECODE,
        *_each(["forward", "head", "sampler"], "median", "{:.2f}"),
        ("a token of two streams", "two streams", "{:.2f}"),
        ("forward of the base", "base forward median", "{:.2f}"),
    ]
    return table(frame(record["parts"]), columns)


SAMPLERS = ("qadapter torch", "eager", "transformers", "compile", "FlashInfer")
STREAMS = {"two": "base and adapter, two tensors", "one": "one tensor, as the mixed hidden state's"}
KINDS = {"peaked": "Logits as language models have them", "flat": "Standard normal logits"}


def _sample_table(rows: pd.DataFrame) -> str:
    """Of one kind of logits: who comes first in a case, ours, and how many times it the others."""
    case = ["dtype", "b", "v", "filters"]
    who = rows["who"].where(rows.duplicated(case), "own")
    columns: list[Column] = [
        ("dtype", "dtype"),
        ("B x V", lambda row: f"{row['b']} x {row['v']:,}"),
        ("filters", "filters"),
        ("ms", "own ms median", "{:.3f}"),
        ("of read", "own share_of_read", "{:.0%}"),
        *_each(_present(rows.assign(who=who), SAMPLERS), "times_ours", "{:.1f}x"),
    ]
    return table(beside(rows.assign(who=who), case), columns)


def sample(record: Record) -> str:
    """Two tensors, peaked logits: plain, and with top-k and top-p."""
    rows = frame(record["rows"])
    rows = rows[(rows["logits"] == "peaked") & (rows["streams"] == "two")]
    return _sample_table(rows[rows["filters"].isin(["plain", "top-k, top-p"])])


def sample_full(record: Record) -> str:
    """Everything measured, by kind of logits and number of tensors; who is left out, and why."""
    parts = []
    groups = frame(record["rows"]).groupby(["logits", "streams"], sort=False)
    for (kind, streams), rows in groups:
        parts += [f"{KINDS[kind]}; {STREAMS[streams]}:", _sample_table(rows)]
    return paragraphs(*parts, left_out(record["rows"], "filters"))


MS = "{} ms median"


def _seconds(row: Row, way: str, pairs: int, text: Callable[[Row, float], str]) -> str | None:
    """Of a pair, and a comparison."""
    ms = row.get(MS.format(way))
    return f"{ms / 1e3 / pairs:.2f} ({text(row, ms)})" if there(ms) else None


def train_step(record: Record, scaling: bool = False) -> str:
    """One line a batch; against the length of responses a batch is one pair."""
    rows, pairs = frame(record["rows"]), 1 if scaling else record["pairs"]
    trl = MS.format("TRL DPO") in rows

    def faster(row: Row, ms: float) -> str:
        return f"{row['released ms median'] / ms:.1f}x"

    def slower(row: Row, ms: float) -> str:
        return f"{ms / row['ours ms median']:.1f}x ours"

    def seconds(title: str, way: str, text: Callable[[Row, float], str]) -> Column:
        return title, partial(_seconds, way=way, pairs=pairs, text=text)

    columns: list[Column] = [
        *([("length", "length")] if scaling else []),
        ("tokens / padded / packed", lambda r: f"{r['tokens']} / {r['padded']} / {r['packed']}"),
        ("response rows", "response rows"),
        ("released s/pair", lambda row: row["released ms median"] / 1e3 / pairs, "{:.2f}"),
        *(seconds(way, way, faster) for way in ("ours", "cached")),
        *([seconds("TRL's DPO", "TRL DPO", slower)] if trl else []),
        *_each(["released", "ours", "cached"], "peak MiB", "{:.0f}", "{} MiB"),
        *([("TRL MiB", "TRL DPO peak MiB", "{:.0f}")] if trl else []),
    ]
    if scaling:
        return table(rows, columns)
    released, ours, cached = (rows[MS.format(way)].sum() for way in ("released", "ours", "cached"))
    total = (
        f"Over all batches {released / ours:.2f}x faster than the released way, cached "
        f"{released / cached:.2f}x."
    )
    return paragraphs(table(rows, columns), total)


PARTS = ("base trunk", "adapter trunk", "head and loss", "trunk backward", "optimiser")


def step_parts(record: Record) -> str:
    """Where the time of our training step goes."""
    rows = [row for row in record["rows"] if "parts" in row]
    if not rows:
        return f"Not measured yet ({record['benchmark']})."

    def of_step(row: Row, field: str) -> str:
        ms = row[f"parts {field}"]
        return f"{ms:,.1f} ({ms / row['parts step median']:.0%})"

    def of_products(row: Row, step: str, products: str) -> str | None:
        floor = row.get(f"parts {products} median")
        return f"{row[f'parts {step} median'] / floor:.2f}x" if there(floor) else None

    columns: list[Column] = [
        ("tokens", "tokens"),
        ("packed", "packed"),
        *((part, partial(of_step, field=f"{part} median")) for part in PARTS),
        ("rest", partial(of_step, field="rest")),
        ("step", "parts step median", "{:,.1f}"),
        *(
            (f"{over}{which}", partial(of_products, step=step, products=f"products{lora}{which}"))
            for over, lora in (("over its products", ""), ("with LoRA's", " LoRA"))
            for which, step in (("", "step"), (" cached", "cached"))
        ),
    ]
    return table(frame(rows), columns)


def _longest(row: Row, who: str) -> str:
    length = row.get(f"{who} length")
    if not there(length):
        return ""
    return f"{'at least ' if row[f'{who} at_least'] else ''}{length:,.0f}" if length else "none"


def context(record: Record) -> str:
    """One line a budget: the longest responses that fit."""
    rows = frame(record["rows"])
    ways: list[Column] = [(who, partial(_longest, who=who)) for who in rows["who"].unique()]
    budgets = beside(rows, ("budget_mib",)).sort_values("budget_mib")
    missing = [f"- {who}: {reason}." for who, reason in record.get("missing", {}).items()]
    return paragraphs(table(budgets, [("MiB", "budget_mib", "{:,}"), *ways]), "\n".join(missing))


def instructions(record: Record) -> str:
    columns: list[Column] = [
        ("kernel", "kernel"),
        ("code", "capability"),
        ("instructions", "instructions", "{:,}"),
        ("each", "each", "{:.3f}"),
        ("per", "per"),
    ]
    rows = frame(record["rows"])
    if rows.empty:
        return f"Instructions were not counted: {record['rows'][0]['missing']}"
    return table(rows, columns)


CASES = {  # what tells the rows of one competitor apart
    "logits": ("dtype", "op"),
    "linear": LINEAR,
    "linear_scaling": ("sweep", "n", "d", "v", "threads"),
    "sample": ("dtype", "b", "v", "streams", "logits", "filters"),
    "decode": ("model", "batch", "mode", "lora"),
}


def milliseconds(row: Row) -> str:
    ms = row["ms median"]
    return spread(0 if ms >= 1000 else 1 if ms >= 100 else 3)(row)


def _rate(row: Row) -> str:
    if there(row.get("gb_s")):
        return f"{row['gb_s']:.1f} GB/s"
    return f"{row['gflop_s']:,.0f} GFLOP/s" if there(row.get("gflop_s")) else ""


def _error(row: Row) -> str:
    """The one figure of a row's errors against float64 that its table shows."""
    for name in ("gradient", "value"):
        if there(row.get(f"error {name}")):
            return f"{name} {row[f'error {name}']:.1e}"
    bands = [v for k, v in row.items() if k.startswith("error dh") and k.endswith("max")]
    return f"gradient {max(bands):.1e}" if any(map(there, bands)) else ""


def _with_commas(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else value


def everything(record: Record) -> str:
    """Every row of an operation: time, rate, ceiling, memory, error, ratio."""
    case = CASES[record["benchmark"]]
    columns: list[Column] = [
        *((field, field, _with_commas) for field in case),
        ("who", "who"),
        ("median (p20-p80) ms", milliseconds),
        ("rate", _rate),
        ("of ceiling", lambda r: r.get("share_of_ceiling", r.get("share_of_read")), "{:.0%}"),
        ("MiB", "peak_mib", "{:.0f}"),
        ("worst error", _error),
        ("x ours", "times_ours", "{:.2f}x"),
    ]
    return paragraphs(table(frame(record["rows"]), columns), left_out(record["rows"], case[-1]))


# marker -> (results, table)
TABLES: dict[str, tuple[str, Callable[[Record], str]]] = {
    "logits": ("logits", logits),
    "logits_all": ("logits", everything),
    "linear": ("linear", linear),
    "linear_full": ("linear", partial(linear, full=True)),
    "linear_memory": ("linear", linear_memory),
    "linear_accuracy": ("linear", linear_accuracy),
    "linear_accuracy_full": ("linear", partial(linear_accuracy, full=True)),
    "linear_all": ("linear", everything),
    "scaling": ("linear_scaling", scaling),
    "decode": ("decode", decode),
    "decode_full": ("decode", decode_full),
    "decode_parts": ("decode", decode_parts),
    "decode_all": ("decode", everything),
    "sample": ("sample", sample),
    "sample_full": ("sample", sample_full),
    "sample_all": ("sample", everything),
    "train_step": ("train_step", train_step),
    "train_step_shuffled": ("train_step_shuffled", train_step),
    "train_step_scaling": ("train_step_scaling", partial(train_step, scaling=True)),
    "step_parts": ("train_step", step_parts),
    "context": ("context", context),
    "instructions": ("instructions", instructions),
}
