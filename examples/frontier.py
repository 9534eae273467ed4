"""Preference against forgetting as strength varies: one trained adapter, a whole frontier.

    qadapter demo && python examples/frontier.py
    python examples/frontier.py --adapter out --data held-out.jsonl --strength 0 0.5 1 2 4

At every strength s (alpha_0 = alpha_tilde = 1/s, the policy pi ~ pi_base exp(s Q)):

    gain        how far the policy moved towards the chosen responses, nats a pair: the mean of
                log pi(chosen)/pi(rejected) - log pi_base(chosen)/pi_base(rejected)
    accuracy    share of pairs whose chosen response is the likelier one a token
    follows     share of greedy answers that keep the demo's rule (the demo's pairs, or --rule)
    forgetting  KL(base || policy) on unrelated text, nats a token

Writes frontier.json, after every strength, and frontier.png. Started again with the same settings,
it goes on, or adds strengths to those that are there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from tqdm.auto import tqdm

from qadapter import QAdapterModel, files
from qadapter.cli import sampling
from qadapter.cli.demo_rule import follows
from qadapter.cli.partial import adapter_hash
from qadapter.text.answers import answer
from qadapter.text.data import load_preference_data
from qadapter.text.prompts import checked_strength, prompt_ids
from qadapter.training import evaluation

STRENGTHS = [0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0]
AT_A_TIME = 12


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapter", default="demo-output/adapter", help="default: %(default)s")
    parser.add_argument("--base-model", help="where the base is, if not where it was at training")
    parser.add_argument("--data", help="held-out pairs; default, the demo's, with its rule")
    parser.add_argument("--unrelated", help="text to forget; default, comes with the package")
    parser.add_argument("--rule", action="store_true", help="check answers to --data by the rule")
    parser.add_argument("--strength", type=float, nargs="+", default=STRENGTHS)
    parser.add_argument("--output", default="frontier-output", help="default: %(default)s")
    parser.add_argument("--max-examples", type=int, help="use the first so many of each file")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--max-new-tokens", type=int, default=48, help="of the answers")
    parser.add_argument("--dtype", default="auto")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    try:
        run(options)
    except (ValueError, OSError) as error:
        print(f"frontier: error: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    datasets.disable_progress_bars()
    wanted = sorted({checked_strength(s, "--strength") for s in options.strength})
    folder = sampling.checked_folder(options.adapter)
    data = load_preference_data(options.data or evaluation.DEMO_DATA / "heldout.jsonl", "test")
    unrelated = evaluation.load_unrelated(options.unrelated)
    if options.max_examples is not None:
        data, unrelated = (
            rows.select(range(min(options.max_examples, len(rows)))) for rows in (data, unrelated)
        )
    path = Path(options.output) / "frontier.json"
    names = ("data", "unrelated", "max_examples", "max_length", "max_new_tokens", "dtype")
    settings = {name: getattr(options, name) for name in names}
    settings |= {"rule": options.rule or options.data is None}
    settings |= {"adapter_sha256": adapter_hash(Path(folder))}
    points = _points(path, settings)
    missing = [s for s in wanted if s not in points]
    if missing:
        model, tokenizer = sampling.load({"": folder}, options.base_model, options.dtype)
        with tqdm(total=3 * len(missing)) as progress:
            for strength in missing:
                progress.set_description(f"strength {strength:g}")
                points[strength] = _point(
                    model, tokenizer, data, unrelated, strength, settings, progress
                )
                _write(path, settings, points)
    shown = [points[s] for s in wanted]
    print(_table(shown))
    plot = _plot(shown, path.with_suffix(".png"))
    print(f"figures {path}, plot {plot or '(needs matplotlib)'}")
    return {"settings": settings, "points": shown}


def _points(path: Path, settings: dict[str, Any]) -> dict[float, dict[str, Any]]:
    """Those that an earlier run with the same settings made."""
    if not path.exists():
        return {}
    found = files.read_json(path)
    then = found.get("settings", {})
    changed = [name for name, value in settings.items() if then.get(name) != value]
    if changed:
        raise ValueError(
            f"{path} was made with other settings ({', '.join(changed)}): give another --output, "
            "or delete it"
        )
    return {point["strength"]: point for point in found["points"]}


def _write(path: Path, settings: dict[str, Any], points: dict[float, dict[str, Any]]) -> None:
    content = {"settings": settings, "points": [points[s] for s in sorted(points)]}
    files.write_json(path, content)


@contextmanager
def _at(model: QAdapterModel, strength: float) -> Iterator[None]:
    """The values of a strength, and gamma 1, with which rewards add up to log-ratios."""
    trained = (model.alpha_0, model.alpha_tilde, model.center), model.gamma
    model.set_composition(1 / strength, 1 / strength, model.center)
    model.gamma = 1.0
    try:
        yield
    finally:
        model.set_composition(*trained[0])
        model.gamma = trained[1]


def _point(
    model: QAdapterModel,
    tokenizer: Any,
    data: Any,
    unrelated: Any,
    strength: float,
    settings: dict[str, Any],
    progress: Any,
) -> dict[str, Any]:
    common = {"max_length": settings["max_length"], "progress": False}
    # The base has no alphas (1/0); what is taken of it does not depend on them.
    with _at(model, strength or 1.0):
        # The sum of rewards over a response is log(pi / pi_base) / strength + V(prompt).
        preference = evaluation.evaluate_preferences(
            model, tokenizer, data, length_norm="none", **common
        )
        progress.update()
        figures = {"kl_base_policy": 0.0, "delta_nll": 0.0}
        if strength > 0:
            figures = evaluation.evaluate_forgetting(model, tokenizer, unrelated, **common)
        progress.update()
    point = {
        "strength": strength,
        "pairs": preference["pairs"],
        "gain": strength * preference["mean_margin"],
        "accuracy": preference["accuracy_base" if strength == 0 else "accuracy_policy"],
        "kl_base_policy": figures["kl_base_policy"],
        "delta_nll": figures["delta_nll"],
    }
    if settings["rule"]:
        texts = _answers(model, tokenizer, list(data["prompt"]), strength, settings)
        point["follows"] = sum(map(follows, texts)) / len(texts)
    progress.update()
    return point


def _answers(
    model: QAdapterModel,
    tokenizer: Any,
    prompts: list[Any],
    strength: float,
    settings: dict[str, Any],
) -> list[str]:
    """Greedy."""
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    new = {"max_new_tokens": settings["max_new_tokens"], "do_sample": False}
    return [
        made.text
        for i in range(0, len(ids), AT_A_TIME)
        for made in answer(model, tokenizer, ids[i : i + AT_A_TIME], strength=strength, **new)
    ]


def _table(points: list[dict[str, Any]]) -> str:
    lines = ["strength   follows   accuracy   gain, nats a pair   KL(base || policy), nats a token"]
    for p in points:
        rule = f"{p['follows']:9.0%}" if "follows" in p else "         "
        lines.append(
            f"{p['strength']:8g} {rule} {p['accuracy']:10.3f} {p['gain']:19.3f} "
            f"{p['kl_base_policy']:34.4f}"
        )
    return "\n".join(lines)


def _plot(points: list[dict[str, Any]], path: Path) -> Path | None:
    """The share that follows, or the accuracy, and the gain over forgetting; needs matplotlib."""
    try:
        import numpy as np
        from matplotlib.figure import Figure
    except ImportError:
        return None
    forgetting = [p["kl_base_policy"] for p in points]
    share = ("follows", "answers that keep the rule, share")
    if "follows" not in points[0]:
        share = ("accuracy", "pairs whose chosen response is the likelier a token, share")
    panels = (share, ("gain", "gain of chosen over rejected, nats a pair"))
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axis, (name, label) in zip(figure.subplots(1, 2), panels, strict=True):
        axis.plot(forgetting, [p[name] for p in points], "o-")
        for point in points:
            axis.annotate(
                f"{point['strength']:g}",
                (point["kl_base_policy"], point[name]),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
        # KL grows with the square of a small strength.
        axis.set_xscale("function", functions=(np.sqrt, np.square))
        axis.set_xlim(0, 1.1 * max(*forgetting, 1e-6))
        axis.margins(y=0.12)
        axis.set_xlabel("forgetting: KL(base || policy) on unrelated text, nats a token")
        axis.set_title(label, fontsize=10)
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylim(-0.05, 1.1)
    figure.suptitle("Preference against forgetting; the numbers are strengths", fontsize=11)
    with files.replacing_file(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return path


if __name__ == "__main__":
    sys.exit(main())
