"""From runs to figures with intervals: what is committed, tabulated and drawn."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.quality import matched, stats
from benchmarks.quality.study import TRAINED, Study
from qadapter import files

Point = dict[str, Any]
Values = tuple[list[float], list[float] | None]  # items, and what their sum is divided by


def _accuracy(point: Point) -> Values:
    return [1.0 if g > 0 else 0.5 if g == 0 else 0.0 for g in point["pairs"]["gain"]], None


FIGURES: dict[str, Callable[[Point], Values]] = {
    "accuracy": _accuracy,
    "gain": lambda p: (p["pairs"]["gain"], None),
    "chosen": lambda p: (p["pairs"]["chosen"], None),
    "in_order": lambda p: (p["pairs"]["in_order"], None),
    "kl": lambda p: (p["unrelated"]["kl"], p["unrelated"]["tokens"]),
    "nll_change": lambda p: (p["unrelated"]["nll_change"], p["unrelated"]["tokens"]),
}
ANSWERED: dict[str, Callable[[dict[str, Any]], list[float]]] = {
    "words": lambda f: f["words"],
    "follows": lambda f: f["follows"],
    "questions": lambda f: f["questions"]["right"],
    "questions_contained": lambda f: f["questions"]["contained"],
}
TESTED = ("accuracy", "gain", "kl", "nll_change", "follows", "questions")


def values(point: Point) -> dict[str, Values]:
    """Every figure that the point has, item by item."""
    made = {name: figure(point) for name, figure in FIGURES.items()}
    answered = point.get("figures")
    if answered:
        made |= {f"wins {judge}": (shares, None) for judge, shares in answered["wins"].items()}
        for name, figure in ANSWERED.items():
            if name != "follows" or "follows" in answered:
                made[name] = (figure(answered), None)
    return {name: pair for name, pair in made.items() if pair[0]}


def _grouped(results: list[dict[str, Any]]) -> dict[tuple[str, float, str], list[dict[str, Any]]]:
    """(variant, noise, label) -> the seeds' points."""
    groups: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for result in sorted(results, key=lambda r: r["seed"]):
        for point in result["points"]:
            key = (result["variant"], result["noise"], point["label"])
            groups.setdefault(key, []).append({**point, "result": result})
    return groups


def rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    made = []
    for (variant, noise, label), points in _grouped(results).items():
        by_seed = [values(point) for point in points]
        names = [name for name in by_seed[0] if all(name in seed for seed in by_seed)]
        first = points[0]
        figures = {
            name: list(
                stats.interval(
                    [seed[name][0] for seed in by_seed],
                    None if by_seed[0][name][1] is None else [seed[name][1] for seed in by_seed],
                )
            )
            for name in names
        }
        made.append(
            {
                "variant": variant,
                "method": first["result"]["method"],
                "changes": first["result"]["changes"],
                "noise": noise,
                "label": label,
                "step": first["step"],
                "blend": first["blend"],
                "seeds": [point["result"]["seed"] for point in points],
                "figures": figures,
            }
        )
    return made


def paired_tests(
    results: list[dict[str, Any]], reference: str = "qadapter"
) -> list[dict[str, Any]]:
    """The reference less every other method, as trained, with the usual settings and without
    noise, on the seeds of both."""
    groups = {
        variant: {point["result"]["seed"]: values(point) for point in points}
        for (variant, noise, label), points in _grouped(results).items()
        if noise == 0 and label == TRAINED and not points[0]["result"]["changes"]
    }
    own = groups.get(reference, {})
    made: list[dict[str, Any]] = []
    for variant, other in groups.items():
        seeds = sorted(own.keys() & other.keys())
        if variant == reference or not seeds:
            continue
        for name in own[seeds[0]]:
            if name not in TESTED and not name.startswith("wins "):
                continue
            if not all(name in side[seed] for side in (own, other) for seed in seeds):
                continue
            sides = [[_per_item(*side[seed][name]) for seed in seeds] for side in (own, other)]
            difference = stats.paired(*sides)
            made.append(
                {"against": variant, "figure": name, "seeds": seeds, **difference._asdict()}
            )
    for name in dict.fromkeys(test["figure"] for test in made):
        family = [test for test in made if test["figure"] == name]
        adjusted = stats.holm([test["p"] for test in family])
        for test, p in zip(family, adjusted, strict=True):
            test["p_holm"] = p
    return made


def _per_item(items: list[float], weights: list[float] | None) -> list[float]:
    if weights is None:
        return items
    return [value / weight for value, weight in zip(items, weights, strict=True)]


def cost(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The least over a method's runs: what else ran on the machine only adds.

    Of the runs with the most threads alone, since fewer are slower; without those with noise or
    changed settings, whose base passes are cached.
    """
    made = []
    plain_runs = [r for r in results if not r["changes"] and not r["noise"]]
    for variant in dict.fromkeys(r["variant"] for r in plain_runs):
        own = [r["training"] for r in plain_runs if r["variant"] == variant]
        threads = max(t["threads"] for t in own)
        own = [t for t in own if t["threads"] == threads]
        made.append(
            {
                "variant": variant,
                "runs": len(own),
                "threads": threads,
                "seconds_per_pair": min(t["seconds_per_pair"] for t in own),
                "peak_mib": min(t["peak_mib"] for t in own),
            }
        )
    return made


def base_figures(study: Study) -> dict[str, Any]:
    record = study.base_record
    figures = {
        "in_order": list(stats.interval([record["pairs"]["in_order"]])),
        "words": list(stats.interval([[float(len(a.split())) for a in record["answers"]]])),
    }
    if study.data.rule is not None:
        follows = [float(study.data.rule(answer)) for answer in record["answers"]]
        figures["follows"] = list(stats.interval([follows]))
    return {
        "figures": figures,
        "asked": record["asked"],
        "right": record["right"],
        "kept": len(record["kept"]),
    }


def judges(study: Study) -> list[dict[str, Any]]:
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


def _about(study: Study) -> dict[str, Any]:
    about = files.read_json(study.output / "study.json")
    return {
        **about["what"],
        "set": {**asdict(study.set), "usual": study.set.usual},
        "environment": about["environment"],
        "counts": {
            "train": len(study.data.train),
            "heldout": len(study.heldout),
            "prompts": len(study.prompts),
            "unrelated": len(study.unrelated),
            "questions": len(study.questions),
        },
    }


def summarise_sweep(
    study: Study, results: list[dict[str, Any]], method: str, kls: Sequence[float]
) -> dict[str, Any]:
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
    results: list[dict[str, Any]],
    missing: dict[str, str],
    decode: dict[str, Any] | None = None,
) -> dict[str, Any]:
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
