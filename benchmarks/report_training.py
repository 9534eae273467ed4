"""The tables of training steps."""

from typing import Any

from benchmarks import harness
from benchmarks.report_common import conditions


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
