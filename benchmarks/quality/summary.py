"""From runs to figures with intervals: what is committed, tabulated and drawn."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.quality import matched, stats
from benchmarks.quality.study import TRAINED, Study

Record = dict[str, Any]
RUN = ("variant", "method", "changes", "noise")
POINT = ("label", "step", "blend")
PER_TOKEN = ("kl", "nll_change")
TESTED = r"accuracy|gain|kl|nll_change|follows|questions|wins .*"


def frame(results: list[Record], groups: dict[str, Any] | None = None) -> pd.DataFrame:
    """A row a run, point and metric, by seed: what the run and the point are, `seed`, `metric`, and
    `values`, `weights` and `groups`, arrays over the items. A figure is the ratio of sums of the
    first two. ``groups`` has those of ``pairs`` and ``answers``; without it no item shares one."""
    groups = groups or {}
    return pd.DataFrame(
        {
            **{name: result[name] for name in (*RUN, "seed")},
            **{name: point.get(name) for name in POINT},
            "metric": metric,
            "values": np.array(values, dtype=float),
            "weights": np.array(
                point["unrelated"]["tokens"] if metric in PER_TOKEN else [1.0] * len(values), float
            ),
            "groups": groups.get(_items(metric, point), np.arange(len(values))),
        }
        for result in sorted(results, key=lambda result: result["seed"])
        for point in result["points"]
        for metric, values in _metrics(point).items()
        if values
    )


def _items(metric: str, point: Record) -> str:
    """What a metric has a value for each of."""
    if metric == "accuracy" or metric in point["pairs"]:
        return "pairs"
    return metric if metric in ("questions", *PER_TOKEN) else "answers"


def groups(study: Study) -> dict[str, Any]:
    """Of the items of a study: pairs, and answers, that have one prompt are of one group."""
    return {
        "pairs": stats.groups_of(tuple(row["prompt_ids"]) for row in study.heldout),
        "answers": stats.groups_of(str(prompt) for prompt in study.prompts),
    }


def _metrics(point: Record) -> dict[str, list[float]]:
    """Every figure that the point has, item by item."""
    answered = dict(point.get("figures", {}))
    asked, wins = answered.pop("questions", {}), answered.pop("wins", {})
    unrelated = {name: point["unrelated"][name] for name in PER_TOKEN}
    return {
        # An untouched policy is right half the time.
        "accuracy": [0.5 + 0.5 * float(np.sign(gain)) for gain in point["pairs"]["gain"]],
        **point["pairs"],
        **unrelated,
        **{f"wins {judge}": shares for judge, shares in wins.items()},
        **answered,
        "questions": asked.get("right", []),
    }


def rows(items: pd.DataFrame) -> list[Record]:
    """A row a policy (variant, noise and label), over its seeds."""
    made = []
    for _, policy in items.groupby(["variant", "noise", "label"], sort=False):
        seeds = policy["seed"].unique().tolist()
        figures = {
            metric: stats.interval(
                np.stack(list(own["values"])), np.stack(list(own["weights"])), own["groups"].iloc[0]
            )
            for metric, own in policy.groupby("metric", sort=False)
            if len(own) == len(seeds)
        }
        about = policy[[*RUN, *POINT]].to_dict("records")[0]
        made.append({**about, "seeds": seeds, "figures": figures})
    return made


def paired_tests(items: pd.DataFrame) -> list[Record]:
    """Q-Adapter, and DPO, less every other method, as trained and where KL is what the set says,
    with the usual settings and without noise, on the seeds of both."""
    usual = (items["noise"] == 0) & ~items["changes"].astype(bool)
    usual &= (items["label"] == TRAINED) | items["label"].str.startswith("KL")
    tested = items[usual & items["metric"].str.fullmatch(TESTED)]
    tested = tested.assign(mean=tested["values"] / tested["weights"]).set_index("seed")
    by = ["label", "variant", "metric"]
    figures = dict(list(tested.groupby(by, sort=False)["mean"]))
    together = tested.groupby("metric")["groups"].first()
    made = []
    for reference in matched.REFERENCES.values():
        for (label, variant, metric), other in figures.items():
            own = figures.get((label, reference, metric))
            if variant == reference or own is None:
                continue
            if seeds := [seed for seed in own.index if seed in other.index]:
                sides = (np.stack(list(side[seeds])) for side in (own, other))
                difference = stats.paired(*sides, together[metric])
                about = {"reference": reference, "label": label, "against": variant}
                made.append({**about, "figure": metric, "seeds": seeds, **difference})
    names = ["reference", "label", "against", "figure", "seeds", "mean", "low", "high", "p"]
    tests = pd.DataFrame(made, columns=names)
    family = tests.groupby(["reference", "label", "figure"])["p"]
    tests["p_holm"] = family.transform(stats.holm)
    return tests.to_dict("records")


def cost(results: list[Record]) -> list[Record]:
    """The least over a method's runs: what else ran on the machine only adds.

    Of the runs with the most threads alone, since fewer are slower; without those with noise or
    changed settings, whose base passes are cached.
    """
    runs = pd.DataFrame(
        {"variant": result["variant"], **result["training"]}
        for result in results
        if not result["changes"] and not result["noise"]
    )
    if runs.empty:
        return []
    most = runs.groupby("variant")["threads"].transform("max")
    by_method = runs[runs["threads"] == most].groupby("variant", sort=False)
    least = by_method[["threads", "seconds_per_pair", "peak_mib"]].min()
    return least.assign(runs=by_method.size()).reset_index().to_dict("records")


def base_figures(study: Study) -> Record:
    record, rule, of = study.base_record, study.data.rule, groups(study)
    words = [len(answer.split()) for answer in record["answers"]]
    figures = {
        "in_order": stats.mean_interval(record["pairs"]["in_order"], of["pairs"]),
        "words": stats.mean_interval(words, of["answers"]),
    }
    if rule is not None:
        follows = [rule(answer) for answer in record["answers"]]
        figures["follows"] = stats.mean_interval(follows, of["answers"])
    counts = {"asked": record["asked"], "right": record["right"], "kept": len(record["kept"])}
    return {"figures": figures, **counts}


def judges(study: Study) -> list[Record]:
    return [
        {
            "judge": report["judge"],
            "training_pairs": report["training_pairs"],
            "heldout_pairs": len(report["correct"]),
            "accuracy": stats.mean_interval(report["correct"]),
            "longer": stats.mean_interval(report["longer"]),
        }
        for report in study.judge_reports()
    ]


def _about(study: Study) -> Record:
    lists = ("heldout", "prompts", "unrelated", "questions")
    counts = {name: len(getattr(study, name)) for name in lists}
    counts |= {f"{name}_prompts": len(set(of)) for name, of in groups(study).items()}
    return {
        **study.about["what"],
        "set": {**asdict(study.set), "usual": study.set.usual},
        "environment": study.about["environment"],
        "counts": {"train": len(study.data.train), **counts},
    }


def summarise_sweep(
    study: Study, results: list[Record], method: str, kls: Sequence[float] = matched.KLS
) -> Record:
    """The same of settings of a method against each other."""
    about = {"benchmark": "quality_sweep", "method": method, "kls": list(kls)}
    return {**about, **_about(study), "rows": rows(frame(results, groups(study)))}


def summarise(
    study: Study,
    results: list[Record],
    missing: dict[str, str],
    decode: Record | None = None,
) -> Record:
    """Everything that the report needs; holds figures alone, no text of the data."""
    items = frame(results, groups(study))
    return {
        "benchmark": "quality",
        **_about(study),
        "base_figures": base_figures(study),
        "judge_figures": judges(study),
        "missing": {**missing, **study.missing_judges},
        "rows": rows(items),
        "tests": paired_tests(items),
        "matched": matched.rows(items),
        "cost": cost(results),
        "decode": decode,
    }
