"""What all plots share: colours, axes, legend, caption, file.

figure, panels = panels_of(2)
log_x(panels[0], "tokens of a response", at=lengths)
caption(figure, "A training step", record)
save(figure, path)
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.tables import conditions
from qadapter import files

# They are told apart without colour vision. Ours is blue everywhere.
BLUE, SKY, GREEN, VERMILION, YELLOW, GREY = (
    "#0072b2", "#56b4e9", "#009e73", "#d55e00", "#e69f00", "#767676",
)  # fmt: skip
OURS: dict[str, Any] = {"color": BLUE, "marker": "o", "linewidth": 2.4, "zorder": 3}  # on top
SMALL, MIDDLE = 9, 11  # font sizes: legends, titles of panels
PLAIN = FuncFormatter(lambda value, _: f"{value:,g}")


def panels_of(
    columns: int, rows: int = 1, size: tuple[float, float] = (10, 4.2), **more: Any
) -> tuple[Figure, list[Axes]]:
    """A figure and its panels in reading order."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **more).flat)


def thousands(value: float) -> str:
    """4096 as 4k."""
    return f"{value / 1024:.0f}k" if value >= 1024 and value % 1024 == 0 else f"{value:g}"


def log_x(panel: Axes, label: str, at: Iterable[float]) -> None:
    """Powers of two, with a tick at each point measured."""
    ticks = sorted(set(at))
    panel.set_xscale("log", base=2)
    panel.set_xticks(ticks, [thousands(tick) for tick in ticks])
    panel.set_xlabel(label)


def log_y(panel: Axes, subs: tuple[float, ...] | None = (1, 2, 5)) -> None:
    """Plain numbers at the given multiples of powers of ten; None leaves the ticks alone."""
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter(PLAIN)
    if subs is not None:
        panel.yaxis.set_major_locator(LogLocator(subs=subs))
        panel.yaxis.set_minor_formatter(NullFormatter())


def title(panel: Axes, text: str, grid: str = "both") -> None:
    """And a light grid, in the direction of the values that are read off ("x", "y" or both)."""
    panel.set_title(text, fontsize=MIDDLE)
    panel.grid(alpha=0.3, which="both" if grid == "both" else "major", axis=grid)


def legend_below(figure: Figure, panel: Axes, columns: int = 6) -> None:
    """Of one panel for all; below them, as curves may go anywhere."""
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(
        handles, labels, frameon=False, fontsize=SMALL, loc="outside lower center",
        ncols=min(columns, len(labels)),
    )  # fmt: skip


def caption(figure: Figure, text: str, record: dict[str, Any], threads: bool = True) -> None:
    """What is shown and, in a line below, on which machine it was measured."""
    figure.suptitle(f"{text}\n{conditions(record, threads)}", fontsize=10)


def save(figure: Figure, path: Path) -> None:
    """As PNG, whole or not at all."""
    with files.replacing_file(path) as temporary:
        figure.savefig(temporary, dpi=140, format="png")
