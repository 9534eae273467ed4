"""Writes the tables of README.md and docs/*.md from the committed results.

    python -m benchmarks.report

A table goes between ``<!-- table:NAME -->`` and ``<!-- /table -->``, wherever there is such a pair.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import harness, report_decoding
from benchmarks.report_common import conditions, left_out

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def logits(record: dict[str, Any]) -> str:
    """One line per dtype and operation: our time, and how many times it the peers take."""
    rows = {(r["dtype"], r["op"], r["who"]): r for r in record["rows"]}
    lines = []
    for (dtype, op, who), row in rows.items():
        if who != "qadapter":
            continue
        peers = [rows.get((dtype, op, peer)) for peer in ("compile", "eager")]
        lines.append(
            [
                dtype,
                op,
                f"{row['ms']['median']:.1f}",
                f"{row['share_of_ceiling']:.0%}",
                *(f"{p['times_ours']:.1f}x" if p else "" for p in peers),
                f"{row['peak_mib']:.0f}",
                *(f"{p['peak_mib']:.0f}" if p else "" for p in peers),
            ]
        )
    header = ["dtype", "operation", "ms", "of ceiling", "torch.compile", "eager"]
    header += ["MiB", "MiB compile", "MiB eager"]
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
    return f"{title}\n\n{harness.table(header, lines)}"


def _step_rows(record: dict[str, Any], pairs: int, first: str) -> list[list[str]]:
    lines = []
    for row in record["rows"]:
        released, memory = row["released ms"]["median"], row["released peak MiB"]
        own = {way: row[f"{way} ms"]["median"] for way in ("ours", "cached")}
        lines.append(
            [
                *([str(row["length"])] if first == "length" else []),
                f"{row['tokens']} / {row['padded']} / {row['packed']}",
                str(row["response rows"]),
                f"{released / 1e3 / pairs:.2f}",
                *(f"{ms / 1e3 / pairs:.2f} ({released / ms:.1f}x)" for ms in own.values()),
                f"{memory:.0f}",
                *(f"{row[f'{way} peak MiB']:.0f}" for way in own),
            ]
        )
    return lines


STEP_HEADER = ["tokens / padded / packed", "response rows", "released s/pair", "ours", "cached"]
STEP_HEADER += ["released MiB", "ours MiB", "cached MiB"]
STEP = (
    "the released way is two full forwards of the padded batch, float32 logits at every position, "
    "its loss, backward; ours packs the real tokens, what pairs share once, and has no logits; "
    "cached: the base's two floats a token are known. Memory is what the step adds to the loaded "
    "model"
)


def train_step(record: dict[str, Any], order: str = "as the file has them") -> str:
    pairs = record["pairs"]
    sums = {
        way: sum(row[f"{way} ms"]["median"] for row in record["rows"])
        for way in ("released", "ours", "cached")
    }
    title = (
        f"A whole training step, {record['model']}, micro-batches of {pairs} pairs of real chat, "
        f"{order} ({conditions(record)}): {STEP}. Over all batches "
        f"{sums['released'] / sums['ours']:.2f}x faster, cached "
        f"{sums['released'] / sums['cached']:.2f}x."
    )
    return f"{title}\n\n{harness.table(STEP_HEADER, _step_rows(record, pairs, ''))}"


def train_step_shuffled(record: dict[str, Any]) -> str:
    return train_step(record, "shuffled")


def train_step_scaling(record: dict[str, Any]) -> str:
    title = (
        f"A training step on one pair without any padding, {record['model']}, by the length of its "
        f"two responses ({conditions(record)}): {STEP}."
    )
    table = harness.table(["length", *STEP_HEADER], _step_rows(record, 1, "length"))
    return f"{title}\n\n{table}"


WHO = ("eager", "compile", "CCE", "CCE exact", "Liger", "TRL", "torch LCE")
Case = tuple[str, int, int, str]
Cases = dict[Case, dict[str, dict[str, Any]]]


def _cases(record: dict[str, Any]) -> Cases:
    """(dtype, D, V, mode) -> who -> row, of those that ran."""
    cases: Cases = {}
    for row in record["rows"]:
        if "missing" not in row:
            key = (row["dtype"], row["d"], row["v"], row["mode"])
            cases.setdefault(key, {})[row["who"]] = row
    dtypes, modes = ["fp32", "bf16", "fp16"], list(record["modes"])
    order = {k: (dtypes.index(k[0]), k[1] * k[2], modes.index(k[3])) for k in cases}
    return {key: cases[key] for key in sorted(cases, key=order.__getitem__)}


def _peers(cases: Cases) -> list[str]:
    return [who for who in WHO if any(who in rows for rows in cases.values())]


def _label(key: Case) -> list[str]:
    dtype, d, v, mode = key
    return [dtype, f"{d} x {v:,}", mode]


def _versions(record: dict[str, Any]) -> str:
    names = {"cut-cross-entropy": "CCE", "liger-kernel": "Liger", "trl": "TRL"}
    versions = record["versions"]
    found = [f"{names[p]} {versions[p]}" for p in names if p in versions]
    return "".join(f", {text}" for text in found)


def _least_memory(rows: dict[str, dict[str, Any]], peers: list[str]) -> str:
    found = [(rows[p]["peak_mib"], p) for p in peers if p in rows]
    return f"{min(found)[0]:.0f} ({min(found)[1]})" if found else ""


def _small(cases: Cases) -> Cases:
    """The smallest and the largest head only."""
    sizes = sorted({(v * d, d, v) for _, d, v, _ in cases})
    ends = {sizes[0][1:], sizes[-1][1:]}
    return {key: rows for key, rows in cases.items() if key[1:3] in ends}


def linear(record: dict[str, Any], small: bool = True) -> str:
    """One line per case: our time, and how many times it the peers take."""
    cases = _cases(record)
    peers = _peers(cases)
    lines = []
    for key, rows in (_small(cases) if small else cases).items():
        ours = rows["qadapter"]
        lines.append(
            [
                *_label(key),
                f"{ours['ms']['median']:,.0f}",
                f"{ours['gflop_s']:,.0f}",
                f"{ours['times_products']:.2f}x",
                *(f"{rows[p]['times_ours']:.2f}x" if p in rows else "" for p in peers),
                f"{ours['peak_mib']:.0f}",
                f"{rows['eager']['peak_mib']:.0f}" if "eager" in rows else "",
                _least_memory(rows, peers),
            ]
        )
    header = ["dtype", "D x V", "mode", "ms", "GFLOP/s", "of products", *peers]
    header += ["MiB", "MiB eager", "least of the peers"]
    title = (
        f"The loss and its gradient from hidden states, N={record['shape']['n']} "
        f"({conditions(record)}{_versions(record)}). uncached: nothing known of the base, three "
        "matrix products; cached: its statistics known; merged: known, and alpha_0=0.3, center=0; "
        'two products each. "Of products" is our time over those bare matrix products, measured in '
        "the same run; GFLOP/s counts them alone; the peers' columns say how many times our time "
        "they take (below 1 they are faster); MiB is what a step adds at its peak, the gradient "
        "included."
    )
    return f"{title}\n\n{harness.table(header, lines)}"


def linear_full(record: dict[str, Any]) -> str:
    """All sizes; and who is left out, and why."""
    reasons = left_out(record["rows"], "mode")
    return "\n\n".join([linear(record, small=False), *([reasons] if reasons else [])])


def linear_memory(record: dict[str, Any]) -> str:
    cases = _cases(record)
    who = ["qadapter", *_peers(cases)]
    lines = [
        [*_label(key), *(f"{rows[w]['peak_mib']:.0f}" if w in rows else "" for w in who)]
        for key, rows in cases.items()
    ]
    title = (
        f"MiB that a step adds at its peak, the gradient included, N={record['shape']['n']} "
        f"({conditions(record)})."
    )
    return f"{title}\n\n{harness.table(['dtype', 'D x V', 'mode', *who], lines)}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _error_cells(error: dict[str, Any]) -> list[str]:
    bands = [error["dh"].get(band, {}) for band in ("<0.9", "0.9-0.99", ">0.99")]
    reward = error.get("reward", {})
    sums = [part["max"] for name, part in reward.items() if name.startswith("sum of")]
    return [
        *(_number(band.get("median")) for band in bands),
        _number(bands[-1].get("max")),
        _number(reward.get("rms")),
        _number(sums[0] if sums else None),
    ]


def linear_accuracy(record: dict[str, Any], peers: list[str] | None = None) -> str:
    """Errors against float64 of each dtype's largest head, ours beside eager."""
    cases = _cases(record)
    largest: dict[str, int] = {}
    for dtype, d, v, _ in cases:
        largest[dtype] = max(largest.get(dtype, 0), d * v)
    lines = [
        [*_label(key), who, *_error_cells(rows[who]["error"])]
        for key, rows in cases.items()
        if key[1] * key[2] == largest[key[0]]
        for who in ("qadapter", *(["eager"] if peers is None else peers))
        if "error" in rows.get(who, {})
    ]
    title = (
        f"Errors against float64 from the same inputs, N={record['shape']['n']} "
        f"({conditions(record)}): of a row of the gradient, relative, by the policy's probability "
        "of the action (median, and the worst row of the last band); of r = q - value, root mean "
        "square per token, and the worst sum of 512 tokens. A half of the rows is in the first "
        "band, a quarter in each of the others."
    )
    header = [
        "dtype",
        "D x V",
        "mode",
        "",
        "p < 0.9",
        "0.9-0.99",
        "> 0.99",
        "worst",
        "r",
        "sum of r",
    ]
    return f"{title}\n\n{harness.table(header, lines)}"


def linear_accuracy_full(record: dict[str, Any]) -> str:
    return linear_accuracy(record, _peers(_cases(record)))


# marker -> (results, table)
TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "logits": ("logits", logits),
    "train_step": ("train_step", train_step),
    "train_step_shuffled": ("train_step_shuffled", train_step_shuffled),
    "train_step_scaling": ("train_step_scaling", train_step_scaling),
    "linear": ("linear", linear),
    "linear_full": ("linear", linear_full),
    "linear_memory": ("linear", linear_memory),
    "linear_accuracy": ("linear", linear_accuracy),
    "linear_accuracy_full": ("linear", linear_accuracy_full),
    "decode": ("decode", report_decoding.decode),
    "decode_full": ("decode", report_decoding.decode_full),
    "decode_parts": ("decode", report_decoding.decode_parts),
    "sample": ("sample", report_decoding.sample),
    "sample_full": ("sample", report_decoding.sample_full),
}


def replace(text: str, marker: str, content: str) -> str:
    start, end = f"<!-- {marker} -->", "<!-- /table -->"
    begin = text.index(start) + len(start)
    return f"{text[:begin]}\n{content}\n{text[text.index(end, begin) :]}"


def main() -> None:
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        before = text = page.read_text()
        for name, (results, make) in TABLES.items():
            if f"<!-- table:{name} -->" not in text:
                continue
            paths = sorted(RESULTS.glob(f"{results}-*.json"))
            if paths:
                tables = [make(json.loads(path.read_text())) for path in paths]
                text = replace(text, f"table:{name}", "\n\n".join(tables))
        if text != before:
            page.write_text(text)


if __name__ == "__main__":
    main()
