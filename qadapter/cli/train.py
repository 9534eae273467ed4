"""``qadapter train``: every field of QAdapterConfig is an option."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from qadapter.cli import launching, mixture, run_file
from qadapter.cli.sampling import load_pairs


@dataclass
class TrainArguments:
    """What ``qadapter train`` takes besides the fields of QAdapterConfig."""

    model: str = field(metadata={"help": "Hub id, folder, adapter folder, or smollm2."})
    data: list[str] = field(
        metadata={
            "help": "Preference pairs: files (.jsonl, .json, .csv, .tsv, compressed or not, "
            ".parquet, .arrow), a glob, a folder of save_to_disk, or a Hub id; with "
            "--data-weights several of these, mixed."
        }
    )
    output: str | None = field(default=None, metadata={"help": "Folder for the adapter."})
    eval_data: list[str] | None = field(default=None, metadata={"help": "Held-out pairs."})
    anchor_data: list[str] | None = field(
        default=None,
        metadata={
            "help": "With --kl-budget or --anchor-coef: conversations that the policy shall answer "
            "as the base does, or prompts for the base to answer; files as for --data, or .txt. "
            "Default: made by the base (qadapter anchors)."
        },
    )
    preset: str = field(
        default="default",
        metadata={
            "help": "released: the research code's settings.",
            "choices": ["default", "released"],
        },
    )
    split: list[str] = field(
        default_factory=lambda: ["train"],
        metadata={
            "help": "Split of a Hub data set, or a slice: train[:1%%]; in a mixture one for all, "
            "or one for each."
        },
    )
    eval_split: str = field(default="test", metadata={"help": "The same for the held-out pairs."})
    data_config: list[str] | None = field(
        default=None, metadata={"help": "Configuration of a Hub data set; one or more as --split."}
    )
    columns: list[str] | None = field(
        default=None,
        metadata={"help": "Columns of other names, such as prompt=question chosen=good."},
    )
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "Drop and count rows that cannot be used (else an error)."}
    )
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
    dtype: str = field(
        default="auto",
        metadata={
            "help": "dtype of the base, such as bfloat16; auto is the checkpoint's where this "
            "machine is fast in it."
        },
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "Quantise the base on loading: nf4, by bitsandbytes (QLoRA)."},
    )
    load_in_8bit: bool = field(
        default=False, metadata={"help": "Quantise the base on loading: LLM.int8, by bitsandbytes."}
    )
    resume: bool = field(default=False, metadata={"help": "Go on from the newest checkpoint."})
    # Read before these, by `run_file` and `launching`.
    config: str | None = field(
        default=None,
        metadata={"help": "YAML file of options by these names; the command line wins."},
    )
    accelerate_config: str | None = field(
        default=None,
        metadata={
            "help": "Start several processes by accelerate: multi_gpu, fsdp2, zero2, zero3, or a "
            "file of `accelerate config`."
        },
    )
    num_processes: int | None = field(
        default=None, metadata={"help": "How many; default, one for each accelerator."}
    )


def train(argv: Sequence[str]) -> int:
    in_file, argv = run_file.read(argv)  # first: its env counts for what is imported

    from transformers import HfArgumentParser

    from qadapter.model.checkpoint import is_adapter_folder, resolve_model
    from qadapter.model.modeling import QAdapterModel
    from qadapter.text.anchors import load_anchors
    from qadapter.training.plots import plot_training
    from qadapter.training.preparation import device_map
    from qadapter.training.trainer import RELEASED_PRESET, QAdapterConfig, QAdapterTrainer

    kinds: Any = (TrainArguments, QAdapterConfig)
    known = [option.name for kind in kinds for option in fields(kind)]
    argv = [*run_file.as_arguments(mixture.in_file(in_file), known), *argv]
    start, arguments = launching.command(argv)
    if start is not None:
        folders = (_peek(arguments, name) for name in ("--output", "--output_dir", "--output-dir"))
        return launching.run(start, next(filter(None, folders), None))
    usage = "%(prog)s --model MODEL --data PAIRS --output FOLDER [options]; all: --help"
    parser = HfArgumentParser(kinds, prog="qadapter train", usage=usage)
    if any(a.split("=")[0] == "--output" for a in arguments) and any(
        a.split("=")[0] in ("--output_dir", "--output-dir") for a in arguments
    ):
        raise ValueError("--output: give it or --output_dir, which is the same, not both")
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

    if config.do_predict:
        raise ValueError("--do_predict: train makes no predictions; qadapter eval measures")
    if config.do_eval and options.eval_data is None:
        raise ValueError("--do_eval, --eval_strategy: give held-out pairs by --eval_data")

    if options.anchor_data and not config.anchored:
        raise ValueError("--anchor-data: has no effect without --kl-budget or --anchor-coef")

    dataset = mixture.load(options, config.data_weights)
    held_out = None
    if options.eval_data:
        configs = options.data_config or []
        one = configs[0] if len(configs) == 1 else None  # each of a mixture has its own
        held_out = load_pairs(options.eval_data, options.eval_split, one, options)
    anchors = load_anchors(options.anchor_data) if options.anchor_data else None
    source = resolve_model(options.model)
    lora = _lora_config(options)
    if is_adapter_folder(source):
        _refuse_lora_options(options)
        lora = None
    model = QAdapterModel.from_pretrained(
        source, lora_config=lora, **_base_options(options, source, **device_map(config))
    )
    print(f"base in {str(model.hf_model.dtype).removeprefix('torch.')}")
    if options.skip_bad_rows:
        parts = [_usable(model, config, one, "training") for one in mixture.parts(dataset)]
        dataset = parts if config.data_weights else parts[0]
        held_out = held_out and _usable(model, config, held_out, "evaluation")
    trainer = QAdapterTrainer(
        model, config, train_dataset=dataset, eval_dataset=held_out, anchor_dataset=anchors
    )
    if _caching_pays(model, config):
        n = f"{config.num_train_epochs:g}"
        print(f"{n} epochs: with --precompute_base the base runs once instead of {n} times")
    trainer.train(resume_from_checkpoint=options.resume or config.resume_from_checkpoint)
    if held_out is not None:
        trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model(config.output_dir)
    trainer.save_state()
    if not trainer.is_world_process_zero():
        return 0
    plot = plot_training(trainer.state.log_history, Path(config.output_dir) / "training.png")
    if model.recommended_strength is not None:
        print(
            f"recommended strength {model.recommended_strength:.3g}: there KL to the base keeps "
            f"{model.kl_budget:g} nats a token on anchors that were held out"
        )
    print(f"adapter saved to {config.output_dir}" + (f", plot {plot}" if plot else ""))
    return 0


def _caching_pays(model: Any, config: Any) -> bool:
    """Whether the base cache could spare passes that this run is about to make."""
    from qadapter.model.quantised import mixes_rows

    return (
        not config.precompute_base
        and config.max_steps <= 0
        and config.num_train_epochs > 1
        and not config.use_logits
        and model.selects_hidden_rows
        and model.alpha_0 == model.center
        and not (config.fsdp or config.deepspeed or mixes_rows(model.hf_model))
    )


def _usable(model: Any, config: Any, dataset: Any, what: str) -> Any:
    """Tokenised as the trainer does it, without the rows that it would refuse."""
    from transformers import AutoTokenizer

    from qadapter.text.data import prepare_dataset
    from qadapter.text.tokenization import eos_token_ids

    tokenizer = AutoTokenizer.from_pretrained(model.tokenizer_source)
    return prepare_dataset(
        dataset,
        tokenizer,
        max_length=config.max_length,
        eos_token_ids=eos_token_ids(model, tokenizer),
        drop_long_prompts=config.drop_long_prompts,
        skip_bad_rows=True,
        num_proc=config.dataset_num_proc,
        desc=f"Tokenizing {what} pairs",
    )


def _refuse_lora_options(options: TrainArguments) -> None:
    of_new = ("lora_r", "lora_alpha", "lora_dropout", "target_modules")
    for name in (*of_new, "load_in_4bit", "load_in_8bit"):
        value, default = getattr(options, name), TrainArguments.__dataclass_fields__[name].default
        if value != default:
            raise ValueError(
                f"--{name}: of a new adapter, got {value!r}, but {options.model} is a saved one "
                "and has its own LoRA, on a base as it was at training"
            )


def _base_options(options: TrainArguments, source: str, **others: Any) -> dict[str, Any]:
    """Keywords of ``from_pretrained``, ``others`` among them."""
    from qadapter.model import quantised

    bits = [bits for bits in (4, 8) if getattr(options, f"load_in_{bits}bit")]
    if not bits:
        return {"dtype": options.dtype, **others}
    if len(bits) > 1:
        raise ValueError("--load_in_4bit, --load_in_8bit: give one of them, not both")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(f"--load_in_{bits[0]}bit: needs bitsandbytes (pip install bitsandbytes)")
    dtype = quantised.compute_dtype(options.dtype, source, **others)
    settings = quantised.bits_and_bytes(bits[0], dtype)
    return {"dtype": dtype, "quantization_config": settings, **others}


def _peek(arguments: Sequence[str], option: str) -> str | None:
    value = None
    for i, argument in enumerate(arguments):
        if argument == option and i + 1 < len(arguments):
            value = arguments[i + 1]
        elif argument.startswith(option + "="):
            value = argument.split("=", 1)[1]
    return value


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
