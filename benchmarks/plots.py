"""Draws the plots of docs/ from the committed results, for `python -m benchmarks report`."""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

# Ours first, on top and thicker. The colours are told apart without colour vision.
STYLES: dict[str, dict[str, Any]] = {
    "qadapter": {"color": "#0072b2", "marker": "o", "linewidth": 2.4, "zorder": 3},
    "compile": {"color": "#d55e00", "marker": "s"},
    "eager": {"color": "#767676", "marker": "^"},
    "products": {"color": "black", "linestyle": ":", "marker": ""},
}
LABELS = {
    "compile": "torch.compile",
    "eager": "eager PyTorch",
    "products": "its three matrix products alone",
}
SWEEPS = {
    "rows": ("n", "rows (tokens of responses)"),
    "vocab": ("v", "vocabulary"),
    "hidden": ("d", "hidden size"),
    "threads": ("threads", "threads"),
}


def _thousands(value: float) -> str:
    return f"{value / 1024:.0f}k" if value >= 1024 and value % 1024 == 0 else f"{value:g}"


def _curve(rows: list[dict[str, Any]], x: str, what: str) -> tuple[list[int], list[float]]:
    points = []
    for row in rows:
        value = row.get("ms", {}).get("median") if what == "ms" else row.get(what)
        if value is not None:
            points.append((row[x], value))
    points.sort()
    return [p[0] for p in points], [p[1] for p in points]


def draw(record: dict[str, Any], sweep: str, path: Path) -> None:
    """Time and peak memory side by side, both axes logarithmic."""
    x, label = SWEEPS[sweep]
    rows = [row for row in record["rows"] if row["sweep"] == sweep]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = (("ms", "milliseconds"), ("peak_mib", "MiB added at the peak"))
    for axis, (what, title) in zip(figure.subplots(1, 2), panels, strict=True):
        for who, style in STYLES.items():
            xs, ys = _curve([row for row in rows if row["who"] == who], x, what)
            if xs:
                axis.plot(xs, ys, label=LABELS.get(who, who), markersize=5, **style)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        ticks = sorted({row[x] for row in rows})
        axis.set_xticks(ticks, [_thousands(tick) for tick in ticks])
        axis.set_xlabel(label)
        axis.set_title(title, fontsize=11)
        axis.grid(alpha=0.3, which="both")
    # Below the panels: curves may go anywhere.
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, loc="outside lower center", ncols=4)
    machine, first = record["environment"], rows[0]
    varied = [(n, first[n]) for n in ("n", "v", "d") if n != x]
    fixed = ", ".join(f"{name.upper()} = {value:,}" for name, value in varied)
    threads = "" if sweep == "threads" else f", {machine['threads']} threads"
    device = machine.get("gpu") or machine["cpu"] + threads
    figure.suptitle(
        f"Loss and gradient from hidden states, {fixed}, {first['dtype']}\n"
        f"{device}, torch {machine['torch']}, {machine['date'][:10]}",
        fontsize=10,
    )
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=140)


STEP_STYLES: dict[str, dict[str, Any]] = {
    "ours": STYLES["qadapter"],
    "cached": {"color": "#009e73", "marker": "D", "linewidth": 2.4, "zorder": 3},
    "released": {"color": "#d55e00", "marker": "s"},
}
STEP_LABELS = {
    "ours": "qadapter",
    "cached": "qadapter, base cached",
    "released": "released way (float32 logits)",
}


def draw_step(record: dict[str, Any], path: Path) -> None:
    """A training step by the length of the responses."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    lengths = [row["length"] for row in record["rows"]]
    panels = (("ms", "seconds"), ("peak MiB", "MiB added at the peak"))
    for axis, (what, title) in zip(figure.subplots(1, 2), panels, strict=True):
        for way, style in STEP_STYLES.items():
            values = [row[f"{way} {what}"] for row in record["rows"]]
            ys = [v["median"] / 1e3 if isinstance(v, dict) else v for v in values]
            axis.plot(lengths, ys, label=STEP_LABELS[way], markersize=5, **style)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_xticks(lengths, [_thousands(length) for length in lengths])
        axis.set_xlabel("tokens of each response")
        axis.set_title(title, fontsize=11)
        axis.grid(alpha=0.3, which="both")
    figure.axes[0].legend(frameon=False, fontsize=9, loc="upper left")
    machine = record["environment"]
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    figure.suptitle(
        f"A training step on one pair, {record['model']}, no padding\n"
        f"{device}, torch {machine['torch']}, {machine['date'][:10]}",
        fontsize=10,
    )
    figure.savefig(path, dpi=140)


def draw_curves(record: dict[str, Any], path: Path) -> None:
    """The loss of the default step and of the logits path, over the same updates."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    axes = figure.subplots(1, len(record["runs"]))
    for axis, (dtype, run) in zip(axes, record["runs"].items(), strict=True):
        updates = range(1, len(run["default"]) + 1)
        axis.plot(updates, run["logits"], label="logits path", color="#d55e00", linewidth=3.2)
        axis.plot(updates, run["default"], label="default", color="#0072b2", linewidth=1.4)
        pairs = zip(run["default"], run["logits"], strict=True)
        largest = max(abs(a - b) / b for a, b in pairs)
        axis.set_title(f"{dtype}: largest relative difference {largest:.1e}", fontsize=11)
        axis.set_xlabel("update")
        axis.set_ylabel("loss")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=9)
    machine = record["environment"]
    figure.suptitle(
        f"{record['model']}, LoRA, one seed; {machine['cpu']}, torch {machine['torch']}, "
        f"{machine['date'][:10]}",
        fontsize=10,
    )
    figure.savefig(path, dpi=140)


DECODE_COLOURS = {
    "two streams": "#0072b2",
    "one stream": "#56b4e9",
    "two adapters": "#009e73",
    "naive": "#d55e00",
}


def draw_decode(record: dict[str, Any], path: Path) -> None:
    """Time per token of everybody, one panel a batch, in the case that all ways took part in."""
    first = record["rows"][0]
    rows = [row for row in record["rows"] if "ms" in row]
    rows = [row for row in rows if (row["mode"], row["lora"]) == (first["mode"], first["lora"])]
    batches = sorted({row["batch"] for row in rows})
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    panels = figure.subplots(1, len(batches), squeeze=False)[0]
    for axis, batch in zip(panels, batches, strict=True):
        bars = {row["who"]: row["ms"] for row in rows if row["batch"] == batch}
        medians = [timing["median"] for timing in bars.values()]
        spread = [
            [max(0.0, t["median"] - t["p20"]) for t in bars.values()],
            [max(0.0, t["p80"] - t["median"]) for t in bars.values()],
        ]
        colours = [DECODE_COLOURS.get(who, "#767676") for who in bars]
        axis.barh(list(bars), medians, xerr=spread, color=colours, ecolor="#303030", height=0.65)
        if "base" in bars:
            axis.axvline(bars["base"]["median"], color="black", linestyle=":", linewidth=1)
        axis.invert_yaxis()
        axis.set_xlabel("milliseconds a token (median, p20 to p80)")
        axis.set_title(f"batch {batch}", fontsize=11)
        axis.grid(alpha=0.3, axis="x")
    machine = record["environment"]
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    figure.suptitle(
        f"Decoding, {first['model']}, {record['dtype']}, {first['mode']}, two streams at strength "
        f"{record['strength']}\n{device}, torch {machine['torch']}, {machine['date'][:10]}",
        fontsize=10,
    )
    figure.savefig(path, dpi=140)


SAMPLE_STYLES: dict[str, tuple[str, str]] = {  # label, colour
    "qadapter cpp": ("qadapter", "#0072b2"),
    "qadapter triton": ("qadapter", "#0072b2"),
    "eager": ("plain PyTorch", "#767676"),
    "transformers": ("transformers' processors", "#d55e00"),
    "compile": ("these compiled", "#e69f00"),
    "FlashInfer": ("FlashInfer", "#009e73"),
}


def draw_sample(record: dict[str, Any], path: Path) -> None:
    """Time of one draw by filter, two tensors of the first dtype; a panel a shape."""
    first = record["rows"][0]
    same = ("dtype", "streams", "logits")
    rows = [row for row in record["rows"] if "ms" in row]
    rows = [row for row in rows if all(row[name] == first[name] for name in same)]
    shapes = sorted({(row["v"], row["b"]) for row in rows})
    filters = list(dict.fromkeys(row["filters"] for row in rows))
    present = [who for who in SAMPLE_STYLES if any(row["who"] == who for row in rows)]
    width = 0.8 / max(1, len(present))
    figure = Figure(figsize=(10, 2.7 * len(shapes)), layout="constrained")
    panels = figure.subplots(len(shapes), 1, squeeze=False, sharex=True)[:, 0]
    for axis, (v, b) in zip(panels, shapes, strict=True):
        part = [row for row in rows if (row["v"], row["b"]) == (v, b)]
        for i, who in enumerate(present):
            times = {row["filters"]: row["ms"]["median"] for row in part if row["who"] == who}
            places = [filters.index(name) + (i + 0.5) * width - 0.4 for name in times]
            label, colour = SAMPLE_STYLES[who]
            axis.bar(places, list(times.values()), width, label=label, color=colour)
        read = sum(row["ms"]["median"] * row["share_of_read"] for row in part) / len(part)
        axis.axhline(read, color="black", linestyle=":", linewidth=1, label="a bare read")
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.set_ylabel("milliseconds")
        axis.set_title(f"B = {b}, V = {v:,}", fontsize=11)
        axis.grid(alpha=0.3, axis="y")
    panels[-1].set_xticks(range(len(filters)), filters)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9
    )
    machine = record["environment"]
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    figure.suptitle(
        f"A token per row from the logits of two streams, {first['dtype']}\n"
        f"{device}, torch {machine['torch']}, {machine['date'][:10]}",
        fontsize=10,
    )
    figure.savefig(path, dpi=140)


CONTEXT_STYLES: dict[str, dict[str, Any]] = {
    **STEP_STYLES,
    "TRL DPO": {"color": "#e69f00", "marker": "v"},
}


def draw_context(record: dict[str, Any], path: Path) -> None:
    """The peaks that were measured by length; where they cross a budget is what fits in it."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axis = figure.subplots()
    rows = record["rows"]
    for who, style in CONTEXT_STYLES.items():
        peaks: dict[int, float] = {}
        for row in rows:
            if row["who"] == who:
                peaks |= {int(length): mib for length, mib in row["peaks"].items()}
        if peaks:
            lengths = sorted(peaks)
            label = STEP_LABELS.get(who, f"{who} (another objective)")
            axis.plot(lengths, [peaks[n] for n in lengths], label=label, markersize=5, **style)
    for budget in sorted({row["budget_mib"] for row in rows}):
        axis.axhline(budget, color="black", linestyle=":", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    for each in (axis.xaxis, axis.yaxis):
        each.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_xlabel("tokens of each response")
    axis.set_ylabel("MiB added at the peak")
    axis.grid(alpha=0.3, which="both")
    axis.legend(frameon=False, fontsize=9)
    machine = record["environment"]
    device = machine.get("gpu") or machine["cpu"]
    figure.suptitle(
        f"Peak of a training step on one pair, {record['model']}; dotted: budgets\n"
        f"{device}, torch {machine['torch']}, {machine['date'][:10]}",
        fontsize=10,
    )
    figure.savefig(path, dpi=140)


def main() -> None:
    for name, draw_one in (
        ("decode", draw_decode),
        ("sample", draw_sample),
        ("context", draw_context),
    ):
        for result in sorted(RESULTS.glob(f"{name}-*.json")):
            device = result.stem.removeprefix(f"{name}-")
            suffix = "" if device == "cpu" else f"-{device}"
            draw_one(json.loads(result.read_text()), ROOT / "docs" / f"{name}{suffix}.png")
    for result in sorted(RESULTS.glob("loss_curves-cpu.json")):
        draw_curves(json.loads(result.read_text()), ROOT / "docs" / "curves.png")
    for result in sorted(RESULTS.glob("train_step_scaling-*.json")):
        device = result.stem.removeprefix("train_step_scaling-")
        suffix = "" if device == "cpu" else f"-{device}"
        draw_step(json.loads(result.read_text()), ROOT / "docs" / f"step-by-length{suffix}.png")
    for result in sorted(RESULTS.glob("linear_scaling-*.json")):
        record = json.loads(result.read_text())
        device = result.stem.removeprefix("linear_scaling-")
        suffix = "" if device == "cpu" else f"-{device}"
        measured = {row["sweep"] for row in record["rows"]}
        for sweep in SWEEPS:
            if sweep in measured:
                draw(record, sweep, ROOT / "docs" / f"memory-and-time-{sweep}{suffix}.png")


if __name__ == "__main__":
    main()
