"""Several data sets as one, each with a share of the pairs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from qadapter.ops import checks
from qadapter.text.forms import FLAG_COLUMNS, TOKEN_COLUMNS

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

Rows = TypeVar("Rows", "Dataset", "IterableDataset")

STOPPING = ("all_exhausted", "first_exhausted")

logger = logging.getLogger(__name__)


def mix(
    datasets: Sequence[Rows],
    weights: Sequence[float],
    *,
    seed: int = 0,
    stopping_strategy: str = "all_exhausted",
    also: Sequence[str] = (),
) -> Rows:
    """Tokenised data sets drawn from by their weights (`datasets.interleave_datasets`).

    Which data set each row comes from is a draw with ``weights`` as probabilities; the rows of
    each come in their order. The same arguments make the same mixture.

    Args:
        datasets: what `prepare_dataset` makes, all of them streams or none.
        weights: of each, more than 0; shares are what they are of their sum.
        stopping_strategy: ``"all_exhausted"``: until the last pair of every data set was taken
            once, shorter ones from the beginning again; ``"first_exhausted"``: until one ends, so
            that no pair is taken twice.
        also: other columns to keep.

    Raises:
        ValueError: not a weight for each data set, streams and others, an unknown strategy.
    """
    from datasets import IterableDataset, interleave_datasets

    if len(weights) != len(datasets):
        raise ValueError(
            f"data_weights: expected one for each of {len(datasets)} data sets, got {len(weights)}"
        )
    for weight in weights:
        checks.number("data_weights", weight, above=0.0)
    checks.choice("data_stopping_strategy", stopping_strategy, STOPPING)
    streams = {isinstance(dataset, IterableDataset) for dataset in datasets}
    if len(streams) > 1:
        raise ValueError("train_dataset: expected streams alone or none in a mixture, got both")
    columns = [*TOKEN_COLUMNS, *FLAG_COLUMNS, *also]
    parts: Any = [dataset.select_columns(columns) for dataset in datasets]
    if not streams.pop():
        features = parts[0].features
        parts = [part if part.features == features else part.cast(features) for part in parts]
    total = float(sum(weights))
    return interleave_datasets(
        parts,
        probabilities=[weight / total for weight in weights],
        seed=seed,
        stopping_strategy=stopping_strategy,
    )
