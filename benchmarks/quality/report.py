"""Tables of docs/quality.md, and the pictures beside it, from the committed summaries."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pandas as pd

from benchmarks.quality import sweep
from benchmarks.quality.settings import METHODS, TITLES
from benchmarks.tables import Column, Record, Row, conditions, interval, paragraphs, table

TESTED_TITLES = {
    "accuracy": "accuracy",
    "gain": "gain, nats a pair",
    "kl": "KL, nats a token",
    "nll_change": "change of NLL, nats a token",
    "follows": "follows the rule",
    "questions": "questions still right",
}
SHARE, EXACT = interval(".0%"), interval(".4f")


def _seeds(rows: Iterable[Row]) -> int:
    return max((len(row["seeds"]) for row in rows), default=1)


def heading(record: Record) -> str:
    usual, counts, data = record["set"]["usual"], record["counts"], record["data"]["name"]
    seeds = _seeds(record["rows"])
    return (
        f"{data}: {record['base']}, {usual['steps']} updates of {usual['batch']} pairs (of "
        f"{usual['pairs']}), learning rate {usual['learning_rate']:g}, LoRA r={usual['lora_r']} on "
        f"{usual['lora_targets']}, {seeds} seed{'s' if seeds > 1 else ''}; "
        f"{counts['heldout']} held-out pairs, {counts['prompts']} prompts answered, "
        f"{counts['unrelated']} unrelated conversations, {counts['questions']} questions "
        f"({conditions(record)}). In brackets: 95 % bootstrap intervals over items"
        + (" and seeds." if seeds > 1 else ".")
    )


def title(row: Row, most: int = 0) -> str:
    """Says how many seeds it has where others have ``most``."""
    changes = "".join(f", {name} {value}" for name, value in row["changes"].items())
    fewer = f" (seeds: {len(row['seeds'])})" if len(row["seeds"]) < most else ""
    return TITLES[row["method"]] + changes + fewer


def _policies(record: Record) -> list[Row]:
    """The rows with `name`, each figure as a field, and what the trained ones have at a KL: "gain
    at 0.1", and "less gain at 0.1", Q-Adapter's less it."""
    matched: dict[tuple[str, float, str], Row] = {}
    for row in record["matched"]:
        fields = matched.setdefault((row["variant"], row["noise"], "trained"), {})
        for less, figures in (("", row["figures"]), ("less ", row["reference_less"])):
            for name, values in (figures or {}).items():
                fields[f"{less}{name} at {row['kl']:g}"] = values
    return [
        {**row, **row["figures"], "name": title(row)}
        | matched.get((row["variant"], row["noise"], row["label"]), {})
        for row in record["rows"]
    ]


def _clean(record: Record) -> list[Row]:
    """Those without noise, by method."""
    order = list(METHODS)
    found = [row for row in _policies(record) if row["noise"] == 0]
    return sorted(found, key=lambda row: order.index(row["method"]))


def _kls(record: Record) -> list[float]:
    return list(dict.fromkeys(row["kl"] for row in record["matched"]))


def _table(columns: Sequence[Column], rows: Iterable[Row]) -> str:
    return table(pd.DataFrame(rows), columns)


def _columns(record: Record) -> list[Column]:
    # A share won is worth as much as its judge.
    won = [
        (
            f"won, {judge['judge']} (itself {judge['accuracy'][0]:.0%} right)",
            f"wins {judge['judge']}",
            SHARE,
        )
        for judge in record["judge_figures"]
    ]
    rule = any("follows" in row["figures"] for row in record["rows"])
    return [
        ("", "name"),
        ("pairs right", "accuracy", SHARE),
        ("gain", "gain", interval()),
        *won,
        *([("rule", "follows", SHARE)] if rule else []),
        ("KL", "kl", EXACT),
        ("NLL change", "nll_change", EXACT),
        ("questions", "questions", SHARE),
        ("words", "words", interval(".0f")),
    ]


def _at_kl(kl: float) -> list[Column]:
    return [
        (f"gain at KL {kl:g}", f"gain at {kl:g}", interval()),
        ("Q-Adapter's less it", f"less gain at {kl:g}", interval("+.2f")),
    ]


def main_table(record: Record) -> str:
    """Every method as trained, without noise."""
    base = record["base_figures"]
    own = [r for r in _clean(record) if r["label"] == "trained" and not r["changes"]]
    zero = [0.0, 0.0, 0.0]
    nothing = {"gain": zero, "kl": zero, "nll_change": zero, "questions": [1.0, 1.0, 1.0]}
    rows = [{"name": "base", **base["figures"], **nothing}]
    rows += [{**row, "name": title(row, _seeds(own))} for row in own]
    left_out = "\n".join(f"- {name}: {why}" for name, why in record["missing"].items())
    return paragraphs(
        f"{heading(record)} Of {base['asked']} questions the base answers {base['right']} right, "
        f"of which {base['kept']} are asked here. By the base's own likelihood a token "
        f"{SHARE(base['figures']['in_order'])} of the pairs are in order.",
        _table(_columns(record), rows),
        left_out and f"Left out:\n\n{left_out}",
    )


def short(records: list[Record]) -> str:
    """For the README, of the study with the most seeds: all methods as trained, Q-Adapter at half
    its strength too, gain at one KL."""
    found = [record for record in records if record["benchmark"] == "quality"]
    if not found:
        return "Not measured yet."
    record = max(found, key=lambda record: _seeds(record["rows"]))
    rows = []
    for row in _clean(record):
        if row["label"] == "trained" and not row["changes"]:
            rows.append(row)
        elif row["variant"] == "qadapter" and row["label"] == "strength 0.5":
            rows.append(row | {"name": f"{row['name']}, strength 0.5"})
    columns = [column for column in _columns(record) if column[1] not in ("gain", "words")]
    return paragraphs(
        heading(record), _table([*columns, _at_kl(max(_kls(record), default=0.0))[0]], rows)
    )


def strength_table(record: Record) -> str:
    """What varies the strength of a method after, or by, its training."""
    rows = []
    for row in _policies(record):
        blended = row["method"] == "qadapter" and row["label"].startswith("strength")
        varied = row["method"] == "dpo_own" and row["label"] == "trained"
        stopped = row["method"] == "sft" and not row["label"].startswith("strength")
        if row["noise"] == 0 and (blended or varied or stopped):
            label = "" if row["label"] == "trained" else f", {row['label']}"
            rows.append(row | {"name": row["name"] + label})
    return paragraphs(heading(record), _table(_columns(record), rows))


def tests_table(record: Record) -> str:
    """Q-Adapter less each other method."""
    columns: list[Column] = [
        ("Q-Adapter less", lambda test: TITLES.get(test["against"], test["against"])),
        (
            "figure",
            lambda test: TESTED_TITLES.get(test["figure"], test["figure"].replace("wins", "won,")),
        ),
        ("difference", lambda t: (t["mean"], t["low"], t["high"]), interval("+.4f")),
        ("p", "p", "{:.4f}"),
        ("p, Holm", "p_holm", "{:.4f}"),
    ]
    return paragraphs(
        f"{record['data']['name']}: Paired by item and seed; p of a sign-flip test over items, "
        "also adjusted for the number of methods.",
        _table(columns, record["tests"]),
    )


def matched_table(record: Record) -> str:
    """Gain at the same forgetting."""
    columns: list[Column] = [("", "name"), ("seeds", lambda row: len(row["seeds"]))]
    for kl in _kls(record):
        columns += [
            *_at_kl(kl),
            ("p", f"less gain at {kl:g}", lambda values: f"{values[3]:.4f}"),
            ("pairs right", f"accuracy at {kl:g}", SHARE),
            ("NLL change", f"nll_change at {kl:g}", interval(".3f")),
        ]
    return paragraphs(
        f"{record['data']['name']}: What each method has where its KL is the same, read off "
        "between the strengths of its LoRA blended with the base, seed by seed. Intervals and p by "
        "a bootstrap over pairs, conversations and seeds, which finds the place of that KL in "
        "every draw anew. Empty: not reached at the largest strength.",
        _table(columns, [row for row in _clean(record) if row["label"] == "trained"]),
    )


def noise_table(record: Record) -> str:
    """By the share of training pairs that were flipped."""
    noisy = {row["variant"] for row in record["rows"] if row["noise"] > 0}
    if not noisy:
        return f"{record['data']['name']}: no run with flipped pairs."
    rows = [
        row | {"name": f"{row['noise']:.0%} flipped, {title(row, _seeds(record['rows']))}"}
        for row in sorted(_policies(record), key=lambda row: (row["noise"], row["variant"]))
        if row["variant"] in noisy and row["label"] == "trained"
    ]
    # Runs with noise are scored alone.
    scored = ("name", "accuracy", "gain", "kl", "nll_change")
    columns = [column for column in _columns(record) if column[1] in scored]
    columns += [column for kl in _kls(record) for column in _at_kl(kl)]
    return paragraphs(heading(record), _table(columns, rows))


def cost_table(record: Record) -> str:
    """Training and decoding."""
    columns: list[Column] = [
        ("", lambda row: TITLES[row["variant"]]),
        ("runs", "runs"),
        ("threads", "threads"),
        ("seconds a pair", "seconds_per_pair", "{:.3f}"),
        ("MiB", "peak_mib", "{:.0f}"),
    ]
    text = (
        f"{record['data']['name']}: the median update's time by its pairs, and what training adds "
        f"to the resident memory, each the least over the runs ({conditions(record)}). The methods "
        "of TRL also pass the base in every update; Q-Adapter could keep the base's figures "
        "(`precompute_base`), which was off."
    )
    parts = [text, _table(columns, record["cost"])]
    if decode := record.get("decode"):
        columns = [
            ("", "way"),
            ("ms a step", "ms_per_token", "{:.1f}"),
            ("of the base", "times_base", "{:.2f}x"),
        ]
        parts.append(f"Generating, a step of a batch of {decode['batch']}:")
        parts.append(_table(columns, decode["rows"]))
    return paragraphs(*parts)


def judges_table(record: Record) -> str:
    columns: list[Column] = [
        ("judge", "judge"),
        ("training pairs", "training_pairs"),
        ("held-out pairs", "heldout_pairs"),
        ("right", "accuracy", SHARE),
        ("the longer one wins", "longer", SHARE),
    ]
    return paragraphs(record["data"]["name"], _table(columns, record["judge_figures"]))


def settings_table(record: Record) -> str:
    """A line a setting of a sweep, the best gain at the middle KL first."""
    columns: list[Column] = [("setting", "name"), ("seeds", "seeds")]
    titles = {"accuracy": "accuracy", "gain": "gain", "kl": "KL", "nll_change": "nll change"}
    columns += [(shown, name, interval(".3f")) for name, shown in titles.items()]
    for kl in record["kls"]:
        for name, shown in (("gain", "gain"), ("accuracy", "accuracy"), ("nll_change", "nll")):
            columns.append((f"{shown} at KL {kl:g}", f"{name} at {kl:g}", "{:.3f}"))
    return _table(columns, sweep.compared(record["rows"], record["kls"]))


def sweep_table(record: Record) -> str:
    """Settings of a method against each other."""
    text = (
        f"{TITLES[record['method']]}, a line for what differs from the usual settings, the best "
        f"gain at KL {sweep.middle(record['kls']):g} first. {heading(record)} Figures at a KL are "
        "read off between the strengths."
    )
    return paragraphs(text, settings_table(record))


TABLES: dict[str, tuple[str, Callable[[Record], str]]] = {
    "quality_main": ("quality", main_table),
    "quality_matched": ("quality", matched_table),
    "quality_strength": ("quality", strength_table),
    "quality_tests": ("quality", tests_table),
    "quality_noise": ("quality", noise_table),
    "quality_cost": ("quality", cost_table),
    "quality_judges": ("quality", judges_table),
    "quality_sweep": ("quality_sweep", sweep_table),
}
"""As `benchmarks.report.TABLES`: marker -> (results, table)."""


def text(record: Record) -> str:
    """What a run prints at its end."""
    tables = [make for results, make in TABLES.values() if results == record["benchmark"]]
    return paragraphs(*(make(record) for make in tables))


def draw(results: Path, docs: Path) -> list[Path]:
    """The pictures of every study; returns their paths."""
    from benchmarks.quality import figures

    drawn = []
    for path in sorted(results.glob("quality-*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        drawn += figures.draw(record, docs, path.stem)
    return drawn
