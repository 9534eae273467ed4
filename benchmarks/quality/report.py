"""Tables of docs/quality.md, and the pictures beside it, from the committed summaries."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.quality.settings import METHODS, TITLES
from benchmarks.report_common import conditions

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
Record = dict[str, Any]

TESTED_TITLES = {
    "accuracy": "accuracy",
    "gain": "gain, nats a pair",
    "kl": "KL, nats a token",
    "nll_change": "change of NLL, nats a token",
    "follows": "follows the rule",
    "questions": "questions still right",
}


def _seeds(record: Record) -> int:
    return max((len(row["seeds"]) for row in record["rows"]), default=1)


def heading(record: Record) -> str:
    usual, counts, data = record["set"]["usual"], record["counts"], record["data"]["name"]
    seeds = _seeds(record)
    return (
        f"{data}: {record['base']}, {usual['steps']} updates of {usual['batch']} pairs (of "
        f"{usual['pairs']}), learning rate {usual['learning_rate']:g}, LoRA r={usual['lora_r']} on "
        f"{usual['lora_targets']}, {seeds} seed{'s' if seeds > 1 else ''}; "
        f"{counts['heldout']} held-out pairs, {counts['prompts']} prompts answered, "
        f"{counts['unrelated']} unrelated conversations, {counts['questions']} questions "
        f"({conditions(record)}). In brackets: 95 % bootstrap intervals over items"
        + (" and seeds." if seeds > 1 else ".")
    )


def cell(figures: dict[str, list[float]], name: str, form: str = ".2f") -> str:
    if name not in figures:
        return ""
    mean, low, high = (f"{value:{form}}" for value in figures[name])
    return f"{mean} [{low}, {high}]"


def share(figures: dict[str, list[float]], name: str) -> str:
    if name not in figures:
        return ""
    mean, low, high = figures[name]
    return f"{mean:.0%} [{low:.0%}, {high:.0%}]"


def title(row: dict[str, Any]) -> str:
    changes = ", ".join(f"{name} {value}" for name, value in row["changes"].items())
    return TITLES[row["method"]] + (f", {changes}" if changes else "")


def _won(judge: dict[str, Any]) -> str:
    """A share won is worth as much as its judge."""
    return f"won, {judge['judge']} (itself {judge['accuracy'][0]:.0%} right)"


def _columns(record: Record) -> list[tuple[str, str, Callable[..., str]]]:
    rule = any("follows" in row["figures"] for row in record["rows"])
    return [
        ("pairs right", "accuracy", share),
        ("gain", "gain", cell),
        *((_won(judge), f"wins {judge['judge']}", share) for judge in record["judge_figures"]),
        *([("rule", "follows", share)] if rule else []),
        ("KL", "kl", lambda f, n: cell(f, n, ".4f")),
        ("NLL change", "nll_change", lambda f, n: cell(f, n, ".4f")),
        ("questions", "questions", share),
        ("words", "words", lambda f, n: cell(f, n, ".0f")),
    ]


def _table(
    columns: list[tuple[str, str, Callable[..., str]]], rows: list[tuple[str, Record]]
) -> str:
    header = ["", *(name for name, _, _ in columns)]
    lines = [[name, *(form(f, figure) for _, figure, form in columns)] for name, f in rows]
    return harness.table(header, lines)


def main_table(record: Record) -> str:
    """Every method as trained, without noise."""
    base = record["base_figures"]
    own = [
        row
        for row in record["rows"]
        if row["noise"] == 0 and row["label"] == "trained" and not row["changes"]
    ]
    own.sort(key=lambda row: list(METHODS).index(row["method"]))
    most = max((len(row["seeds"]) for row in own), default=1)

    def name_of(row: dict[str, Any]) -> str:
        fewer = len(row["seeds"]) < most
        return title(row) + (f" (seeds: {len(row['seeds'])})" if fewer else "")

    zero = [0.0, 0.0, 0.0]
    nothing = {
        "gain": zero,
        "kl": zero,
        "nll_change": zero,
        "questions": [1.0, 1.0, 1.0],
        **{name: base["figures"][name] for name in ("words", "follows") if name in base["figures"]},
    }
    table = _table(
        _columns(record), [("base", nothing), *((name_of(row), row["figures"]) for row in own)]
    )
    left_out = "".join(f"\n- {name}: {why}" for name, why in record["missing"].items())
    return (
        f"{heading(record)} Of {base['asked']} questions the base answers {base['right']} right, "
        f"of which {base['kept']} are asked here. By the base's own likelihood a token "
        f"{share(base['figures'], 'in_order')} of the pairs are in order.\n\n{table}"
        + (f"\n\nLeft out:\n{left_out}" if left_out else "")
    )


def _matched(record: Record) -> list[Record]:
    return [row for row in record["matched"] if row["noise"] == 0]


def short(records: list[Record]) -> str:
    """For the README, of the study with the most seeds: all methods as trained, Q-Adapter at half
    its strength too, gain at one KL."""
    found = [record for record in records if record["benchmark"] == "quality"]
    return _short_table(max(found, key=_seeds)) if found else "Not measured yet."


def _short_table(record: Record) -> str:
    own = [row for row in record["rows"] if row["noise"] == 0 and not row["changes"]]
    half = [r for r in own if r["method"] == "qadapter" and r["label"] == "strength 0.5"]
    own = [row for row in own if row["label"] == "trained"]
    own.sort(key=lambda row: list(METHODS).index(row["method"]))
    at = max((row["kl"] for row in _matched(record)), default=0.0)
    gains = {
        row["method"]: row["figures"]["gain"]
        for row in _matched(record)
        if row["kl"] == at and row["figures"] and not row["changes"]
    }
    shown: list[tuple[str, Record]] = []
    for row in own:
        gain = {"matched": gains[row["method"]]} if row["method"] in gains else {}
        shown.append((title(row), {**row["figures"], **gain}))
        if row["method"] == "qadapter":
            shown += [(f"{title(r)}, strength 0.5", r["figures"]) for r in half]
    columns = [c for c in _columns(record) if c[1] not in ("gain", "words")]
    columns.append((f"gain at KL {at:g}", "matched", cell))
    return f"{heading(record)}\n\n{_table(columns, shown)}"


def strength_table(record: Record) -> str:
    """What varies the strength of a method after, or by, its training."""
    rows = []
    for row in record["rows"]:
        blended = row["method"] == "qadapter" and row["label"].startswith("strength")
        varied = row["method"] == "dpo_own" and row["label"] == "trained"
        stopped = row["method"] == "sft" and not row["label"].startswith("strength")
        if row["noise"] == 0 and (blended or varied or stopped):
            name = title(row) if row["label"] == "trained" else f"{title(row)}, {row['label']}"
            rows.append((name, row["figures"]))
    return f"{heading(record)}\n\n{_table(_columns(record), rows)}"


def tests_table(record: Record) -> str:
    """Q-Adapter less each other method."""
    lines = [
        [
            TITLES.get(test["against"], test["against"]),
            TESTED_TITLES.get(test["figure"], test["figure"].replace("wins", "won,")),
            f"{test['mean']:+.4f} [{test['low']:+.4f}, {test['high']:+.4f}]",
            f"{test['p']:.4f}",
            f"{test['p_holm']:.4f}",
        ]
        for test in record["tests"]
    ]
    header = ["Q-Adapter less", "figure", "difference", "p", "p, Holm"]
    text = (
        "Paired by item and seed; p of a sign-flip test over items, also adjusted for the number "
        "of methods."
    )
    return f"{record['data']['name']}: {text}\n\n{harness.table(header, lines)}"


def matched_table(record: Record) -> str:
    """Gain at the same forgetting."""
    kls = list(dict.fromkeys(row["kl"] for row in _matched(record)))
    by_variant: dict[str, list[Record]] = {}
    for row in sorted(_matched(record), key=lambda row: list(METHODS).index(row["method"])):
        by_variant.setdefault(row["variant"], []).append(row)
    header = ["", "seeds"]
    for kl in kls:
        header += [f"gain at KL {kl:g}", "Q-Adapter's less it", "p", "pairs right", "NLL change"]
    lines = []
    for rows in by_variant.values():
        cells = [title(rows[0]), str(len(rows[0]["seeds"]))]
        for row in rows:
            figures, less = row["figures"] or {}, row["reference_less"] or {}
            cells += [
                cell(figures, "gain"),
                cell({n: f[:3] for n, f in less.items()}, "gain", "+.2f"),
                f"{less['gain'][3]:.4f}" if less else "",
                share(figures, "accuracy"),
                cell(figures, "nll_change", ".3f"),
            ]
        lines.append(cells)
    text = (
        "What each method has where its KL is the same, read off between the strengths of its "
        "LoRA blended with the base, seed by seed. Intervals and p by a bootstrap over pairs, "
        "conversations and seeds, which finds the place of that KL in every draw anew. Empty: not "
        "reached at the largest strength."
    )
    return f"{record['data']['name']}: {text}\n\n{harness.table(header, lines)}"


def noise_table(record: Record) -> str:
    """By the share of training pairs that were flipped."""
    noisy = {row["variant"] for row in record["rows"] if row["noise"] > 0}
    if not noisy:
        return f"{record['data']['name']}: no run with flipped pairs."
    rows, most = [], _seeds(record)
    for row in sorted(record["rows"], key=lambda row: (row["noise"], row["variant"])):
        if row["variant"] not in noisy or row["label"] != "trained":
            continue
        at = {
            f"{what} {other['kl']:g}": figures["gain"][:3]
            for other in record["matched"]
            if (other["variant"], other["noise"]) == (row["variant"], row["noise"])
            for what, figures in (("own", other["figures"]), ("less", other["reference_less"]))
            if figures
        }
        fewer = f" (seeds: {len(row['seeds'])})" if len(row["seeds"]) < most else ""
        name = f"{row['noise']:.0%} flipped, {title(row)}{fewer}"
        rows.append((name, {**row["figures"], **at}))
    # Runs with noise are scored alone.
    columns = [c for c in _columns(record) if c[1] in ("accuracy", "gain", "kl", "nll_change")]
    for kl in dict.fromkeys(row["kl"] for row in record["matched"]):
        columns += [
            (f"gain at KL {kl:g}", f"own {kl:g}", cell),
            ("Q-Adapter's less it", f"less {kl:g}", lambda f, n: cell(f, n, "+.2f")),
        ]
    return f"{heading(record)}\n\n{_table(columns, rows)}"


def cost_table(record: Record) -> str:
    """Training and decoding."""
    lines = [
        [
            TITLES[row["variant"]],
            str(row["runs"]),
            str(row["threads"]),
            f"{row['seconds_per_pair']:.3f}",
            f"{row['peak_mib']:.0f}",
        ]
        for row in record["cost"]
    ]
    header = ["", "runs", "threads", "seconds a pair", "MiB"]
    text = (
        f"{record['data']['name']}: the median update's time by its pairs, and what training adds "
        f"to the resident memory, each the least over the runs ({conditions(record)}). The methods "
        "of TRL also pass the base in every update; Q-Adapter could keep the base's figures "
        "(`precompute_base`), which was off."
    )
    made = f"{text}\n\n{harness.table(header, lines)}"
    decode = record.get("decode")
    if decode:
        lines = [
            [row["way"], f"{row['ms_per_token']:.1f}", f"{row['times_base']:.2f}x"]
            for row in decode["rows"]
        ]
        table = harness.table(["", "ms a step", "of the base"], lines)
        made += f"\n\nGenerating, a step of a batch of {decode['batch']}:\n\n{table}"
    return made


def judges_table(record: Record) -> str:
    lines = [
        [
            judge["judge"],
            str(judge["training_pairs"]),
            str(judge["heldout_pairs"]),
            share(judge, "accuracy"),
            share(judge, "longer"),
        ]
        for judge in record["judge_figures"]
    ]
    header = ["judge", "training pairs", "held-out pairs", "right", "the longer one wins"]
    return f"{record['data']['name']}\n\n{harness.table(header, lines)}"


def sweep_table(record: Record) -> str:
    """Settings of a method, the best gain at the middle KL first."""
    from benchmarks.quality import sweep

    middle = record["kls"][len(record["kls"]) // 2]
    text = (
        f"{TITLES[record['method']]}, a line for what differs from the usual settings, the best "
        f"gain at KL {middle:g} first. {heading(record)} Figures at a KL are read off between the "
        "strengths."
    )
    return f"{text}\n\n{sweep.table(record['rows'], record['kls'])}"


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
    return "\n\n".join(
        make(record) for results, make in TABLES.values() if results == record["benchmark"]
    )


def load(results: Path = RESULTS, of: str = "quality") -> dict[str, Record]:
    """The committed studies, or sweeps, by their file's name."""
    paths = sorted(results.glob(f"{of}-*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def draw(results: Path = RESULTS, docs: Path = DOCS) -> list[Path]:
    """The pictures of every study; returns their paths."""
    from benchmarks.quality import figures

    return [p for stem, record in load(results).items() for p in figures.draw(record, docs, stem)]


def write(results: Path = RESULTS, docs: Path = DOCS, readme: Path | None = None) -> list[Path]:
    """Rewrites the marked tables and the pictures; returns what was written."""
    from benchmarks.report import replace

    records = {of: list(load(results, of).values()) for of in ("quality", "quality_sweep")}
    if not records["quality"]:
        raise ValueError(f"{results}: no quality-*.json; run the study with --json first")
    written = []
    for page in [readme or ROOT / "README.md", *sorted(docs.glob("*.md"))]:
        before = after = page.read_text(encoding="utf-8")
        for name, (of, make) in TABLES.items():
            if f"<!-- table:{name} -->" in after:
                made = "\n\n".join(map(make, records[of])) or "Not measured yet."
                after = replace(after, f"table:{name}", made)
        if "<!-- table:quality_short -->" in after:
            after = replace(after, "table:quality_short", short(records["quality"]))
        if after != before:
            page.write_text(after, encoding="utf-8")
            written.append(page)
    return written + draw(results, docs)
