"""Writes the tables of README.md from the committed results: python -m benchmarks.report"""

import json
from pathlib import Path
from typing import Any

from benchmarks import harness

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def _conditions(record: dict[str, Any]) -> str:
    machine = record["environment"]
    what = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    return f"{what}, torch {machine['torch']}, {machine['date'][:10]}"


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
        f"alpha_tilde={alpha_tilde:g}, center={center:g} ({_conditions(record)}). The ceiling is "
        f"the read and copy bandwidth measured in the same run "
        f"({record['ceilings']['read_gb_s']:.0f} and {record['ceilings']['copy_gb_s']:.0f} GB/s); "
        "the columns torch.compile and eager say how many times our time the reference takes; "
        "memory is what the operation adds."
    )
    return f"{title}\n\n{harness.table(header, lines)}"


def train_step(record: dict[str, Any]) -> str:
    pairs = record["pairs"]
    lines = [
        [
            f"{row['tokens']} ({row['padded']})",
            str(row["response rows"]),
            f"{row['released ms']['median'] / 1e3 / pairs:.2f}",
            f"{row['ours ms']['median'] / 1e3 / pairs:.2f}",
            f"{row['released ms']['median'] / row['ours ms']['median']:.1f}x",
            f"{row['released peak MiB']:.0f}",
            f"{row['ours peak MiB']:.0f}",
        ]
        for row in record["rows"]
    ]
    header = ["tokens (padded)", "response rows", "released s/pair", "ours s/pair", "faster"]
    header += ["released MiB", "ours MiB"]
    title = (
        f"A whole training step, {record['model']}, micro-batches of {pairs} pairs of real chat "
        f"({_conditions(record)}), against the released way: two full forwards, float32 logits at "
        "every position, its loss, backward. Memory is what the step adds to the loaded model."
    )
    return f"{title}\n\n{harness.table(header, lines)}"


def replace(text: str, marker: str, content: str) -> str:
    start, end = f"<!-- {marker} -->", "<!-- /table -->"
    begin = text.index(start) + len(start)
    return f"{text[:begin]}\n{content}\n{text[text.index(end, begin) :]}"


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    for name, make in (("logits", logits), ("train_step", train_step)):
        tables = [make(json.loads(p.read_text())) for p in sorted(RESULTS.glob(f"{name}-*.json"))]
        if tables:
            text = replace(text, f"table:{name}", "\n\n".join(tables))
    readme.write_text(text)


if __name__ == "__main__":
    main()
