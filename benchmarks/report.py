"""Writes the tables and plots of README.md and docs/*.md from the committed results.

    python -m benchmarks report [--check]

A table goes between ``<!-- table:NAME -->`` and ``<!-- /table -->``, wherever there is such a pair.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import harness, report_decoding, report_suite, report_training
from benchmarks.quality import report as report_quality
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


WHO = ("eager", "compile", "CCE", "CCE exact", "Liger", "TRL", "torch LCE", "QuACK")
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
    "train_step": ("train_step", report_training.train_step),
    "train_step_shuffled": ("train_step_shuffled", report_training.train_step_shuffled),
    "train_step_scaling": ("train_step_scaling", report_training.train_step_scaling),
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
    "logits_all": ("logits", report_suite.everything),
    "linear_all": ("linear", report_suite.everything),
    "sample_all": ("sample", report_suite.everything),
    "decode_all": ("decode", report_suite.everything),
    "scaling": ("linear_scaling", report_suite.scaling),
    "context": ("context", report_suite.context),
    "step_parts": ("train_step", report_suite.step_parts),
    "instructions": ("instructions", report_suite.instructions),
    **report_quality.TABLES,
}
# marker -> table of all results together
OVERALL: dict[str, Callable[[list[dict[str, Any]]], str]] = {
    "machines": report_suite.machines,
    "cannot": report_suite.cannot,
    "wins": report_suite.wins,
    "wins_short": report_suite.wins_short,
    "gpu": report_suite.gpu,
    "quality_short": report_quality.short,
}
NOTHING = "Not measured yet."


def records(results: str | None = None) -> list[dict[str, Any]]:
    """The committed results, of one benchmark or of all."""
    paths = sorted(RESULTS.glob("*.json" if results is None else f"{results}-*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def content(name: str) -> str:
    """What belongs between the markers of a table."""
    if name in OVERALL:
        return OVERALL[name](records())
    results, make = TABLES[name]
    found = [record for record in records(results) if record["benchmark"] == results]
    return "\n\n".join(make(record) for record in found) or NOTHING


def replace(text: str, marker: str, content: str) -> str:
    start, end = f"<!-- {marker} -->", "<!-- /table -->"
    begin = text.index(start) + len(start)
    return f"{text[:begin]}\n{content}\n{text[text.index(end, begin) :]}"


def rewritten(text: str) -> str:
    """A page with all its tables as the results have them."""
    for name in (*TABLES, *OVERALL):
        if f"<!-- table:{name} -->" in text:
            text = replace(text, f"table:{name}", content(name))
    return text


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def stale() -> list[Path]:
    """Pages that show something else than the results hold."""
    return [page for page in pages() if rewritten(page.read_text()) != page.read_text()]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if pages are stale")
    parser.add_argument("--no-plots", action="store_true", help="tables alone")
    options = parser.parse_args([] if arguments is None else arguments)
    if options.check:
        for page in (found := stale()):
            print(f"{page}: not what the results hold")
        return 1 if found else 0
    for page in stale():
        page.write_text(rewritten(page.read_text()))
        print(f"wrote {page}")
    if not options.no_plots:
        from benchmarks import plots

        plots.main()
        report_quality.draw(RESULTS, ROOT / "docs")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
