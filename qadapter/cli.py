"""The command line: qadapter train | generate | chat | eval | demo | env."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from qadapter import chat, cli_generate

DESCRIPTION = "Customise a frozen language model with a residual Q-function (Q-Adapter)."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Errors of use are one line on stderr, status 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="qadapter", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser(
        "train", add_help=False, help="train an adapter on preference pairs (train --help)"
    )
    cli_generate.add_parser(commands)
    chat.add_parser(commands)
    _add_eval(commands)
    _add_demo(commands)
    commands.add_parser("env", help="versions, backends, and a check of each against the reference")
    if arguments[:1] == ["train"]:
        return _reporting_errors(train, arguments[1:])
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 2
    run = {
        "generate": cli_generate.generate,
        "chat": chat.chat,
        "eval": evaluate,
        "demo": demo,
        "env": env,
    }[options.command]
    return _reporting_errors(run, options)


def _reporting_errors(run: Any, options: Any) -> int:
    try:
        return run(options) or 0
    except (ValueError, OSError, ImportError) as error:
        print(f"qadapter: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("qadapter: interrupted", file=sys.stderr)
        return 130


# train


@dataclass
class TrainArguments:
    """What ``qadapter train`` takes besides the fields of QAdapterConfig."""

    model: str = field(metadata={"help": "Hub id, folder, adapter folder, or smollm2."})
    data: str = field(metadata={"help": "Preference pairs: .jsonl, .json, .parquet or a Hub id."})
    output: str | None = field(default=None, metadata={"help": "Folder for the adapter."})
    eval_data: str | None = field(default=None, metadata={"help": "Held-out pairs."})
    preset: str = field(
        default="default",
        metadata={
            "help": "released: the research code's settings.",
            "choices": ["default", "released"],
        },
    )
    split: str = field(default="train", metadata={"help": "Split of a Hub data set."})
    max_examples: int | None = field(
        default=None, metadata={"help": "Use the first so many pairs."}
    )
    lora_r: int = field(default=8, metadata={"help": "Rank of LoRA."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of LoRA."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of LoRA."})
    target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Modules with LoRA, such as q_proj v_proj; default all linear layers."},
    )
    dtype: str = field(default="auto", metadata={"help": "dtype of the base, such as bfloat16."})
    resume: bool = field(default=False, metadata={"help": "Go on from the newest checkpoint."})


def train(argv: Sequence[str]) -> int:
    from transformers import HfArgumentParser

    from qadapter.checkpoint import is_adapter_folder, resolve_model
    from qadapter.data import load_preference_data
    from qadapter.modeling import QAdapterModel
    from qadapter.plots import plot_training
    from qadapter.trainer import RELEASED_PRESET, QAdapterConfig, QAdapterTrainer

    parser = HfArgumentParser(cast(Any, (TrainArguments, QAdapterConfig)), prog="qadapter train")
    arguments = list(argv)
    if not any(a.split("=")[0] in ("--output_dir", "--output-dir") for a in arguments):
        output = _peek(arguments, "--output")
        arguments += ["--output_dir", output] if output else []
    if _peek(arguments, "--preset") == "released":
        # Before the user's own options, which win.
        preset = [f"--{name}={value}" for name, value in RELEASED_PRESET.items()]
        arguments = preset + arguments
    options, config = parser.parse_args_into_dataclasses(arguments)
    if options.output is None and config.output_dir in (None, "trainer_output"):
        raise ValueError("--output: give the folder for the adapter")

    dataset = _head(load_preference_data(options.data, options.split), options.max_examples)
    held_out = load_preference_data(options.eval_data, "test") if options.eval_data else None
    source = resolve_model(options.model)
    lora = None if is_adapter_folder(source) else _lora_config(options)
    model = QAdapterModel.from_pretrained(source, lora_config=lora, dtype=options.dtype)
    trainer = QAdapterTrainer(model, config, train_dataset=dataset, eval_dataset=held_out)
    trainer.train(resume_from_checkpoint=options.resume or config.resume_from_checkpoint)
    if held_out is not None:
        trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model(config.output_dir)
    trainer.save_state()
    plot = plot_training(trainer.state.log_history, Path(config.output_dir) / "training.png")
    print(f"adapter saved to {config.output_dir}" + (f", plot {plot}" if plot else ""))
    return 0


def _peek(arguments: Sequence[str], option: str) -> str | None:
    value = None
    for i, argument in enumerate(arguments):
        if argument == option and i + 1 < len(arguments):
            value = arguments[i + 1]
        elif argument.startswith(option + "="):
            value = argument.split("=", 1)[1]
    return value


def _head(dataset: Any, count: int | None) -> Any:
    return dataset if count is None else dataset.select(range(min(count, len(dataset))))


def _lora_config(options: TrainArguments) -> Any:
    from peft import LoraConfig

    targets: Any = options.target_modules or ["all-linear"]
    if targets == ["all-linear"]:
        targets = "all-linear"
    return LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )


# eval


def _add_eval(commands: Any) -> None:
    parser = commands.add_parser(
        "eval", help="preference accuracy on held-out pairs, and forgetting on unrelated text"
    )
    parser.add_argument("--adapter", required=True, help="folder of a saved adapter")
    parser.add_argument("--base-model", help="where the base is, if not where it was at training")
    parser.add_argument("--data", required=True, help="held-out pairs: a file or a Hub id")
    parser.add_argument("--split", default="test", help="split of a Hub data set")
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
    parser.add_argument("--dtype", default="auto")


def evaluate(options: argparse.Namespace) -> int:
    from qadapter import cli_options, evaluation, files
    from qadapter.data import load_preference_data

    data = _head(load_preference_data(options.data, options.split), options.max_examples)
    unrelated = _head(evaluation.load_unrelated(options.unrelated), options.max_examples)
    folders = {cli_options.FIRST: cli_options.checked_folder(options.adapter)}
    model, tokenizer = cli_options.load(folders, options.base_model, options.dtype)
    trained = {}
    if (Path(options.adapter) / "training_args.json").exists():
        trained = files.read_json(Path(options.adapter) / "training_args.json")
    common = {"batch_size": options.batch_size, "max_length": options.max_length}
    report = {
        "adapter": str(options.adapter),
        "data": str(options.data),
        "unrelated": str(options.unrelated or "packaged"),
        "alpha_0": model.alpha_0,
        "alpha_tilde": model.alpha_tilde,
        "center": model.center,
        "gamma": model.gamma,
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
    if options.json:
        files.write_json(options.json, report)
    print(evaluation.table(report))
    return 0


# demo, env


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo", help="customise the packaged model to a visible preference, and show that it took"
    )
    parser.add_argument("--output", default="demo-output", help="folder for adapter, report, plot")
    parser.add_argument("--model", default="smollm2", help="another base, to try the preference on")
    parser.add_argument("--max-steps", type=int, help="stop earlier (to look around)")


def demo(options: argparse.Namespace) -> int:
    from qadapter import demo

    demo.run(options.output, model=options.model, max_steps=options.max_steps)
    return 0


def env(options: argparse.Namespace) -> int:
    from qadapter import environment

    print(environment.report())
    return 0 if environment.all_checks_pass() else 1


if __name__ == "__main__":
    sys.exit(main())
