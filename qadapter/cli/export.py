"""``qadapter export``: an adapter at one strength as a plain LoRA, merged weights or a GGUF."""

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from qadapter import files
from qadapter.cli import sampling
from qadapter.text.prompts import checked_strength

CONVERTERS = {False: "convert_lora_to_gguf.py", True: "convert_hf_to_gguf.py"}


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "export", help="write a plain LoRA, or merged weights, at one strength for any server"
    )
    sampling.add_adapters(parser)
    parser.add_argument("--output", required=True, help="folder to write, new or empty")
    parser.add_argument(
        "--strength",
        type=sampling.strength_option,
        default=1.0,
        help="0 is the base, 1 as trained, more is more, recommended what training with "
        "--kl-budget found; default %(default)g",
    )
    parser.add_argument(
        "--merge",
        action="store_true",
        help="add the LoRA to the weights and write the whole model, in the checkpoint's dtype if "
        "there is no --dtype",
    )
    parser.add_argument(
        "--gguf",
        action="store_true",
        help="also a GGUF, by llama.cpp's own converter; where that is not found, the command to "
        "run is printed",
    )
    parser.add_argument(
        "--llama-cpp", metavar="DIR", help="with --gguf: llama.cpp's folder; default, on the PATH"
    )
    parser.add_argument(
        "--check",
        metavar="FILE",
        help="measure on this text (as eval --anchors takes it) how far what was exported is from "
        "the blend of logits, and both from the base; in float32 if there is no --dtype",
    )
    parser.add_argument("--max-length", type=int, default=1024, help="longest text of --check")
    parser.set_defaults(run=export)


def export(options: argparse.Namespace) -> int:
    _check(options)
    blend = sampling.parse_blend(options.adapter, options.weight)
    strength = sampling.given_strength(options.strength, blend)
    assert strength is not None
    weights: dict[str, float] = {}
    for name, folder in blend.folders.items():
        weights[folder] = weights.get(folder, 0.0) + blend.weights[name]
    converter = _converter(options)
    sampling.say_recommended(blend, as_trained=False)

    from qadapter.model.export import export_adapter, trained_strength

    for folder in weights:
        trained = trained_strength(folder)
        if trained not in (1.0, strength):
            print(f"{folder} was trained at strength {trained:g}", file=sys.stderr)
    adapters, texts = _texts(options, weights) if options.check else (None, [])
    output = export_adapter(
        weights,
        options.output,
        strength=strength,
        merge=options.merge,
        base_model=options.base_model,
        dtype=options.dtype,
    )
    print(_summary(options, weights, strength, output))
    if adapters is not None:
        from qadapter.training.export_check import table

        print(table(adapters.kl(output, strength, texts), options.check))
    if options.gguf:
        _gguf(options, output, converter)
    return 0


def _check(options: argparse.Namespace) -> None:
    if not isinstance(options.strength, str):
        checked_strength(options.strength, "--strength")
    if options.max_length < 2:
        raise ValueError(f"--max-length: expected 2 or more, got {options.max_length}")
    if options.llama_cpp is not None and not options.gguf:
        raise ValueError("--llama-cpp: is for --gguf, which is not given")
    output = Path(options.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output: {output} is there and no empty folder; give a new one")


def _texts(options: argparse.Namespace, weights: dict[str, float]) -> tuple[Any, list[Any]]:
    """The adapters on their base, and the tokenised text to measure on: before anything is
    written."""
    from qadapter.text.anchors import load_anchors

    rows = load_anchors(options.check)

    import torch
    from transformers import AutoTokenizer

    from qadapter.model.checkpoint import fingerprint
    from qadapter.text.tokenization import eos_token_ids
    from qadapter.training.anchors import anchor_texts
    from qadapter.training.export_check import Adapters
    from qadapter.training.preparation import check_anchors

    dtype = torch.float32 if options.dtype == "auto" else options.dtype
    adapters = Adapters(weights, options.base_model, dtype)
    first = next(iter(weights))
    own = (Path(first) / "tokenizer_config.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(first if own else adapters.base.config._name_or_path)
    texts = anchor_texts(
        rows,
        tokenizer,
        max_length=options.max_length,
        eos_token_ids=eos_token_ids(adapters.base, tokenizer),
        base=fingerprint(adapters.base),
    )
    check_anchors(texts, adapters.base, tokenizer)
    return adapters, texts


def _summary(
    options: argparse.Namespace, weights: dict[str, float], strength: float, output: Path
) -> str:
    if options.merge:
        what = "merged model"
    else:
        config = files.read_json(output / "adapter_config.json")
        what = f"plain LoRA of rank {config['r']}, alpha {config['lora_alpha']:g},"
    line = f"{what} in {output}: strength {strength:g}"
    exact = strength == 0 or [strength * weight for weight in weights.values()] == [1.0]
    if options.check is None and not exact:
        line += "; not the blend of logits at this strength, --check FILE measures the difference"
    return line


# GGUF.


def _converter(options: argparse.Namespace) -> str | None:
    """Path of llama.cpp's script, None where there is none."""
    name = CONVERTERS[options.merge]
    if options.llama_cpp is None:
        return shutil.which(name) if options.gguf else None
    path = Path(options.llama_cpp) / name
    if not path.is_file():
        raise ValueError(f"--llama-cpp: there is no {name} in {options.llama_cpp}")
    return str(path)


def _command(
    options: argparse.Namespace, converter: str | None, source: Path, output: Path
) -> list[str]:
    command = [sys.executable if converter else "python", converter or CONVERTERS[options.merge]]
    if not options.merge:
        base = str(files.read_json(source / "adapter_config.json")["base_model_name_or_path"])
        command += ["--base" if Path(base).is_dir() else "--base-model-id", base]
    return [*command, "--outfile", str(output), str(source)]


def _gguf(options: argparse.Namespace, source: Path, converter: str | None) -> None:
    output = source / ("model.gguf" if options.merge else "adapter.gguf")
    if converter is None:
        command = _command(options, None, source, output)
        name = CONVERTERS[options.merge]
        print(f"llama.cpp's {name} is not on the PATH; for a GGUF run\n{shlex.join(command)}")
        return
    with files.replacing_file(output) as temporary:
        command = _command(options, converter, source, temporary)
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode or not temporary.exists():
            last = (made.stderr or made.stdout).strip().splitlines()[-1:]
            raise OSError(
                f"{Path(converter).name} failed with status {made.returncode}"
                f"{': ' + last[0] if last else ''}; {source} is whole without it. The command was: "
                f"{shlex.join(command)}"
            )
    print(f"GGUF in {output}")
