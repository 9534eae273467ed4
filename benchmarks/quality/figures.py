"""The pictures: preference against forgetting, learning curves, noise."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality.settings import TITLES
from qadapter import files

COLOURS = {
    "qadapter": "tab:red",
    "released": "tab:orange",
    "sft": "tab:green",
    "replay": "tab:olive",
    "dpo": "tab:blue",
    "ipo": "tab:purple",
    "dpo_own": "tab:cyan",
}
LABELS = {
    "accuracy": "held-out pairs right, share",
    "gain": "gain of chosen over rejected, nats a pair",
    "follows": "answers that keep the rule, share",
    "kl": "KL(base || policy) on unrelated text, nats a token",
    "questions": "questions still answered right, share",
}
Row = dict[str, Any]


def label_of(name: str) -> str:
    if name.startswith("wins "):
        return f"answers better than the base's, share ({name.removeprefix('wins ')})"
    return LABELS[name]


def draw(record: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """<stem>-frontier.png, -learning.png and, where there is noise, -noise.png."""
    makers: dict[str, Callable[[dict[str, Any]], Any]] = {
        "frontier": frontier,
        "learning": learning,
        "noise": noise,
    }
    written = []
    for name, make in makers.items():
        figure = make(record)
        if figure is None:
            continue
        path = folder / f"{stem}-{name}.png"
        with files.replacing_file(path) as temporary:
            figure.savefig(temporary, dpi=140)
        written.append(path)
    return written


def curves(record: dict[str, Any]) -> list[tuple[str, str, list[tuple[str, Row]], str]]:
    """(method, label, its points by strength with their names, line style).

    Q-Adapter's strength when sampling, DPO's beta, SFT's updates, the trained point of the others.
    Dotted: what the same blending with the base does to the other methods' LoRAs; dashed, to those
    that were trained at another learning rate.
    """
    clean = [row for row in record["rows"] if row["noise"] == 0]

    def of(method: str, start: str, changed: bool = False) -> list[Row]:
        return [
            row
            for row in clean
            if row["method"] == method
            and row["label"].startswith(start)
            and (changed or not row["changes"])
        ]

    def blends_of(changes: dict[str, Any], method: str, whole: str) -> list[tuple[str, Row]]:
        rows = [r for r in clean if r["method"] == method and r["changes"] == changes]
        rows = [r for r in rows if not r["label"].startswith("step")]
        named = [(r["label"].removeprefix("strength "), r) for r in rows]
        named = [(whole if label == "trained" else label, row) for label, row in named]
        return sorted(named, key=lambda pair: pair[1]["blend"][0])

    made: list[tuple[str, str, list[tuple[str, Row]], str]] = []
    for method in COLOURS:
        own = of(method, "trained")
        if not own:
            continue
        blended = blends_of({}, method, "1" if method == "qadapter" else "trained")
        if method == "qadapter":
            made.append((method, f"{TITLES[method]}, strength", blended, "-"))
            continue
        if method == "dpo_own":
            betas = [r for r in of(method, "trained", True) if not r["changes"].keys() - {"beta"}]
            betas.sort(key=_beta, reverse=True)
            made.append(
                (method, f"{TITLES[method]}, beta", [(f"{_beta(r):g}", r) for r in betas], "-")
            )
        elif method == "sft":
            steps = [(str(row["step"]), row) for row in of(method, "step") + own]
            steps.sort(key=lambda pair: pair[1]["step"])
            made.append((method, f"{TITLES[method]}, updates", steps, "-"))
        else:
            made.append((method, TITLES[method], [("", own[0])], "-"))
        made.append((method, "", [("", row) for _, row in blended], ":"))
        for row in of(method, "trained", changed=True):
            rate = row["changes"].get("learning_rate")
            if rate is not None:
                label = f"{TITLES[method]}, learning rate {rate:g}, strength"
                points = [("", r) for _, r in blends_of(row["changes"], method, "")]
                made.append((method, label, points, "--"))
    return made


def _beta(row: Row) -> float:
    return float(row["changes"].get("beta", 0.1))


def frontier(record: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    judges = [f"wins {judge['judge']}" for judge in record["judge_figures"]]
    names = ["accuracy", "gain", *judges, "follows", "questions"]
    names = [n for n in names if any(n in row["figures"] for row in record["rows"])]
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(5 * columns, 4 * lines + 0.6), layout="constrained")
    axes = np.atleast_1d(figure.subplots(lines, columns, squeeze=False)).ravel()
    for axis, name in zip(axes, names, strict=False):
        solid: list[tuple[float, float]] = []
        for method, label, points, style in curves(record):
            shown = [(text, row["figures"]) for text, row in points if name in row["figures"]]
            if not shown or (style != "-" and len(shown) < 2):
                continue
            x = [f["kl"][0] for _, f in shown]
            y = [f[name][0] for _, f in shown]
            colour = COLOURS[method]
            if style != "-":
                axis.plot(x, y, style, color=colour, linewidth=1, label=label or None)
                continue
            solid += zip(x, y, strict=True)
            error = [np.abs(np.array([f[name][i] for _, f in shown]) - y) for i in (1, 2)]
            axis.errorbar(
                x, y, error, fmt="o-", color=colour, label=label, capsize=2, markersize=4,
                elinewidth=0.6,
            )  # fmt: skip
            for text, at in zip((text for text, _ in shown), zip(x, y, strict=True), strict=True):
                axis.annotate(
                    text, at, xytext=(3, 5), textcoords="offset points", fontsize=7, color=colour
                )
        _scales(axis, solid, name)
        axis.set_xlabel(LABELS["kl"], fontsize=9)
        axis.set_title(label_of(name), fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes[len(names) :]:
        axis.remove()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)))
    figure.suptitle(
        f"{record['data']['name']}: preference against forgetting; to the upper left is better. "
        "Dotted: other methods blended with the base",
        fontsize=11,
    )
    return figure


def _scales(axis: Any, solid: list[tuple[float, float]], name: str) -> None:
    """Methods are a factor apart in KL; blends far beyond what was trained would hide the rest."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    kls, heights = ([v for v in side if v > 0] for side in zip(*solid, strict=True))
    axis.set_xscale("log")
    if kls:
        axis.set_xlim(min(kls) / 1.5, max(kls) * 2)
    sides = [axis.xaxis]
    if name == "gain" and heights:
        # Gain grows as the root of KL: equally good methods lie on one straight line here.
        axis.set_yscale("log", nonpositive="clip")
        axis.set_ylim(min(heights) / 1.5, max(heights) * 2)
        sides.append(axis.yaxis)
    for side in sides:
        side.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        side.set_major_formatter(StrMethodFormatter("{x:g}"))
        side.set_minor_formatter(NullFormatter())
    if name != "gain":
        axis.set_ylim(min(axis.get_ylim()[0], 0.45), 1.04)


def learning(record: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = ("accuracy", "gain", "kl")
    figure = Figure(figsize=(15, 4.4), layout="constrained")
    panels = figure.subplots(1, 3)
    by_method: dict[str, list[Row]] = {method: [] for method in COLOURS}
    for row in sorted(record["rows"], key=lambda row: row["step"]):
        at_full = row["label"] == "trained" or row["label"].startswith("step")
        if at_full and row["noise"] == 0 and not row["changes"]:
            by_method[row["method"]].append(row)
    # What has no checkpoints would be a straight line between others' curves.
    most = max(map(len, by_method.values()))
    by_method = {method: rows for method, rows in by_method.items() if rows and len(rows) == most}
    for method, rows in by_method.items():
        colour = COLOURS[method]
        for axis, name in zip(panels, names, strict=True):
            mean, low, high = zip(*(row["figures"][name] for row in rows), strict=True)
            start = 0.5 if name == "accuracy" else 0.0
            steps = [0, *(row["step"] for row in rows)]
            axis.plot(steps, [start, *mean], "o-", color=colour, label=TITLES[method], markersize=3)
            axis.fill_between(
                steps, [start, *low], [start, *high], color=colour, alpha=0.12, linewidth=0
            )
    for axis, name in zip(panels, names, strict=True):
        axis.set_xlabel("updates")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_title(label_of(name), fontsize=10)
        axis.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6)
    figure.suptitle(f"{record['data']['name']}: checkpoints of one training each", fontsize=11)
    return figure


def noise(record: dict[str, Any]) -> Any:
    """None without noisy runs."""
    from matplotlib.figure import Figure

    noisy = {row["variant"] for row in record["rows"] if row["noise"] > 0}
    if not noisy:
        return None
    names = ["accuracy", "gain", "kl"]
    # At the same forgetting too, a small one: noise makes the trained policies' steps smaller.
    kl = min(row["kl"] for row in record["matched"])
    figure = Figure(figsize=(4.4 * (len(names) + 1), 4.4), layout="constrained")
    panels = figure.subplots(1, len(names) + 1)
    for place, variant in enumerate(v for v in COLOURS if v in noisy):
        rows = [r for r in record["rows"] if r["variant"] == variant and r["label"] == "trained"]
        at_kl = [
            {**r, "figures": {"gain at KL": r["figures"]["gain"]}}
            for r in record["matched"]
            if r["variant"] == variant and r["kl"] == kl and r["figures"]
        ]
        for axis, name in zip(panels, [*names, "gain at KL"], strict=True):
            shown = [row for row in rows + at_kl if name in row["figures"]]
            if not shown:
                continue
            shown.sort(key=lambda row: row["noise"])
            y = np.array([row["figures"][name][:3] for row in shown])
            # A little beside each other, so that the intervals can be told apart.
            x = [100 * row["noise"] + 0.4 * place for row in shown]
            axis.errorbar(
                x, y[:, 0], np.abs(y[:, 1:] - y[:, :1]).T, fmt="o-", capsize=3,
                color=COLOURS[variant], label=TITLES[variant],
            )  # fmt: skip
    titles = [label_of(name) for name in names] + [f"gain where KL is {kl:g}"]
    for axis, title in zip(panels, titles, strict=True):
        axis.set_xlabel("training pairs flipped, %")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6)
    figure.suptitle(f"{record['data']['name']}: label noise", fontsize=11)
    return figure
