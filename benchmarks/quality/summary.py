"""From runs to figures with intervals: what is committed, tabulated and drawn."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.quality import matched, stats
from benchmarks.quality.study import TRAINED, Study

Record = dict[str, Any]
Values = tuple[list[float], list[float]]  # a figure is the ratio of their sums
PER_TOKEN = ("kl", "nll_change")
TESTED = ("accuracy", "gain", "kl", "nll_change", "follows", "questions")


def accuracy(gains: list[float]) -> list[float]:
    return [1.0 if gain > 0 else 0.5 if gain == 0 else 0.0 for gain in gains]


def values(point: Record) -> dict[str, Values]:
    """Every figure that the point has, item by item."""
    pairs, unrelated, answered = point["pairs"], point["unrelated"], point.get("figures", {})
    asked = answered.get("questions", {})
    made = {
        "accuracy": accuracy(pairs["gain"]),
        **{name: pairs[name] for name in ("gain", "chosen", "in_order")},
        **{name: unrelated[name] for name in PER_TOKEN},
        **{f"wins {judge}": shares for judge, shares in answered.get("wins", {}).items()},
        **{name: answered.get(name) for name in ("words", "follows")},
        "questions": asked.get("right"),
        "questions_contained": asked.get("contained"),
    }
    return {
        name: (items, unrelated["tokens"] if name in PER_TOKEN else [1.0] * len(items))
        for name, items in made.items()
        if items
    }


def _by_policy(results: list[Record]) -> list[list[tuple[Record, Record]]]:
    """(result, point) of all seeds of the same variant, noise and label."""
    groups: dict[Any, list[tuple[Record, Record]]] = {}
    for result in sorted(results, key=lambda r: r["seed"]):
        for point in result["points"]:
            key = (result["variant"], result["noise"], point["label"])
            groups.setdefault(key, []).append((result, point))
    return list(groups.values())


def rows(results: list[Record]) -> list[Record]:
    made = []
    for group in _by_policy(results):
        result, point = group[0]
        row = {name: result[name] for name in ("variant", "method", "changes", "noise")}
        row |= {name: point[name] for name in ("label", "step", "blend")}
        row["seeds"] = [result["seed"] for result, _ in group]
        by_seed = [values(point) for _, point in group]
        row["figures"] = {
            name: list(stats.interval(*zip(*(seed[name] for seed in by_seed), strict=True)))
            for name in by_seed[0]
            if all(name in seed for seed in by_seed)
        }
        made.append(row)
    return made


def paired_tests(results: list[Record], reference: str = "qadapter") -> list[Record]:
    """The reference less every other method, as trained, with the usual settings and without
    noise, on the seeds of both."""
    by_method = {
        group[0][0]["variant"]: {result["seed"]: values(point) for result, point in group}
        for group in _by_policy([r for r in results if not r["noise"] and not r["changes"]])
        if group[0][1]["label"] == TRAINED
    }
    own = by_method.pop(reference, {})
    made: list[Record] = []
    for variant, other in by_method.items():
        seeds = sorted(own.keys() & other.keys())
        for name in own[seeds[0]] if seeds else ():
            tested = name in TESTED or name.startswith("wins ")
            if tested and all(name in side[seed] for side in (own, other) for seed in seeds):
                sides = [[_per_item(side[seed][name]) for seed in seeds] for side in (own, other)]
                difference = stats.paired(*sides)._asdict()
                made.append({"against": variant, "figure": name, "seeds": seeds, **difference})
    for name in dict.fromkeys(test["figure"] for test in made):
        family = [test for test in made if test["figure"] == name]
        for test, p in zip(family, stats.holm([test["p"] for test in family]), strict=True):
            test["p_holm"] = p
    return made


def _per_item(figure: Values) -> list[float]:
    return [value / weight for value, weight in zip(*figure, strict=True)]


def cost(results: list[Record]) -> list[Record]:
    """The least over a method's runs: what else ran on the machine only adds.

    Of the runs with the most threads alone, since fewer are slower; without those with noise or
    changed settings, whose base passes are cached.
    """
    by_method: dict[str, list[Record]] = {}
    for result in results:
        if not result["changes"] and not result["noise"]:
            by_method.setdefault(result["variant"], []).append(result["training"])
    made = []
    for variant, trained in by_method.items():
        threads = max(t["threads"] for t in trained)
        own = [t for t in trained if t["threads"] == threads]
        row = {"variant": variant, "runs": len(own), "threads": threads}
        made.append(row | {n: min(t[n] for t in own) for n in ("seconds_per_pair", "peak_mib")})
    return made


def base_figures(study: Study) -> Record:
    record = study.base_record
    items = {
        "in_order": record["pairs"]["in_order"],
        "words": [float(len(answer.split())) for answer in record["answers"]],
    }
    if study.data.rule is not None:
        items["follows"] = [float(study.data.rule(answer)) for answer in record["answers"]]
    return {
        "figures": {name: list(stats.interval([values])) for name, values in items.items()},
        "asked": record["asked"],
        "right": record["right"],
        "kept": len(record["kept"]),
    }


def judges(study: Study) -> list[Record]:
    return [
        {
            "judge": report["judge"],
            "training_pairs": report["training_pairs"],
            "heldout_pairs": len(report["correct"]),
            "accuracy": list(stats.interval([report["correct"]])),
            "longer": list(stats.interval([report["longer"]])),
        }
        for report in study.judge_reports()
    ]


def _about(study: Study) -> Record:
    lists = ("heldout", "prompts", "unrelated", "questions")
    return {
        **study.about["what"],
        "set": {**asdict(study.set), "usual": study.set.usual},
        "environment": study.about["environment"],
        "counts": {
            "train": len(study.data.train),
            **{name: len(getattr(study, name)) for name in lists},
        },
    }


def summarise_sweep(
    study: Study, results: list[Record], method: str, kls: Sequence[float]
) -> Record:
    """The same of settings of a method against each other."""
    return {
        "benchmark": "quality_sweep",
        "method": method,
        "kls": list(kls),
        **_about(study),
        "rows": rows(results),
    }


def summarise(
    study: Study,
    results: list[Record],
    missing: dict[str, str],
    decode: Record | None = None,
) -> Record:
    """Everything that the report needs; holds figures alone, no text of the data."""
    return {
        "benchmark": "quality",
        **_about(study),
        "base_figures": base_figures(study),
        "judge_figures": judges(study),
        "missing": {**missing, **study.missing_judges},
        "rows": rows(results),
        "tests": paired_tests(results),
        "matched": matched.rows(results),
        "cost": cost(results),
        "decode": decode,
    }
