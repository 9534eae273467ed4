"""``qadapter eval``: preference accuracy on held-out pairs, and forgetting on unrelated text."""

import argparse
from pathlib import Path
from typing import Any

from qadapter.cli import sampling


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
    parser.add_argument("--json", help="write the report there too")
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

    data = sampling.load_pairs(options.data, options.split, options)
    data = sampling.head(data, options.max_examples)
    unrelated = sampling.head(evaluation.load_unrelated(options.unrelated), options.max_examples)
    folders = {sampling.FIRST: sampling.checked_folder(options.adapter)}
    model, tokenizer = sampling.load(folders, options.base_model, options.dtype)
    trained = {}
    if (Path(options.adapter) / "training_args.json").exists():
        trained = files.read_json(Path(options.adapter) / "training_args.json")
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
        "adapter": str(options.adapter),
        "data": " ".join(options.data),
        "unrelated": str(options.unrelated or "packaged"),
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
    if options.json:
        files.write_json(options.json, report)
    print(evaluation.table(report))
    return 0
