"""Tables of docs/quality.md, and the pictures beside it, from the committed summaries."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.quality.matched import AT_ZERO, read_off
from benchmarks.quality.settings import METHODS, STEERED, TITLES
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


def policies(record: Record) -> pd.DataFrame:
    """A row a policy: what it is; `usual`, whether its settings are; each figure as a field; and
    of trained ones what they have at a KL: "gain at 0.1", and "less gain at 0.1" and "dpo gain at
    0.1", Q-Adapter's and DPO's less it."""
    at_kl: dict[tuple[str, float, str], Row] = defaultdict(dict)
    for row in record.get("matched", []):
        fields = at_kl[row["variant"], row["noise"], "trained"]
        for less, of in (("", "figures"), ("less ", "reference_less"), ("dpo ", "dpo_less")):
            for name, values in (row.get(of) or {}).items():
                fields[f"{less}{name} at {row['kl']:g}"] = values
    return pd.DataFrame(
        {
            **row,
            "usual": not row["changes"],
            **row["figures"],
            **at_kl[row["variant"], row["noise"], row["label"]],
        }
        for row in record["rows"]
    )


def _clean(record: Record) -> pd.DataFrame:
    """Those without noise, by method."""
    rows, order = policies(record), list(METHODS)
    return rows[rows["noise"] == 0].sort_values(
        "method", key=lambda methods: methods.map(order.index), kind="stable"
    )


def title(row: Row, most: int = 0) -> str:
    """Says how many seeds it has where others have ``most``."""
    changes = "".join(f", {name} {value}" for name, value in row["changes"].items())
    label = "" if row["label"] == "trained" else f", {row['label']}"
    fewer = f" (seeds: {len(row['seeds'])})" if len(row["seeds"]) < most else ""
    return TITLES[row["method"]] + changes + label + fewer


def _most_seeds(rows: Iterable[Row]) -> int:
    return max((len(row["seeds"]) for row in rows), default=1)


def _kls(record: Record) -> list[float]:
    return list(dict.fromkeys(row["kl"] for row in record["matched"]))


def heading(record: Record) -> str:
    usual, counts, data = record["set"]["usual"], record["counts"], record["data"]["name"]
    seeds, prompts = _most_seeds(record["rows"]), counts.get("pairs_prompts")
    of_prompts = f" of {prompts} prompts" if prompts else ""
    return (
        f"{data}: {record['base']}, {usual['steps']} updates of {usual['batch']} pairs (of "
        f"{usual['pairs']}), learning rate {usual['learning_rate']:g}, LoRA r={usual['lora_r']} on "
        f"{usual['lora_targets']}, {seeds} seed{'s' if seeds > 1 else ''}; "
        f"{counts['heldout']} held-out pairs{of_prompts}, {counts['prompts']} prompts answered, "
        f"{counts['unrelated']} unrelated conversations, {counts['questions']} questions "
        f"({conditions(record)}). In brackets: 95 % bootstrap intervals over items"
        + (" and seeds." if seeds > 1 else ".")
    )


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
        ("", title),
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
    base, rows = record["base_figures"], _clean(record)
    rows = rows[(rows["label"] == "trained") & rows["usual"]]
    most, zero = _most_seeds(rows.to_dict("records")), [0.0, 0.0, 0.0]
    about = {"method": "base", "label": "trained", "changes": {}, "seeds": [0] * most}
    unmoved = {"gain": zero, "kl": zero, "nll_change": zero, "questions": [1.0, 1.0, 1.0]}
    of_base = {**about, **unmoved, **base["figures"]}
    left_out = "\n".join(f"- {name}: {why}" for name, why in record["missing"].items())
    return paragraphs(
        f"{heading(record)} Of {base['asked']} questions the base answers {base['right']} right, "
        f"of which {base['kept']} are asked here. By the base's own likelihood a token "
        f"{SHARE(base['figures']['in_order'])} of the pairs are in order.",
        table(
            pd.DataFrame([of_base, *rows.to_dict("records")]),
            [("", lambda row: title(row, most)), *_columns(record)[1:]],
        ),
        left_out and f"Left out:\n\n{left_out}",
    )


def short(records: list[Record]) -> str:
    """For the README, of the study with the most seeds: all methods as trained, Q-Adapter at half
    its strength too, gain at one KL."""
    found = [record for record in records if record["benchmark"] == "quality"]
    if not found:
        return "Not measured yet."
    record = max(found, key=lambda record: _most_seeds(record["rows"]))
    rows = _clean(record)
    half = (rows["variant"] == "qadapter") & (rows["label"] == "strength 0.5")
    columns = [column for column in _columns(record) if column[1] not in ("gain", "words")]
    columns.append(_at_kl(max(_kls(record), default=0.0))[0])
    shown = rows[(rows["label"] == "trained") & rows["usual"] | half]
    return paragraphs(heading(record), table(shown, columns))


def strength_table(record: Record) -> str:
    """What varies the strength of a method after, or by, its training."""
    rows = policies(record)
    method, blended = rows["method"], rows["label"].str.match("strength|KL")
    shown = (
        (method.isin(STEERED) & blended)
        | ((method == "dpo_own") & (rows["label"] == "trained"))
        | ((method == "sft") & ~blended)
    )
    return paragraphs(heading(record), table(rows[(rows["noise"] == 0) & shown], _columns(record)))


def tests_table(record: Record) -> str:
    """Q-Adapter, and DPO, less each other method."""
    parts = [record["data"]["name"]]
    tests = [{"reference": "qadapter", "label": "trained", **test} for test in record["tests"]]
    for reference in dict.fromkeys(test["reference"] for test in tests):
        columns: list[Column] = [
            (
                f"{TITLES[reference]} less",
                lambda t: title({"method": t["against"], "changes": {}, **t}),
            ),
            (
                "figure",
                lambda t: TESTED_TITLES.get(t["figure"], t["figure"].replace("wins", "won,")),
            ),
            ("difference", lambda t: (t["mean"], t["low"], t["high"]), interval("+.4f")),
            ("p", "p", "{:.4f}"),
            ("p, Holm", "p_holm", "{:.4f}"),
        ]
        own = [test for test in tests if test["reference"] == reference]
        parts.append(table(pd.DataFrame(own), columns))
    return paragraphs(*parts)


def matched_table(record: Record) -> str:
    """Gain at the same forgetting; where all of it is compared with DPO too, a table a KL."""
    rows = _clean(record)
    trained = rows[rows["label"] == "trained"]
    if any("dpo_less" in row for row in record["matched"]):
        parts = [
            paragraphs(f"KL {kl:g}", table(_with_answers(rows, trained, kl), _against(record, kl)))
            for kl in _kls(record)
        ]
        return paragraphs(heading(record), *parts)
    columns: list[Column] = [("", title), ("seeds", lambda row: len(row["seeds"]))]
    for kl in _kls(record):
        columns += [
            *_at_kl(kl),
            ("p", f"less gain at {kl:g}", lambda values: f"{values[3]:.4f}"),
            ("pairs right", f"accuracy at {kl:g}", SHARE),
            ("NLL change", f"nll_change at {kl:g}", interval(".3f")),
        ]
    return paragraphs(record["data"]["name"], table(trained, columns))


def _with_answers(rows: pd.DataFrame, trained: pd.DataFrame, kl: float) -> pd.DataFrame:
    """Beside what is read off at a KL, what was answered there."""
    answered = rows[rows["label"] == f"KL {kl:g}"].set_index("variant")["figures"].to_dict()
    found = [answered.get(variant, {}) for variant in trained["variant"]]
    names = [name for name in trained if name.startswith(("wins ", "questions"))]
    return trained.assign(**{name: [figures.get(name) for figures in found] for name in names})


def _against(record: Record, kl: float) -> list[Column]:
    columns: list[Column] = [("", title), ("seeds", lambda row: len(row["seeds"]))]
    forms = {"gain": ".2f", "accuracy": ".1%", "nll_change": ".4f"}
    for name, form in forms.items():
        columns.append((TESTED_TITLES[name], f"{name} at {kl:g}", interval(form)))
        for of, field in (("Q-Adapter's less it", "less"), ("DPO's less it", "dpo")):
            at = f"{field} {name} at {kl:g}"
            columns += [(of, at, interval(f"+{form}")), ("p", at, lambda v: f"{v[3]:.4f}")]
    return columns + [c for c in _columns(record) if str(c[1]).startswith(("wins ", "questions"))]


def noise_table(record: Record) -> str:
    """By the share of training pairs that were flipped."""
    rows, most = policies(record), _most_seeds(record["rows"])
    noisy = rows["variant"].isin(rows["variant"][rows["noise"] > 0])
    if not noisy.any():
        return f"{record['data']['name']}: no run with flipped pairs."
    # Runs with noise are scored alone.
    scored = ("accuracy", "gain", "kl", "nll_change")
    columns = [
        ("", lambda row: f"{row['noise']:.0%} flipped, {title(row, most)}"),
        *(column for column in _columns(record) if column[1] in scored),
        *(column for kl in _kls(record) for column in _at_kl(kl)),
    ]
    rows = rows[noisy & (rows["label"] == "trained")].sort_values(["noise", "variant"])
    return paragraphs(heading(record), table(rows, columns))


def cost_table(record: Record) -> str:
    """Training and decoding."""
    training: list[Column] = [
        ("", lambda row: TITLES[row["variant"]]),
        ("runs", "runs"),
        ("threads", "threads"),
        ("seconds a pair", "seconds_per_pair", "{:.3f}"),
        ("MiB", "peak_mib", "{:.0f}"),
    ]
    decoding: list[Column] = [
        ("", "way"),
        ("ms a step", "ms_per_token", "{:.1f}"),
        ("of the base", "times_base", "{:.2f}x"),
    ]
    parts = [f"{record['data']['name']} ({conditions(record)})"]
    parts.append(table(pd.DataFrame(record["cost"]), training))
    if decode := record.get("decode"):
        parts.append(f"Generating, a step of a batch of {decode['batch']}:")
        parts.append(table(pd.DataFrame(decode["rows"]), decoding))
    return paragraphs(*parts)


def judges_table(record: Record) -> str:
    columns: list[Column] = [
        ("judge", "judge"),
        ("training pairs", "training_pairs"),
        ("held-out pairs", "heldout_pairs"),
        ("right", "accuracy", SHARE),
        ("the longer one wins", "longer", SHARE),
    ]
    return paragraphs(record["data"]["name"], table(pd.DataFrame(record["judge_figures"]), columns))


def sweep_table(record: Record) -> str:
    """Settings of a method against each other: a line a setting, the best gain at the middle KL
    first. Figures at a KL are read off between the strengths; empty where it is not reached."""
    kls, made = record["kls"], []
    rows = policies(record)
    for _, own in rows[~rows["label"].str.startswith("step")].groupby("variant", sort=False):
        (row,) = own[own["label"] == "trained"].to_dict("records")
        means = {name: np.array([v[0] for v in own[name]]) for name in ("kl", *AT_ZERO)}
        row |= {
            f"{name} at {kl:g}": float(read_off(kl, means["kl"], means[name], zero))
            for kl in kls
            for name, zero in AT_ZERO.items()
            if means["kl"].max() >= kl
        }
        made.append(row)
    middle = f"gain at {kls[len(kls) // 2]:g}"
    made.sort(key=lambda row: row.get(middle, float("-inf")), reverse=True)
    columns: list[Column] = [
        ("setting", lambda row: title(row).partition(", ")[2] or "as usual"),
        ("seeds", lambda row: len(row["seeds"])),
    ]
    titles = {"accuracy": "accuracy", "gain": "gain", "kl": "KL", "nll_change": "nll change"}
    columns += [(shown, name, interval(".3f")) for name, shown in titles.items()]
    for kl in kls:
        for name, shown in (("gain", "gain"), ("accuracy", "accuracy"), ("nll_change", "nll")):
            columns.append((f"{shown} at KL {kl:g}", f"{name} at {kl:g}", "{:.3f}"))
    text = f"{TITLES[record['method']]}, the best {middle.replace('at', 'at KL')} first."
    return paragraphs(f"{text} {heading(record)}", table(pd.DataFrame(made), columns))


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
        drawn += figures.draw(record["data"]["name"], policies(record), docs, path.stem)
    return drawn
