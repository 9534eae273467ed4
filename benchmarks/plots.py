"""The plots of docs/ from the committed results, for `python -m benchmarks report`."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import plotting
from benchmarks.plotting import BLUE, GREEN, GREY, OURS, SKY, VERMILION, YELLOW
from benchmarks.tables import Record, frame

# Of curves: who (as in the results) -> label, style.
Styles = dict[str, tuple[str, dict[str, Any]]]
LOSSES: Styles = {
    "qadapter": ("qadapter", OURS),
    "compile": ("torch.compile", {"color": VERMILION, "marker": "s"}),
    "eager": ("eager PyTorch", {"color": GREY, "marker": "^"}),
    "products": (
        "its three matrix products alone",
        {"color": "black", "linestyle": ":", "marker": ""},
    ),
}
STEPS: Styles = {
    "ours": ("qadapter", OURS),
    "cached": ("qadapter, base cached", {**OURS, "color": GREEN, "marker": "D"}),
    "released": ("released way (float32 logits)", {"color": VERMILION, "marker": "s"}),
}
CONTEXTS: Styles = {
    **STEPS,
    "TRL DPO": ("TRL DPO (another objective)", {"color": YELLOW, "marker": "v"}),
}
SWEEPS = {
    "rows": ("n", "rows (tokens of responses)"),
    "vocab": ("v", "vocabulary"),
    "hidden": ("d", "hidden size"),
    "threads": ("threads", "threads"),
}


def _curves(panel: Axes, styles: Styles, points: dict[str, tuple[Any, Any]]) -> None:
    for who, (label, style) in styles.items():
        if who in points:
            panel.plot(*points[who], label=label, markersize=5, **style)


def scaling(record: Record, sweep: str) -> Figure | None:
    """Time and peak memory side by side, both axes logarithmic; None if nobody measured that."""
    x, label = SWEEPS[sweep]
    rows = frame(row for row in record["rows"] if row["sweep"] == sweep)
    if rows.empty:
        return None
    figure, panels = plotting.panels_of(2)
    fields = {"ms median": "milliseconds", "peak_mib": "MiB added at the peak"}
    for panel, (field, title) in zip(panels, fields.items(), strict=True):
        found = rows.dropna(subset=[field]).sort_values(x).groupby("who")
        _curves(panel, LOSSES, {who: (own[x], own[field]) for who, own in found})
        plotting.log_x(panel, label, rows[x])
        plotting.log_y(panel)
        plotting.title(panel, title)
    plotting.legend_below(figure, panels[0], columns=4)
    fixed = ", ".join(
        f"{name.upper()} = {rows[name][0]:,}" for name in ("n", "v", "d") if name != x
    )
    text = f"Loss and gradient from hidden states, {fixed}, {rows['dtype'][0]}"
    plotting.caption(figure, text, record, threads=sweep != "threads")
    return figure


def step(record: Record) -> Figure:
    """A training step by the length of the responses."""
    rows = frame(record["rows"])
    figure, panels = plotting.panels_of(2)
    fields = {"ms median": ("seconds", 1e-3), "peak MiB": ("MiB added at the peak", 1)}
    for panel, (field, (title, scale)) in zip(panels, fields.items(), strict=True):
        values = {way: (rows["length"], rows[f"{way} {field}"] * scale) for way in STEPS}
        _curves(panel, STEPS, values)
        plotting.log_x(panel, "tokens of each response", rows["length"])
        plotting.log_y(panel)
        plotting.title(panel, title)
    panels[0].legend(frameon=False, fontsize=plotting.SMALL, loc="upper left")
    text = f"A training step on one pair, {record['model']}, no padding"
    plotting.caption(figure, text, record)
    return figure


def context(record: Record) -> Figure:
    """The peaks that were measured by length; where they cross a budget is what fits in it."""
    figure, (panel,) = plotting.panels_of(1, size=(7, 4.2))
    points: dict[str, dict[int, float]] = {}
    for row in record["rows"]:
        measured = {int(length): mib for length, mib in row["peaks"].items()}
        points.setdefault(row["who"], {}).update(measured)
        panel.axhline(row["budget_mib"], color="black", linestyle=":", linewidth=1)
    series = {who: pd.Series(peaks).sort_index() for who, peaks in points.items()}
    _curves(panel, CONTEXTS, {who: (peaks.index, peaks) for who, peaks in series.items()})
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter(plotting.PLAIN)
    panel.set_xlabel("tokens of each response")
    panel.set_ylabel("MiB added at the peak")
    panel.grid(alpha=0.3, which="both")
    panel.legend(frameon=False, fontsize=plotting.SMALL)
    text = f"Peak of a training step on one pair, {record['model']}; dotted: budgets"
    plotting.caption(figure, text, record)
    return figure


def curves(record: Record) -> Figure:
    """The loss of the default step and of the logits path, over the same updates."""
    figure, panels = plotting.panels_of(len(record["runs"]), size=(10, 3.8))
    for panel, (dtype, run) in zip(panels, record["runs"].items(), strict=True):
        updates = range(1, len(run["default"]) + 1)
        panel.plot(updates, run["logits"], label="logits path", color=VERMILION, linewidth=3.2)
        panel.plot(updates, run["default"], label="default", color=BLUE, linewidth=1.4)
        pairs = zip(run["default"], run["logits"], strict=True)
        largest = max(abs(a - b) / b for a, b in pairs)
        plotting.title(panel, f"{dtype}: largest relative difference {largest:.1e}")
        panel.set_xlabel("update")
        panel.set_ylabel("loss")
        panel.legend(frameon=False, fontsize=plotting.SMALL)
    plotting.caption(figure, f"{record['model']}, LoRA, one seed", record)
    return figure


DECODERS = {"two streams": BLUE, "one stream": SKY, "two adapters": GREEN, "naive": VERMILION}


def decode(record: Record) -> Figure:
    """Time per token of everybody, one panel a batch, in the case that all ways took part in."""
    first, rows = record["rows"][0], frame(record["rows"])
    rows = rows[(rows["mode"] == first["mode"]) & (rows["lora"] == first["lora"])]
    batches = sorted(rows["batch"].unique())
    figure, panels = plotting.panels_of(len(batches), size=(10, 3.4))
    for panel, batch in zip(panels, batches, strict=True):
        bars = rows[rows["batch"] == batch].set_index("who")
        median = bars["ms median"]
        spread = [(median - bars["ms p20"]).clip(0), (bars["ms p80"] - median).clip(0)]
        colours = [DECODERS.get(who, GREY) for who in bars.index]
        panel.barh(
            bars.index, median, xerr=spread, color=colours, ecolor="#303030", height=0.65
        )  # fmt: skip
        if "base" in bars.index:
            panel.axvline(median["base"], color="black", linestyle=":", linewidth=1)
        panel.invert_yaxis()
        panel.set_xlabel("milliseconds a token (median, p20 to p80)")
        plotting.title(panel, f"batch {batch}", grid="x")
    text = (
        f"Decoding, {first['model']}, {record['dtype']}, {first['mode']}, two streams at strength "
        f"{record['strength']}"
    )
    plotting.caption(figure, text, record)
    return figure


SAMPLERS = {  # label, colour
    "qadapter cpp": ("qadapter", BLUE),
    "qadapter triton": ("qadapter", BLUE),
    "eager": ("plain PyTorch", GREY),
    "transformers": ("transformers' processors", VERMILION),
    "compile": ("these compiled", YELLOW),
    "FlashInfer": ("FlashInfer", GREEN),
}


def sample(record: Record) -> Figure:
    """Time of one draw by filter, two tensors of the first dtype; a panel a shape."""
    first, rows = record["rows"][0], frame(record["rows"])
    for name in ("dtype", "streams", "logits"):
        rows = rows[rows[name] == first[name]]
    filters = list(rows["filters"].unique())
    present = [who for who in SAMPLERS if (rows["who"] == who).any()]
    shapes = rows.groupby(["v", "b"])
    width = 0.8 / max(1, len(present))
    figure, panels = plotting.panels_of(1, len(shapes), (10, 2.7 * len(shapes)), sharex=True)
    for panel, ((v, b), part) in zip(panels, shapes, strict=True):
        for i, who in enumerate(present):
            own = part[part["who"] == who]
            places = [filters.index(name) + (i + 0.5) * width - 0.4 for name in own["filters"]]
            label, colour = SAMPLERS[who]
            panel.bar(places, own["ms median"], width, label=label, color=colour)
        read = (part["ms median"] * part["share_of_read"]).mean()
        panel.axhline(read, color="black", linestyle=":", linewidth=1, label="a bare read")
        plotting.log_y(panel, subs=None)
        panel.set_ylabel("milliseconds")
        plotting.title(panel, f"B = {b}, V = {v:,}", grid="y")
    panels[-1].set_xticks(range(len(filters)), filters)
    plotting.legend_below(figure, panels[0], columns=len(present) + 1)
    text = f"A token per row from the logits of two streams, {first['dtype']}"
    plotting.caption(figure, text, record)
    return figure


# file -> (results, plot)
PLOTS: dict[str, tuple[str, Callable[[Record], Figure | None]]] = {
    "decode": ("decode", decode),
    "sample": ("sample", sample),
    "context": ("context", context),
    "curves": ("loss_curves", curves),
    "step-by-length": ("train_step_scaling", step),
    **{
        f"memory-and-time-{sweep}": ("linear_scaling", partial(scaling, sweep=sweep))
        for sweep in SWEEPS
    },
}


def draw(results: Path, docs: Path) -> None:
    """All of them, those of other devices than the CPU with the device in the file's name."""
    for name, (benchmark, plot) in PLOTS.items():
        for path in sorted(results.glob(f"{benchmark}-*.json")):
            device = path.stem.removeprefix(f"{benchmark}-")
            figure = plot(json.loads(path.read_text(encoding="utf-8")))
            if figure is not None:
                suffix = "" if device == "cpu" else f"-{device}"
                plotting.save(figure, docs / f"{name}{suffix}.png")
