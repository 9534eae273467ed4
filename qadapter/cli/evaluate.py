"""``qadapter eval``: preference accuracy on held-out pairs, and forgetting on unrelated text."""

import argparse
import sys
from pathlib import Path
from typing import Any

from qadapter.cli import sampling

PLOTS = (".png", ".svg", ".pdf")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "eval", help="preference accuracy on held-out pairs, and forgetting on unrelated text"
    )
    parser.add_argument("--adapter", required=True, help="folder of a saved adapter")
    parser.add_argument("--base-model", help="where the base is, if not where it was at training")
    parser.add_argument(
        "--data", required=True, nargs="+", help="held-out pairs: files, a glob, a folder, a Hub id"
    )
    parser.add_argument(
        "--split", default="test", help="split of a Hub data set, or a slice: test[:1%%]"
    )
    parser.add_argument("--data-config", help="configuration of a Hub data set")
    parser.add_argument(
        "--columns",
        nargs="+",
        metavar="NAME=COLUMN",
        help="columns of other names, such as prompt=question",
    )
    parser.add_argument(
        "--skip-bad-rows",
        action="store_true",
        help="drop and count rows that cannot be used, instead of an error",
    )
    parser.add_argument(
        "--unrelated",
        help="pairs whose chosen responses are text that has nothing to do with the preference; "
        "default, general questions that come with the package",
    )
    parser.add_argument(
        "--anchors",
        metavar="FILE",
        help="texts on which KL to the base is measured, with its interval: what qadapter anchors "
        "made, or any conversations or texts; default, the held-out tenth of the adapter's own",
    )
    parser.add_argument(
        "--strength",
        type=sampling.strength_option,
        help="evaluate at this strength: a number above 0, or recommended, what training with "
        "--kl-budget found; default, as trained",
    )
    parser.add_argument("--json", help="write the report there too")
    parser.add_argument(
        "--plot",
        metavar="FILE.png",
        help="draw preference against KL to the base over strengths (on the anchors, or without "
        "any on the unrelated text); needs matplotlib",
    )
    parser.add_argument("--batch-size", type=int, default=4, help="pairs a batch")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--max-examples", type=int, help="use the first so many of each file")
    parser.add_argument("--value-at", choices=["next", "same"], help="default: as trained")
    parser.add_argument("--length-norm", choices=["response", "none"], help="default: as trained")
    parser.add_argument("--dtype", default="auto", help="dtype of the base, such as bfloat16")
    parser.set_defaults(run=evaluate)


def evaluate(options: argparse.Namespace) -> int:
    from qadapter import files
    from qadapter.text.data import prepare_dataset
    from qadapter.text.tokenization import eos_token_ids
    from qadapter.training import evaluation

    named = str(options.adapter)
    strength = _checked(options)
    data = sampling.load_pairs(options.data, options.split, options.data_config, options)
    data = sampling.head(data, options.max_examples)
    unrelated = sampling.head(evaluation.load_unrelated(options.unrelated), options.max_examples)
    options.adapter = sampling.checked_folder(options.adapter)
    folders = {sampling.FIRST: options.adapter}
    sampling.say_recommended(_blend(options), strength is None)
    model, tokenizer = sampling.load(folders, options.base_model, options.dtype)
    if strength is not None:
        model.set_composition(1.0 / strength, 1.0 / strength, model.center)
    trained = {}
    if (Path(options.adapter) / "training_args.json").exists():
        trained = files.read_json(Path(options.adapter) / "training_args.json")
    anchors, source = _anchors(model, tokenizer, trained, options)
    count = len(data)
    if options.skip_bad_rows:
        data = prepare_dataset(
            data,
            tokenizer,
            max_length=options.max_length,
            eos_token_ids=eos_token_ids(model, tokenizer),
            drop_long_prompts=True,
            skip_bad_rows=True,
        )
    common = {"batch_size": options.batch_size, "max_length": options.max_length}
    report = {
        "adapter": named,
        "data": " ".join(options.data),
        "unrelated": str(options.unrelated or "packaged"),
        "strength": strength,
        "recommended_strength": model.recommended_strength,
        "kl_budget": model.kl_budget,
        "alpha_0": model.alpha_0,
        "alpha_tilde": model.alpha_tilde,
        "center": model.center,
        "gamma": model.gamma,
        "dtype": str(model.hf_model.dtype).removeprefix("torch."),
        "preference": evaluation.evaluate_preferences(
            model,
            tokenizer,
            data,
            value_at=options.value_at or trained.get("value_at", "next"),
            length_norm=options.length_norm or trained.get("length_norm", "none"),
            **common,
        ),
        "forgetting": evaluation.evaluate_forgetting(model, tokenizer, unrelated, **common),
    }
    report["preference"]["dropped"] += count - len(data)
    shown = _over_strengths(model, tokenizer, data, unrelated, anchors, source, report, options)
    if options.json:
        files.write_json(options.json, report)
    print("\n".join([evaluation.table(report), *shown]))
    return 0


def _blend(options: argparse.Namespace) -> sampling.Blend:
    return sampling.Blend({sampling.FIRST: options.adapter}, {sampling.FIRST: 1.0})


def _checked(options: argparse.Namespace) -> float | None:
    """The strength, None as trained. ValueError for options that cannot be, before any work."""
    if isinstance(options.strength, str):
        options.adapter = sampling.checked_folder(options.adapter)
    strength = sampling.given_strength(options.strength, _blend(options))
    if strength is not None and not 0 < strength < float("inf"):
        raise ValueError(f"--strength: expected more than 0 (which is the base), got {strength:g}")
    for name, least in (("batch_size", 1), ("max_length", 2)):
        if getattr(options, name) < least:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option}: expected {least} or more, got {getattr(options, name)}")
    if options.plot is not None:
        if Path(options.plot).suffix not in PLOTS or Path(options.plot).is_dir():
            raise ValueError(f"--plot: expected a {', '.join(PLOTS)} file, got {options.plot}")
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise ImportError("--plot: needs matplotlib: pip install matplotlib") from None
    return strength


def _anchors(
    model: Any, tokenizer: Any, trained: dict[str, Any], options: argparse.Namespace
) -> tuple[list[Any], str]:
    """Tokenised, and where they are from; of the file that training made, those it held out."""
    from qadapter.text.anchors import different, load_anchors
    from qadapter.text.tokenization import eos_token_ids
    from qadapter.training.anchored import TEXTS_NAME
    from qadapter.training.anchors import AnchorSet, anchor_texts
    from qadapter.training.preparation import check_anchors

    own = Path(options.adapter) / TEXTS_NAME
    given = options.anchors
    held_out = own.exists() and (given is None or Path(given).resolve() == own.resolve())
    if given is None and not held_out:
        return [], ""
    rows = list(different(load_anchors(str(own) if held_out else given)))
    if not held_out:
        rows = rows[: options.max_examples]
    texts = anchor_texts(
        rows,
        tokenizer,
        # As in training, so that those that are held out are the same.
        max_length=trained.get("max_length", options.max_length)
        if held_out
        else options.max_length,
        eos_token_ids=eos_token_ids(model, tokenizer),
        base=model.base_fingerprint,
    )
    check_anchors(texts, model.hf_model, tokenizer)
    if not held_out:
        return texts, str(given)
    chosen = AnchorSet(texts[: trained.get("anchor_count")])
    kept = [chosen.anchors[number] for number in chosen.held_out]
    print(f"anchors: the {len(kept)} of {own} that training held out", file=sys.stderr)
    return kept, f"held out of {own}"


def _over_strengths(
    model: Any,
    tokenizer: Any,
    data: Any,
    unrelated: Any,
    anchors: list[Any],
    source: str,
    report: dict[str, Any],
    options: argparse.Namespace,
) -> list[str]:
    """Put KL on the anchors into the report and, for a plot, the figures over strengths, which are
    returned as text too."""
    from qadapter.text.tokenization import eos_token_ids
    from qadapter.training import frontier
    from qadapter.training.anchors import anchor_texts
    from qadapter.training.plots import plot_strengths

    recommended = model.recommended_strength
    more = {s for s in (recommended, report["strength"]) if s}
    strengths = sorted({*frontier.STRENGTHS, *more}) if options.plot else []
    texts, kl_on = anchors, "anchors"
    if options.plot and not anchors:
        kl_on = "unrelated text"
        texts = anchor_texts(
            list(unrelated),
            tokenizer,
            max_length=options.max_length,
            eos_token_ids=eos_token_ids(model, tokenizer),
        )
    if not texts:
        return []
    compositions = [model.composition, *map(model.composition_at, strengths)]
    kl = frontier.text_kl(model, tokenizer, texts, compositions, batch_size=options.batch_size)
    if anchors:
        counts = {"source": source, "texts": len(anchors), "tokens": int(kl.states.sum())}
        report["anchors"] = {**counts, **kl.figures()}
    if not options.plot:
        return []
    common = {"batch_size": options.batch_size, "max_length": options.max_length}
    preferences = frontier.preferences(model, tokenizer, data, strengths, **common)
    points = [
        {"strength": s, **preference, **kl.figures(number)}
        for number, (s, preference) in enumerate(zip(strengths, preferences, strict=True), start=1)
    ]
    report["strengths"] = {"kl_on": kl_on, "points": points}
    plot_strengths(points, options.plot, kl_on, recommended, model.kl_budget)
    return [frontier.table(points, kl_on, recommended), f"plot {options.plot}"]
