"""The options that generate, chat and eval share: which adapters, how to sample."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qadapter.composition import RECOMMENDED
from qadapter.text.messages import template_fields
from qadapter.text.prompts import checked_seed, checked_strength

FIRST = "default"  # what the model calls the adapter that it was loaded with


class Blend(NamedTuple):
    """Adapters by the user's names, in order, and their weights."""

    folders: dict[str, str]
    weights: dict[str, float]

    def adapters(self, weights: dict[str, float] | None = None) -> dict[str, float] | None:
        """``adapters=`` of generate; None where one adapter counts as trained."""
        weights = self.weights if weights is None else weights
        if len(weights) == 1 and set(weights.values()) == {1.0}:
            return None
        return {self.internal(name): weight for name, weight in weights.items()}

    def internal(self, name: str) -> str:
        return FIRST if name == next(iter(self.folders)) else name


def add_adapters(parser: Any, required: bool = True) -> None:
    parser.add_argument(
        "--adapter",
        action="append",
        required=required,
        metavar="[NAME=]DIR",
        help="folder of a saved adapter, or its name on the Hub; repeat with a name each to blend "
        "several",
    )
    parser.add_argument(
        "--weight",
        action="append",
        default=[],
        metavar="NAME=W",
        help="weight of an adapter's residual Q-function in the blend; default 1",
    )
    parser.add_argument("--base-model", help="where the base is, if not where it was at training")
    parser.add_argument("--dtype", default="auto", help="dtype of the base, such as bfloat16")


def strength_option(text: str) -> float | str:
    """The type of --strength."""
    if text == RECOMMENDED:
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a number or {RECOMMENDED}, got {text!r}"
        ) from None


def template_option(text: str) -> dict[str, Any]:
    """The type of --chat-template-kwargs: as `PromptRow.template`."""
    try:
        return template_fields({"chat_template_kwargs": text}, "")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_sampling(parser: Any, temperature: float, top_p: float) -> None:
    parser.add_argument("--system", help="system message")
    parser.add_argument(
        "--chat-template-kwargs",
        type=template_option,
        default={},
        metavar="JSON",
        help="variables of the chat template, such as '{\"enable_thinking\": false}'",
    )
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument(
        "--temperature", type=float, default=temperature, help="0 is greedy; default %(default)s"
    )
    parser.add_argument("--top-k", type=int, default=0, help="keep the k likeliest; 0 keeps all")
    parser.add_argument("--top-p", type=float, default=top_p, help="then those that hold this mass")
    parser.add_argument("--min-p", type=float, default=0.0, help="then this share of the likeliest")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 discourages")
    parser.add_argument("--stop", action="append", default=[], help="text that ends an answer")
    parser.add_argument("--seed", type=int, help="of the draws; default, a new one each time")


def check_sampling(options: argparse.Namespace) -> None:
    """ValueError that names the option."""
    expected = {
        "max_new_tokens": (options.max_new_tokens >= 1, "1 or more"),
        "temperature": (0 <= options.temperature < float("inf"), "0 (greedy) or more"),
        "top_k": (options.top_k >= 0, "0 (off) or more"),
        "top_p": (0 < options.top_p <= 1, "a number in (0, 1]"),
        "min_p": (0 <= options.min_p <= 1, "a number in [0, 1]"),
        "repetition_penalty": (0 < options.repetition_penalty < float("inf"), "more than 0"),
        "stop": (all(options.stop), "some text"),
    }
    for name, (fits, what) in expected.items():
        if not fits:
            got = getattr(options, name)
            raise ValueError(f"--{name.replace('_', '-')}: expected {what}, got {got!r}")
    if options.seed is not None:
        checked_seed(options.seed, "--seed")
    strengths = options.strength
    for strength in strengths if isinstance(strengths, list) else [strengths]:
        if strength not in (None, RECOMMENDED):
            checked_strength(strength, "--strength")


def sampling_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """As keywords of ``model.generate``."""
    # All of them, also those that are off: a base's own generation settings do not count here.
    settings: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "do_sample": False}
    settings |= {"repetition_penalty": options.repetition_penalty}
    if options.temperature > 0:
        settings |= {"do_sample": True, "temperature": options.temperature}
        settings |= {"top_k": options.top_k, "top_p": options.top_p}
        settings |= {"min_p": options.min_p or None}
    return settings


def parse_blend(adapters: Sequence[str], weights: Sequence[str]) -> Blend:
    """--adapter and --weight, checked. ValueError names the option and what came."""
    folders: dict[str, str] = {}
    for value in adapters:
        name, found, folder = value.partition("=")
        if not found or Path(value).is_dir():
            name, folder = FIRST, value
            if len(adapters) > 1:
                raise ValueError(
                    f"--adapter: several adapters need a name each (NAME=DIR), got {value}"
                )
        if not re.fullmatch(r"[\w-]+", name):
            raise ValueError(f"--adapter: a name is letters, digits, _ and -, got {name!r}")
        if name in folders:
            raise ValueError(f"--adapter: the name {name} is given twice")
        if name == FIRST and folders:
            raise ValueError(f"--adapter: the name {FIRST} is the first adapter's; give it first")
        folders[name] = checked_folder(folder)
    blend = Blend(folders, dict.fromkeys(folders, 1.0))
    return blend._replace(weights=blend.weights | parse_weights(weights, blend, "--weight"))


def recommended(blend: Blend, what: str) -> float:
    """The recommended strength of the one adapter. ValueError, which names ``what`` asked."""
    from qadapter.model.saving import recommendation

    (name, folder), *others = blend.folders.items()
    if others or blend.weights[name] != 1.0:
        given = ", ".join(f"{name}={weight:g}" for name, weight in blend.weights.items())
        raise ValueError(
            f"{what}: {RECOMMENDED} is of one adapter alone, with weight 1; got {given}"
        )
    found, _ = recommendation(folder)
    if found is None:
        raise ValueError(
            f"{what}: {folder} has no {RECOMMENDED} strength; train with --kl-budget to get one"
        )
    return found


def given_strength(
    strength: float | str | None, blend: Blend, what: str = "--strength"
) -> float | None:
    """``strength``, or the recommended one if that is asked for."""
    return recommended(blend, what) if isinstance(strength, str) else strength


def say_recommended(blend: Blend, as_trained: bool) -> None:
    """One line on stderr if there is one adapter and it has a recommended strength."""
    from qadapter.model.saving import recommendation

    (folder, *others) = blend.folders.values()
    strength, budget = (None, None) if others else recommendation(folder)
    if strength is not None:
        used = f"; used as trained, --strength {RECOMMENDED} takes it" if as_trained else ""
        print(f"{RECOMMENDED} strength {strength:.3g} (keeps KL {budget:g}){used}", file=sys.stderr)


def head(dataset: Any, count: int | None) -> Any:
    """The first ``count`` rows of a data set; None takes all."""
    return dataset if count is None else dataset.select(range(min(count, len(dataset))))


def load_pairs(data: list[str], split: str, config: str | None, options: Any) -> Any:
    """`load_preference_data` with ``columns`` and ``skip_bad_rows`` of options."""
    from qadapter.text.data import load_preference_data

    columns = {}
    for value in options.columns or []:
        here, found, theirs = value.partition("=")
        if not (here and found and theirs) or here in columns:
            raise ValueError(f"--columns: expected NAME=COLUMN, each name once, got {value!r}")
        columns[here] = theirs
    return load_preference_data(
        data,
        split,
        config=config,
        columns=columns or None,
        skip_bad_rows=options.skip_bad_rows,
    )


def checked_folder(folder: str) -> str:
    from qadapter.model.checkpoint import adapter_folder

    return adapter_folder(folder, "--adapter")


def parse_weights(values: Sequence[str], blend: Blend, what: str) -> dict[str, float]:
    """NAME=W, each a finite number for an adapter of the blend."""
    weights = {}
    for value in values:
        name, found, text = value.partition("=")
        if not found:
            raise ValueError(f"{what}: expected NAME=NUMBER, got {value!r}")
        if name not in blend.folders:
            known = ", ".join(blend.folders)
            raise ValueError(f"{what}: there is no adapter {name!r}; known are {known}")
        weights[name] = parse_number(text, f"{what}: {name}")
    return weights


def parse_number(text: str, what: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not abs(number) < float("inf"):
        raise ValueError(f"{what}: expected a number, got {text!r}")
    return number


def load(
    folders: dict[str, str], base_model: str | None, dtype: str, decodes: bool = False
) -> tuple[Any, Any]:
    """The model with all adapters, on the GPU if there is one, and its tokenizer.

    ``decodes``: it will do nothing else, which the dtype "auto" depends on."""
    import torch
    from transformers import AutoTokenizer

    from qadapter.model.modeling import QAdapterModel

    (first, *others) = folders.items()
    if decodes and dtype == "auto":
        dtype = "decode"
    model = QAdapterModel.from_pretrained(first[1], base_model=base_model, dtype=dtype)
    for name, folder in others:
        model.load_adapter(folder, name)
    if torch.cuda.is_available():
        model.to("cuda")
    return model, AutoTokenizer.from_pretrained(model.tokenizer_source)
