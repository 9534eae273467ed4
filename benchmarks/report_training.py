"""The tables of training steps."""

from typing import Any

from benchmarks import harness
from benchmarks.report_common import conditions


def _step_rows(record: dict[str, Any], pairs: int, first: str) -> list[list[str]]:
    lines = []
    for row in record["rows"]:
        released, memory = row["released ms"]["median"], row["released peak MiB"]
        own = {way: row[f"{way} ms"]["median"] for way in ("ours", "cached")}
        trl = [row[TRL]["median"]] if TRL in row else []
        lines.append(
            [
                *([str(row["length"])] if first == "length" else []),
                f"{row['tokens']} / {row['padded']} / {row['packed']}",
                str(row["response rows"]),
                f"{released / 1e3 / pairs:.2f}",
                *(f"{ms / 1e3 / pairs:.2f} ({released / ms:.1f}x)" for ms in own.values()),
                *(f"{ms / 1e3 / pairs:.2f} ({ms / own['ours']:.1f}x ours)" for ms in trl),
                f"{memory:.0f}",
                *(f"{row[f'{way} peak MiB']:.0f}" for way in own),
                *(f"{row['TRL DPO peak MiB']:.0f}" for _ in trl),
            ]
        )
    return lines


def _step_table(record: dict[str, Any], pairs: int, first: str) -> str:
    trl = any(TRL in row for row in record["rows"])
    header = [*([first] if first else []), "tokens / padded / packed", "response rows"]
    header += ["released s/pair", "ours", "cached", *(["TRL's DPO"] if trl else [])]
    header += ["released MiB", "ours MiB", "cached MiB", *(["TRL MiB"] if trl else [])]
    return harness.table(header, _step_rows(record, pairs, first))


TRL = "TRL DPO ms"
STEP = (
    "the released way is two full forwards of the padded batch, float32 logits at every position, "
    "its loss, backward; ours packs the real tokens, what pairs share once, and has no logits; "
    "cached: the base's two floats a token are known; TRL's DPO: one micro-batch of its trainer, "
    "forwards of policy and reference, backward. Memory is what the step adds to the loaded "
    "model"
)


def train_step(record: dict[str, Any], order: str = "as the file has them") -> str:
    pairs = record["pairs"]
    sums = {
        way: sum(row[f"{way} ms"]["median"] for row in record["rows"])
        for way in ("released", "ours", "cached")
    }
    title = (
        f"A whole training step, {record['model']}, micro-batches of {pairs} pairs of "
        f"{record.get('data', 'real chat')}, {order} ({conditions(record)}): {STEP}. Over all "
        f"batches {sums['released'] / sums['ours']:.2f}x faster, cached "
        f"{sums['released'] / sums['cached']:.2f}x."
    )
    return f"{title}\n\n{_step_table(record, pairs, '')}"


def train_step_shuffled(record: dict[str, Any]) -> str:
    return train_step(record, "shuffled")


def train_step_scaling(record: dict[str, Any]) -> str:
    title = (
        f"A training step on one pair without any padding, {record['model']}, by the length of its "
        f"two responses ({conditions(record)}): {STEP}."
    )
    return f"{title}\n\n{_step_table(record, 1, 'length')}"
