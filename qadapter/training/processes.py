"""What several processes that train or evaluate together must agree on, so that they are as one.

What was found out about the model has to be the same everywhere (`check_agreement`): processes that
take different ways wait for each other. An error of one is an error of all (`together`). An update
of theirs is one process's update on all of their pairs: sums of the loss are divided by totals over
the world (`totals`), and the pairs that accelerate repeats so that all processes take equally many
batches count for nothing (`without_repeats`).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset, IterableDataset
from torch import Tensor
from torch.utils.data import IterableDataset as TorchStream

_NUMBER = "number in the stream"
_BY_ROW = ("rows", "actions", "base_lse", "base_logp", "base_hidden")


def first_pairs(batch: dict[str, Any], count: int) -> dict[str, Any]:
    """A collated batch whose loss knows its first ``count`` pairs alone, and their anchors.

    All tokens go through the model as before: other processes take part in what that does.
    """
    ends = batch["cu_seqlens"].tolist()
    pairs = (len(ends) - 1) // 2
    if count >= pairs:
        return batch
    kept = [*range(count), *range(pairs, pairs + count)]
    parts = [torch.arange(ends[s], ends[s + 1]) for s in kept]
    index = torch.cat([torch.arange(0), *parts]).to(batch["actions"].device)
    # Rows that are there once are numbered among all rows.
    left_out = ("unique_rows", "unique_index")
    made = {name: value for name, value in batch.items() if name not in left_out}
    made |= {name: batch[name][index] for name in _BY_ROW if name in batch}
    lengths = torch.tensor([0, *map(len, parts)], dtype=torch.int32)
    made["cu_seqlens"] = lengths.cumsum(0, dtype=torch.int32).to(batch["cu_seqlens"].device)
    if "anchors" in batch:
        states = int(batch["anchors"]["ends"][count])
        made["anchors"] = {
            name: value[:states] if isinstance(value, Tensor) and name != "ends" else value
            for name, value in batch["anchors"].items()
        }
        if states == 0:
            del made["anchors"]
    return made


def without_repeats(batch: dict[str, Any], accelerator: Any) -> dict[str, Any]:
    """The last batch of this process without the pairs that accelerate took from the beginning to
    fill the last batch of all processes; any other batch as it is."""
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return batch
    size = state.active_dataloader.total_batch_size // accelerator.num_processes
    return first_pairs(batch, max(0, state.remainder - size * accelerator.process_index))


class NumberedStream(TorchStream):
    """A stream whose rows know their number, for `of_stream`. Every process reads all of it, and
    accelerate gives it its part of each batch: also of a stream of many files, which accelerate
    would else hand out by file, so that processes would end apart."""

    def __init__(self, stream: IterableDataset) -> None:
        self.stream = stream

    def set_epoch(self, epoch: int) -> None:
        self.stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, row in enumerate(self.stream):
            yield {**row, _NUMBER: number}


class NumberedCollator:
    """Of the rows of a `NumberedStream`: a batch has their ``numbers`` too, int64 [P]."""

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, features: list[Any]) -> dict[str, Any]:
        numbers = torch.tensor([feature[_NUMBER] for feature in features])
        return {**self.collate(features), "numbers": numbers}


def of_stream(batch: dict[str, Any], accelerator: Any) -> dict[str, Any]:
    """A batch of a `NumberedStream` without the pairs that accelerate took from the beginning to
    fill the last batch of all processes; any other batch as it is."""
    numbers = batch.pop("numbers", None)
    if numbers is None:
        return batch
    size = len(numbers)
    place = torch.arange(size) + size * accelerator.process_index
    own = numbers % (size * accelerator.num_processes) == place
    return first_pairs(batch, int(own.sum()))


def countable(dataset: Any, processes: int) -> Any:
    """A data set to measure on, or a dict of them. A stream is read to its end where several
    processes share it: of how many pairs its last batch is short is known then."""
    if isinstance(dataset, dict):
        return {name: countable(one, processes) for name, one in dataset.items()}
    if processes == 1 or not isinstance(dataset, IterableDataset):
        return dataset
    return Dataset.from_list(list(dataset))


def totals(batches: list[dict[str, Any]], accelerator: Any, device: Any, world: bool) -> Tensor:
    """Pairs, actions and states of anchors in all micro-batches of an update, int64 [3]; over all
    processes if ``world``. (Whole numbers: an engine may cast what floats to 16 bits.)"""
    counts = torch.zeros(3, dtype=torch.int64)
    for batch in batches:
        anchors = batch["anchors"]["rows"] if "anchors" in batch else ()
        pairs, actions = (len(batch["cu_seqlens"]) - 1) // 2, (batch["actions"] != -100).sum()
        counts += torch.tensor([pairs, int(actions), len(anchors)])
    if world and accelerator.num_processes > 1:
        counts = accelerator.reduce(counts.to(device), reduction="sum").cpu()
    return counts


def check_agreement(found: Mapping[str, Any], accelerator: Any) -> None:
    """ValueError, in all processes, where they have found different things of the same name."""
    if accelerator.num_processes == 1:
        return
    of_all = gather_object([dict(found)])
    for name in found:
        for number, other in enumerate(of_all):
            if other[name] != of_all[0][name]:
                raise ValueError(
                    f"{name}: {of_all[0][name]!r} in process 0, {other[name]!r} in process "
                    f"{number}: each needs the same model, loaded whole "
                    "(fsdp_cpu_ram_efficient_loading: false)"
                )


@contextmanager
def together(accelerator: Any, what: str) -> Iterator[None]:
    """An error in the block in one process is an error of all: none goes on alone, to wait for the
    others until a time-out. No process may wait for another inside.

    Raises:
        The process's own error; or OSError with that of another.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    if accelerator.num_processes > 1:
        of_all = gather_object([None if error is None else f"{type(error).__name__}: {error}"])
        failed = [pair for pair in enumerate(of_all) if pair[1] is not None]
        if error is None and failed:
            number, message = failed[0]
            error = OSError(f"could not {what}: process {number}: {message}")
    if error is not None:
        raise error


def of_first(value: Any, accelerator: Any) -> Any:
    """What the first process has."""
    return broadcast_object_list([value])[0] if accelerator.num_processes > 1 else value


def without_waiting(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host's on the device; from pinned memory, for which nobody waits."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
