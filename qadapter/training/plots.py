"""Plots of a training run; matplotlib is optional."""

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
