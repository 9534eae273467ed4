"""From what a user hands to the trainer to what it trains on: the model, the data, the collator."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel

from qadapter.model import packed_attention, sharded
from qadapter.model.modeling import QAdapterModel
from qadapter.text.anchors import Anchor
from qadapter.text.collator import PreferenceCollator
from qadapter.text.data import prepare_dataset
from qadapter.text.forms import TOKEN_COLUMNS
from qadapter.text.mixture import mix
from qadapter.text.packing import PackedPreferenceCollator
from qadapter.text.tokenization import eos_token_ids, pad_token_id
from qadapter.training.config import QAdapterConfig

logger = logging.getLogger(__name__)


def as_qadapter_model(
    model: Any, peft_config: LoraConfig | None, args: QAdapterConfig
) -> QAdapterModel:
    if isinstance(model, str | Path):
        return QAdapterModel.from_pretrained(model, lora_config=peft_config, **device_map(args))
    if peft_config is not None and isinstance(model, QAdapterModel | PeftModel):
        raise ValueError("peft_config: the model already has an adapter")
    if isinstance(model, QAdapterModel):
        return model
    if isinstance(model, PeftModel):
        return QAdapterModel(model)
    if isinstance(model, PreTrainedModel):
        return QAdapterModel.from_base(model, lora_config=peft_config)
    raise ValueError(
        "model: expected a QAdapterModel, a peft or transformers model, a name or a folder, got "
        f"{type(model).__name__}"
    )


def device_map(args: QAdapterConfig) -> dict[str, Any]:
    """As keywords of ``from_pretrained``: beside an accelerator that is not to be used, it is the
    CPU that has to be fast in the base's dtype."""
    return {"device_map": "cpu"} if args.use_cpu and torch.accelerator.is_available() else {}


def collator(model: QAdapterModel, args: QAdapterConfig, tokenizer: Any) -> Any:
    if args.packing:
        reason = packed_attention.enable(model.hf_model)
        if reason is None:
            return PackedPreferenceCollator()
        logger.warning("Batches are padded instead of packed: %s", reason)
    return PreferenceCollator(pad_token_id(tokenizer, model))


def check_is_one(dataset: Any, name: str) -> None:
    if isinstance(dataset, dict | list | tuple):
        names = ": " + ", ".join(map(str, dataset)) if isinstance(dataset, dict) else ""
        what = "a dict" if isinstance(dataset, dict) else f"a {type(dataset).__name__}"
        mixture = " (a mixture has data_weights)" if name == "train_dataset" else ""
        raise TypeError(f"{name}: expected one data set, got {what} of them{names}{mixture}")


def _parts(datasets: Any) -> dict[Any, Any]:
    """Several data sets by name, or by number."""
    return dict(datasets) if isinstance(datasets, dict) else dict(enumerate(datasets, 1))


def check_training_data(dataset: Any, args: QAdapterConfig) -> None:
    """Errors for what cannot be trained on, or not with these arguments."""
    several = isinstance(dataset, dict | list | tuple)
    if args.data_weights is None:
        check_is_one(dataset, "train_dataset")
    elif not several or len(dataset) != len(args.data_weights):
        given = f"{len(dataset)} data sets" if several else "one data set"
        raise ValueError(
            f"data_weights: expected one for each of several data sets, got "
            f"{len(args.data_weights)} for {given}"
        )
    parts = list(_parts(dataset).values()) if several else [dataset]
    if not any(isinstance(part, IterableDataset) for part in parts):
        return
    if args.precompute_base:
        raise ValueError("precompute_base: expected a data set with a length, got a stream")
    if args.train_sampling_strategy != "random":
        raise ValueError(
            "train_sampling_strategy: a stream comes in its own order, got "
            f"{args.train_sampling_strategy!r}"
        )


def prepare_training(
    dataset: Any, model: QAdapterModel, args: QAdapterConfig, tokenizer: Any
) -> Any:
    """`prepare` of the training data; with ``data_weights`` of each part, and their mixture."""
    if args.data_weights is None:
        return prepare(dataset, "training", model, args, tokenizer)
    parts = _parts(prepare(_parts(dataset), "training", model, args, tokenizer))
    keep = [args.length_column_name]
    grouped = all(keep[0] in (part.column_names or ()) for part in parts.values())
    mixed = mix(
        list(parts.values()),
        args.data_weights,
        seed=args.seed if args.data_seed is None else args.data_seed,
        stopping_strategy=args.data_stopping_strategy,
        also=keep if grouped else (),
    )
    if not isinstance(mixed, IterableDataset):
        lengths = {name: len(part) for name, part in parts.items()}
        logger.warning("Mixture: %d pairs an epoch, of data sets of %s", len(mixed), lengths)
    return mixed


def prepare(
    dataset: Any, what: str, model: QAdapterModel, args: QAdapterConfig, tokenizer: Any
) -> Any:
    """A data set of raw or tokenised pairs, or a stream of them, as tokenised pairs that fit the
    model; of a dict of them, each.

    Raises:
        TypeError: no `datasets.Dataset` or `datasets.IterableDataset`.
        ValueError: a row that cannot be used, named.
    """
    if isinstance(dataset, dict):
        return {
            name: prepare(split, f"{what} {name}", model, args, tokenizer)
            for name, split in dataset.items()
        }
    if isinstance(dataset, IterableDataset) and next(iter(dataset), None) is None:
        raise ValueError(f"the {what} data: a stream without rows")
    prepared = prepare_dataset(
        dataset,
        tokenizer,
        max_length=args.max_length,
        eos_token_ids=eos_token_ids(model, tokenizer),
        drop_long_prompts=args.drop_long_prompts,
        num_proc=args.dataset_num_proc,
        desc=f"Tokenizing {what} pairs",
    )
    if isinstance(prepared, IterableDataset):
        return _checked_stream(prepared, model, tokenizer, what)
    check_fit(prepared, model, tokenizer, what)
    column = args.length_column_name
    if args.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
        if column in prepared.column_names:
            prepared = prepared.remove_columns(column)
        lengths = [sum(len(row[name]) for name in TOKEN_COLUMNS) for row in prepared]
        prepared = prepared.add_column(column, lengths)
    return prepared


# What a model has no embedding for: an IndexError deep inside, or a stopped GPU.


def _limits(model: Any, tokenizer: Any) -> tuple[int | None, int | None]:
    """(tokens that a text may have, ids that there are); None where nothing can be amiss."""
    vocab = sharded.vocab_rows(model)
    return position_limit(model), vocab if len(tokenizer) > vocab else None


def position_limit(model: Any) -> int | None:
    """Positions of a transformers model that looks them up in a table; None for one that computes
    them."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    words = model.get_input_embeddings()
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not words]
    # Some have a few rows more, for padding.
    if limit is not None and any(limit <= t.num_embeddings <= limit + 8 for t in tables):
        return int(limit)
    return None


def check_fit(dataset: Dataset, model: QAdapterModel, tokenizer: Any, what: str) -> None:
    """ValueError for the first tokenised pair that the model has no positions or no ids for."""
    limits = _limits(model.hf_model, tokenizer)
    if limits == (None, None):
        return
    for index, row in enumerate(_token_columns(dataset)):
        _check_row(row, limits, f"pair {index} of the tokenised {what} data")


def _checked_stream(
    stream: IterableDataset, model: QAdapterModel, tokenizer: Any, what: str
) -> IterableDataset:
    """`check_fit` of each pair as it comes."""
    limits = _limits(model.hf_model, tokenizer)
    if limits == (None, None):
        return stream

    def check(row: dict[str, Any], index: int) -> dict[str, Any]:
        _check_row(row, limits, f"pair {index} of the tokenised {what} data")
        return row

    return stream.map(check, with_indices=True)


def check_anchors(anchors: Sequence[Anchor], model: Any, tokenizer: Any) -> None:
    """The same of tokenised anchors, and of a transformers model."""
    limits = _limits(model, tokenizer)
    if limits == (None, None):
        return
    for number, anchor in enumerate(anchors):
        _check_tokens(len(anchor.ids), max(anchor.ids), limits, f"tokenised anchor {number}")


def _token_columns(dataset: Dataset) -> Iterator[dict[str, Any]]:
    yield from dataset.select_columns(list(TOKEN_COLUMNS))


def _check_row(row: Mapping[str, Any], limits: tuple[int | None, int | None], where: str) -> None:
    prompt = row["prompt_ids"]
    length = len(prompt) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
    largest = max(max(row[column], default=0) for column in TOKEN_COLUMNS)
    _check_tokens(length, largest, limits, where)


def _check_tokens(
    length: int, largest: int, limits: tuple[int | None, int | None], where: str
) -> None:
    positions, vocab = limits
    if positions is not None and length > positions:
        raise ValueError(
            f"{where} has {length} tokens, but the model has positions for {positions}: "
            f"max_length={positions} cuts longer ones"
        )
    if vocab is not None and largest >= vocab:
        raise ValueError(
            f"{where} has the token id {largest}, but the model's embedding has {vocab} rows: the "
            "tokenizer got tokens that the model does not know; enlarge the embedding before the "
            "adapter is made (resize_token_embeddings), or take the model's own tokenizer"
        )
