"""The pictures: preference against forgetting, learning curves, noise."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from benchmarks import plotting
from benchmarks.quality.settings import TITLES
from benchmarks.tables import Record, Row

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


def label_of(name: str) -> str:
    if name.startswith("wins "):
        return f"answers better than the base's, share ({name.removeprefix('wins ')})"
    return LABELS[name]


def draw(record: Record, folder: Path, stem: str) -> list[Path]:
    """<stem>-frontier.png, -learning.png and, where there is noise, -noise.png."""
    pictures = {"frontier": frontier(record), "learning": learning(record), "noise": noise(record)}
    written = []
    for name, figure in pictures.items():
        if figure is not None:
            written.append(folder / f"{stem}-{name}.png")
            plotting.save(figure, written[-1])
    return written


class Curve(NamedTuple):
    """``points``: what stands beside a point, and its row."""

    method: str
    label: str
    points: list[tuple[str, Row]]
    style: str = "-"


def _blends(rows: list[Row], changes: dict[str, Any]) -> list[Row]:
    """One LoRA at all its strengths."""
    own = [r for r in rows if r["changes"] == changes and not r["label"].startswith("step")]
    return sorted(own, key=lambda row: row["blend"][0])


def curves(record: Record) -> Iterator[Curve]:
    """Q-Adapter's strength when sampling, DPO's beta, SFT's updates, the trained point of the
    others.

    Dotted: what the same blending with the base does to the other methods' LoRAs; dashed, to those
    that were trained at another learning rate.
    """
    for method in COLOURS:
        rows = [r for r in record["rows"] if r["noise"] == 0 and r["method"] == method]
        trained = [row for row in rows if row["label"] == "trained"]
        usual = [row for row in trained if not row["changes"]]
        if not usual:
            continue
        name, blends = TITLES[method], _blends(rows, {})
        if method == "qadapter":
            points = [(f"{row['blend'][0]:g}", row) for row in blends]
            yield Curve(method, f"{name}, strength", points)
            continue
        if method == "dpo_own":
            betas = [(row["changes"].get("beta", 0.1), row) for row in trained]
            betas = [(beta, row) for beta, row in betas if row["changes"].keys() <= {"beta"}]
            betas.sort(key=lambda pair: pair[0], reverse=True)
            yield Curve(method, f"{name}, beta", [(f"{beta:g}", row) for beta, row in betas])
        elif method == "sft":
            steps = [r for r in rows if r["label"].startswith("step") and not r["changes"]]
            steps = sorted([*steps, *usual], key=lambda row: row["step"])
            yield Curve(method, f"{name}, updates", [(str(r["step"]), r) for r in steps])
        else:
            yield Curve(method, name, [("", usual[0])])
        yield Curve(method, "", [("", row) for row in blends], ":")
        for row in trained:
            if (rate := row["changes"].get("learning_rate")) is not None:
                points = [("", blend) for blend in _blends(rows, row["changes"])]
                yield Curve(method, f"{name}, learning rate {rate:g}, strength", points, "--")


def frontier(record: Record) -> Figure:
    judges = [f"wins {judge['judge']}" for judge in record["judge_figures"]]
    names = ["accuracy", "gain", *judges, "follows", "questions"]
    names = [n for n in names if any(n in row["figures"] for row in record["rows"])]
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure, panels = plotting.panels_of(columns, lines, (5 * columns, 4 * lines + 0.6))
    for panel, name in zip(panels, names, strict=False):
        _frontier(panel, name, curves(record))
    for panel in panels[len(names) :]:
        panel.remove()
    text = (
        "preference against forgetting; to the upper left is better. Dotted: other methods blended "
        "with the base"
    )
    _finish(record, figure, panels[0], text)
    return figure


def _frontier(panel: Axes, name: str, drawn: Iterable[Curve]) -> None:
    solid: list[tuple[float, float]] = []
    for method, label, points, style in drawn:
        shown = [(text, row["figures"]) for text, row in points if name in row["figures"]]
        if not shown or (style != "-" and len(shown) < 2):
            continue
        x = [figures["kl"][0] for _, figures in shown]
        y = np.array([figures[name][:3] for _, figures in shown])
        colour = COLOURS[method]
        if style != "-":
            panel.plot(x, y[:, 0], style, color=colour, linewidth=1, label=label or None)
            continue
        _errorbar(panel, x, y, colour, label, capsize=2, markersize=4, elinewidth=0.6)
        for (text, _), at in zip(shown, zip(x, y[:, 0], strict=True), strict=True):
            solid.append(at)
            panel.annotate(
                text, at, xytext=(3, 5), textcoords="offset points", fontsize=7, color=colour
            )
    _scales(panel, solid, name)
    panel.set_xlabel(LABELS["kl"], fontsize=9)
    _title(panel, label_of(name))


def _errorbar(panel: Axes, x: Any, y: Any, colour: str, label: str, **style: Any) -> None:
    """y is [points, (mean, low, high)]."""
    error = np.abs(y[:, 1:] - y[:, :1]).T
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


def learning(record: Record) -> Figure:
    names = ("accuracy", "gain", "kl")
    figure, panels = plotting.panels_of(3, size=(15, 4.4))
    by_method: dict[str, list[Row]] = {method: [] for method in COLOURS}
    for row in sorted(record["rows"], key=lambda row: row["step"]):
        at_full = row["label"] == "trained" or row["label"].startswith("step")
        if at_full and row["noise"] == 0 and not row["changes"]:
            by_method[row["method"]].append(row)
    # What has no checkpoints would be a straight line between others' curves.
    most = max(map(len, by_method.values()))
    for panel, name in zip(panels, names, strict=True):
        for method, rows in by_method.items():
            if not rows or len(rows) < most:
                continue
            start = 0.5 if name == "accuracy" else 0.0
            y = np.array([[start] * 3, *(row["figures"][name] for row in rows)])
            steps, colour = [0, *(row["step"] for row in rows)], COLOURS[method]
            panel.plot(steps, y[:, 0], "o-", color=colour, label=TITLES[method], markersize=3)
            panel.fill_between(steps, y[:, 1], y[:, 2], color=colour, alpha=0.12, linewidth=0)
        panel.set_xlabel("updates")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        _title(panel, label_of(name))
    _finish(record, figure, panels[0], "checkpoints of one training each")
    return figure


def noise(record: Record) -> Figure | None:
    """None without noisy runs."""
    noisy = {row["variant"] for row in record["rows"] if row["noise"] > 0}
    if not noisy:
        return None
    # At the same forgetting too, a small one: noise makes the trained policies' steps smaller.
    kl = min(row["kl"] for row in record["matched"])
    trained = [row for row in record["rows"] if row["label"] == "trained"]
    matched = [row for row in record["matched"] if row["kl"] == kl and row["figures"]]
    drawn = [(name, label_of(name), trained) for name in ("accuracy", "gain", "kl")]
    drawn.append(("gain", f"gain where KL is {kl:g}", matched))
    figure, panels = plotting.panels_of(4, size=(17.6, 4.4))
    for panel, (name, text, rows) in zip(panels, drawn, strict=True):
        for place, variant in enumerate(v for v in COLOURS if v in noisy):
            shown = [r for r in rows if r["variant"] == variant and name in r["figures"]]
            shown.sort(key=lambda row: row["noise"])
            if shown:
                # A little beside each other, so that the intervals can be told apart.
                x = [100 * row["noise"] + 0.4 * place for row in shown]
                y = np.array([row["figures"][name][:3] for row in shown])
                _errorbar(panel, x, y, COLOURS[variant], TITLES[variant], capsize=3)
        panel.set_xlabel("training pairs flipped, %")
        _title(panel, text)
    _finish(record, figure, panels[0], "label noise")
    return figure


def _title(panel: Axes, text: str) -> None:
    plotting.title(panel, text)
    panel.grid(visible=False, which="minor")


def _finish(record: Record, figure: Figure, panel: Axes, text: str) -> None:
    plotting.legend_below(figure, panel)
    figure.suptitle(f"{record['data']['name']}: {text}", fontsize=plotting.MIDDLE)
