"""Plots of a training run and of strengths; matplotlib is optional."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qadapter.files import replacing_file


def plot_training(
    log_history: Sequence[dict[str, Any]], path: str | Path, title: str = ""
) -> Path | None:
    """Margin, accuracy and KL(base || policy) over updates, from a Trainer's log history.

    Returns the path, or None without matplotlib or with fewer than two logged points.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    train = [log for log in log_history if "rewards/margins" in log]
    held_out = [log for log in log_history if "eval_rewards/margins" in log]
    if len(train) < 2:
        return None
    panels = (
        ("rewards/margins", "reward margin", "tab:blue"),
        ("rewards/accuracies", "preference accuracy", "tab:green"),
        ("kl", "KL(base || policy), nats per token", "tab:red"),
    )
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axis, (name, label, colour) in zip(figure.subplots(1, 3), panels, strict=True):
        # A step whose base comes from a cache has no KL; evaluations have.
        points = [(r["step"], r[name]) for r in train if name in r]
        if points:
            axis.plot(*zip(*points, strict=True), color=colour, label="train")
        points = [(r["step"], r[f"eval_{name}"]) for r in held_out if f"eval_{name}" in r]
        if points:
            axis.plot(*zip(*points, strict=True), "k--o", markersize=4, label="held out")
        if not axis.lines:
            axis.text(0.5, 0.5, "not logged", ha="center", transform=axis.transAxes)
        axis.set_xlabel("update")
        axis.set_title(label, fontsize=10)
        axis.grid(alpha=0.3)
    figure.axes[0].legend(frameon=False)
    if title:
        figure.suptitle(title, fontsize=11)
    with replacing_file(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return Path(path)


def plot_strengths(
    points: Sequence[dict[str, Any]],
    path: str | Path,
    kl_on: str,
    recommended: float | None = None,
    budget: float | None = None,
) -> None:
    """Preference against KL, of points as `qadapter.training.frontier.table` takes them.

    Raises:
        ImportError: without matplotlib.
    """
    import numpy as np
    from matplotlib.figure import Figure

    kl = [point["kl_base_policy"] for point in points]
    ends = [
        [max(0.0, k - p["kl_low"]) for k, p in zip(kl, points, strict=True)],
        [max(0.0, p["kl_high"] - k) for k, p in zip(kl, points, strict=True)],
    ]
    panels = (
        ("accuracy", "pairs whose chosen response is the likelier a token, share"),
        ("gain", "gain of chosen over rejected, nats a pair"),
    )
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axis, (name, label) in zip(figure.subplots(1, 2), panels, strict=True):
        axis.errorbar(kl, [p[name] for p in points], xerr=ends, fmt="o-", capsize=2)
        for point, x in zip(points, kl, strict=True):
            axis.annotate(
                f"{point['strength']:.3g}",
                (x, point[name]),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
            if point["strength"] == recommended:
                axis.plot(x, point[name], "r*", markersize=13, label="recommended strength")
        if budget is not None:
            axis.axvline(budget, color="grey", linestyle="--", label=f"budget {budget:g}")
        # KL grows with the square of a small strength.
        axis.set_xscale("function", functions=(_root, np.square))
        axis.set_xlim(0, 1.1 * max(*(p["kl_high"] for p in points), budget or 0.0, 1e-6))
        axis.margins(y=0.12)
        axis.set_xlabel(f"KL(base || policy) on {kl_on}, nats a token")
        axis.set_title(label, fontsize=10)
        axis.grid(alpha=0.3)
    if figure.axes[0].get_legend_handles_labels()[0]:
        figure.axes[0].legend(frameon=False)
    figure.suptitle("Preference against KL; the numbers are strengths", fontsize=11)
    with replacing_file(path) as temporary:
        figure.savefig(temporary, dpi=150)


def _root(x: Any) -> Any:
    import numpy as np

    return np.sqrt(np.maximum(x, 0.0))
