"""The tables of training steps: time and memory, parts, the longest responses that fit."""

from functools import partial

from benchmarks import tables
from benchmarks.tables import Column, Record, Row, conditions

STEP = (
    "the released way is two full forwards of the padded batch, float32 logits at every position, "
    "its loss, backward; ours packs the real tokens, what pairs share once, and has no logits; "
    "cached: the base's two floats a token are known; TRL's DPO: one micro-batch of its trainer, "
    "forwards of policy and reference, backward. Memory is what the step adds to the loaded "
    "model"
)
TIME = "{} ms median"


def _faster(row: Row, way: str, pairs: int) -> str:
    ms = row[TIME.format(way)]
    return f"{ms / 1e3 / pairs:.2f} ({row['released ms median'] / ms:.1f}x)"


def _slower(row: Row, pairs: int) -> str | None:
    ms = row["TRL DPO ms median"]
    if not tables.there(ms):
        return None
    return f"{ms / 1e3 / pairs:.2f} ({ms / row['ours ms median']:.1f}x ours)"


def _step_table(record: Record, pairs: int, first: list[Column]) -> str:
    rows = tables.frame(record["rows"])
    trl = "TRL DPO ms median" in rows
    columns: list[Column] = [
        *first,
        ("tokens / padded / packed", lambda r: f"{r['tokens']} / {r['padded']} / {r['packed']}"),
        ("response rows", "response rows"),
        ("released s/pair", lambda row: row["released ms median"] / 1e3 / pairs, "{:.2f}"),
        *((way, partial(_faster, way=way, pairs=pairs)) for way in ("ours", "cached")),
        *([("TRL's DPO", partial(_slower, pairs=pairs))] if trl else []),
        *((f"{w} MiB", f"{w} peak MiB", "{:.0f}") for w in ("released", "ours", "cached")),
        *([("TRL MiB", "TRL DPO peak MiB", "{:.0f}")] if trl else []),
    ]
    return tables.table(rows, columns)


def train_step(record: Record, order: str = "as the file has them") -> str:
    pairs, rows = record["pairs"], tables.frame(record["rows"])
    released, ours, cached = (sum(rows[TIME.format(way)]) for way in ("released", "ours", "cached"))
    title = (
        f"A whole training step, {record['model']}, micro-batches of {pairs} pairs of "
        f"{record.get('data', 'real chat')}, {order} ({conditions(record)}): {STEP}. Over all "
        f"batches {released / ours:.2f}x faster, cached {released / cached:.2f}x."
    )
    return tables.paragraphs(title, _step_table(record, pairs, []))


def train_step_shuffled(record: Record) -> str:
    return train_step(record, "shuffled")


def train_step_scaling(record: Record) -> str:
    title = (
        f"A training step on one pair without any padding, {record['model']}, by the length of its "
        f"two responses ({conditions(record)}): {STEP}."
    )
    return tables.paragraphs(title, _step_table(record, 1, [("length", "length")]))


PARTS = ("base trunk", "adapter trunk", "head and loss", "trunk backward", "optimiser")


def step_parts(record: Record) -> str:
    """Where the time of our training step goes."""
    rows = [row for row in record["rows"] if "parts" in row]
    if not rows:
        return f"Not measured yet ({record['benchmark']})."

    def of_step(row: Row, field: str) -> str:
        ms = row[f"parts {field}"]
        return f"{ms:,.1f} ({ms / row['parts step median']:.0%})"

    columns: list[Column] = [
        ("tokens", "tokens"),
        ("packed", "packed"),
        *((part, partial(of_step, field=f"{part} median")) for part in PARTS),
        ("rest", partial(of_step, field="rest")),
        ("step", "parts step median", "{:,.1f}"),
    ]
    title = (
        f"Milliseconds of the parts of our training step, {record['model']}, each measured alone "
        f"({conditions(record)}). Head and loss: forward and backward from hidden states; the "
        "optimiser is AdamW on the LoRA weights."
    )
    return tables.paragraphs(title, tables.table(tables.frame(rows), columns))


def _longest(row: Row, who: str) -> str:
    length = row.get(f"{who} length")
    if not tables.there(length):
        return ""
    return f"{'at least ' if row[f'{who} at_least'] else ''}{length:,.0f}" if length else "none"


def context(record: Record) -> str:
    """One line a budget: the longest responses that fit."""
    rows = tables.frame(record["rows"])
    ways = [(who, partial(_longest, who=who)) for who in rows["who"].unique()]
    budgets = tables.beside(rows, ("budget_mib",)).sort_values("budget_mib")
    title = (
        f"The longest responses, in tokens each of two, whose training step adds no more than so "
        f"many MiB to the loaded model, {record['model']}, found by measuring peaks to "
        f"{record['resolution']} tokens ({conditions(record)})."
    )
    missing = [f"- {who}: {reason}." for who, reason in record.get("missing", {}).items()]
    columns: list[Column] = [("MiB", "budget_mib", "{:,}"), *ways]
    return tables.paragraphs(title, tables.table(budgets, columns), "\n".join(missing))
