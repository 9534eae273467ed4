"""The pictures: preference against forgetting, learning curves, noise."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from benchmarks import plotting
from benchmarks.quality.settings import METHODS, STEERED, TITLES

LABELS = {
    "accuracy": "held-out pairs right, share",
    "gain": "gain of chosen over rejected, nats a pair",
    "follows": "answers that keep the rule, share",
    "kl": "KL(base || policy) on unrelated text, nats a token",
    "questions": "questions still answered right, share",
}


def draw(name: str, rows: pd.DataFrame, folder: Path, stem: str) -> list[Path]:
    """<stem>-frontier.png and, where there are updates between and noise, -learning.png and
    -noise.png; of the policies of `report.policies`, learnt from the data of that name."""
    written = []
    pictures = {"frontier": frontier, "learning": learning, "noise": noise}
    there = {"learning": rows["label"].str.startswith("step").any(), "noise": rows["noise"].any()}
    for what, make in pictures.items():
        if not there.get(what, True):
            continue
        figure, panel, text = make(rows)
        plotting.legend_below(figure, panel)
        figure.suptitle(f"{name}: {text}", fontsize=plotting.MIDDLE)
        written.append(folder / f"{stem}-{what}.png")
        plotting.save(figure, written[-1])
    return written


Picture = tuple[Figure, Axes, str]  # with the panel that has the legend, and what it shows


class Curve(NamedTuple):
    """Rows of policies; ``by`` is the field that stands beside each point."""

    method: str
    label: str
    rows: pd.DataFrame
    by: str = ""
    style: str = "-"


def curves(rows: pd.DataFrame) -> Iterator[Curve]:
    """Q-Adapter's strength when sampling, DPO's beta, SFT's updates, the trained point of the
    others.

    Dotted: what the same blending with the base does to the other methods' LoRAs; dashed, to those
    that were trained at another learning rate.
    """
    rows = rows[rows["noise"] == 0].assign(
        strength=lambda rows: [blend[0] for blend in rows["blend"]],
        beta=lambda rows: [changes.get("beta", 0.1) for changes in rows["changes"]],
        rate=lambda rows: [changes.get("learning_rate") for changes in rows["changes"]],
    )
    for method, own in rows.groupby(pd.Categorical(rows["method"], list(METHODS)), observed=True):
        name, stepped = TITLES[method], own["label"].str.startswith("step")
        trained, blends = own["label"] == "trained", own[~stepped].sort_values("strength")
        usual = own[trained & own["usual"]]
        if usual.empty:
            continue
        if method in STEERED:
            yield Curve(method, f"{name}, strength", blends[blends["usual"]], "strength")
            continue
        if method == "dpo_own":
            betas = own[trained & own["rate"].isna()].sort_values("beta", ascending=False)
            yield Curve(method, f"{name}, beta", betas, "beta")
        elif method == "sft":
            steps = own[(stepped | trained) & own["usual"]].sort_values("step")
            yield Curve(method, f"{name}, updates", steps, "step")
        else:
            yield Curve(method, name, usual)
        yield Curve(method, "", blends[blends["usual"]], style=":")
        for rate, other in blends.groupby("rate", sort=False):
            yield Curve(method, f"{name}, learning rate {rate:g}, strength", other, style="--")


def frontier(rows: pd.DataFrame) -> Picture:
    """Of methods with one seed beside others with several, tables alone tell."""
    seeds = rows["seeds"].map(len)
    rows = rows[seeds.groupby(rows["method"]).transform("max") >= min(2, seeds.max())]
    names = ["accuracy", "gain", *rows.filter(regex="^wins "), "follows", "questions"]
    names = [name for name in names if name in rows]
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure, panels = plotting.panels_of(columns, lines, (5 * columns, 4 * lines + 0.6))
    for panel, name in zip(panels, names, strict=False):
        _frontier(panel, name, curves(rows))
    for panel in panels[len(names) :]:
        panel.remove()
    text = (
        "preference against forgetting; to the upper left is better. Dotted: other methods blended "
        "with the base"
    )
    return figure, panels[0], text


def _frontier(panel: Axes, name: str, drawn: Iterable[Curve]) -> None:
    solid: list[tuple[float, float]] = []
    for method, label, rows, by, style in drawn:
        shown = rows.dropna(subset=[name])
        if shown.empty or (style != "-" and len(shown) < 2):
            continue
        x, y = (np.stack(list(shown[figure])) for figure in ("kl", name))
        colour = METHODS[method].colour
        if style != "-":
            panel.plot(x[:, 0], y[:, 0], style, color=colour, linewidth=1, label=label or None)
            continue
        _errorbar(panel, x[:, 0], y, colour, label, capsize=2, markersize=4, elinewidth=0.6)
        for at, value in zip(zip(x[:, 0], y[:, 0], strict=True), shown[by or "step"], strict=True):
            solid.append(at)
            text = f"{value:g}" if by else ""
            panel.annotate(
                text, at, xytext=(3, 5), textcoords="offset points", fontsize=7, color=colour
            )
    _scales(panel, solid, name)
    panel.set_xlabel(LABELS["kl"], fontsize=9)
    _title(panel, name)


def _errorbar(panel: Axes, x: Any, y: Any, colour: str, label: str, **style: Any) -> None:
    """y is [points, (mean, low, high)]."""
    error = np.abs(y[:, 1:3] - y[:, :1]).T
    panel.errorbar(x, y[:, 0], error, fmt="o-", color=colour, label=label, **style)


def _scales(panel: Axes, solid: list[tuple[float, float]], name: str) -> None:
    """Methods are a factor apart in KL; blends far beyond what was trained would hide the rest."""
    kls, heights = ([v for v in side if v > 0] for side in zip(*solid, strict=True))
    panel.set_xscale("log")
    if kls:
        panel.set_xlim(min(kls) / 1.5, max(kls) * 2)
    sides = [panel.xaxis]
    if name == "gain" and heights:
        # Gain grows as the root of KL: equally good methods lie on one straight line here.
        panel.set_yscale("log", nonpositive="clip")
        panel.set_ylim(min(heights) / 1.5, max(heights) * 2)
        sides.append(panel.yaxis)
    for side in sides:
        side.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        side.set_major_formatter(plotting.PLAIN)
        side.set_minor_formatter(NullFormatter())
    if name != "gain":
        panel.set_ylim(min(panel.get_ylim()[0], 0.45), 1.04)


def learning(rows: pd.DataFrame) -> Picture:
    names = ("accuracy", "gain", "kl")
    figure, panels = plotting.panels_of(3, size=(15, 4.4))
    at_full = (rows["label"] == "trained") | rows["label"].str.startswith("step")
    rows = rows[at_full & (rows["noise"] == 0) & rows["usual"]].sort_values("step")
    # What has no checkpoints would be a straight line between others' curves.
    most = rows["method"].value_counts().max()
    by_method = {method: rows[rows["method"] == method] for method in METHODS}
    for panel, name in zip(panels, names, strict=True):
        for method, own in by_method.items():
            if len(own) < most:
                continue
            start = 0.5 if name == "accuracy" else 0.0
            y, steps = np.array([[start] * 3, *own[name]]), [0, *own["step"]]
            colour = METHODS[method].colour
            panel.plot(steps, y[:, 0], "o-", color=colour, label=TITLES[method], markersize=3)
            panel.fill_between(steps, y[:, 1], y[:, 2], color=colour, alpha=0.12, linewidth=0)
        panel.set_xlabel("updates")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        _title(panel, name)
    return figure, panels[0], "checkpoints of one training each"


def noise(rows: pd.DataFrame) -> Picture:
    """At the same forgetting too, a small one: noise makes the trained policies' steps smaller."""
    noisy = set(rows["variant"][rows["noise"] > 0])
    at_kl = [name for name in rows if name.startswith("gain at ")][:1]
    names = ["accuracy", "gain", "kl", *at_kl]
    figure, panels = plotting.panels_of(len(names), size=(4.4 * len(names), 4.4))
    trained = rows[rows["label"] == "trained"].sort_values("noise")
    for panel, name in zip(panels, names, strict=True):
        for place, variant in enumerate(method for method in METHODS if method in noisy):
            shown = trained[trained["variant"] == variant].dropna(subset=[name])
            if not shown.empty:
                # A little beside each other, so that the intervals can be told apart.
                x, y = 100 * shown["noise"] + 0.4 * place, np.stack(list(shown[name]))
                _errorbar(panel, x, y, METHODS[variant].colour, TITLES[variant], capsize=3)
        panel.set_xlabel("training pairs flipped, %")
        _title(panel, name)
    return figure, panels[0], "label noise"


def _title(panel: Axes, name: str) -> None:
    text = LABELS.get(name, name.replace("gain at", "gain where KL is"))
    if name.startswith("wins "):
        text = f"answers better than the base's, share ({name.removeprefix('wins ')})"
    plotting.title(panel, text)
    panel.grid(visible=False, which="minor")
