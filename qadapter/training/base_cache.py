"""What the frozen base contributes to a training step, computed once and kept on disk.

The base never changes, so neither do its logsumexp and its log-probability of the action in any
state row. With alpha_0 == center the loss reads no more of the base than these two numbers, and a
step that has them needs no base forward pass; otherwise it needs the base's last hidden states too,
which a cache keeps on request. `precompute` asks the model for the values, `identity` says for
which base and which data preparation they hold.

A cache is a folder with ``identity.json`` and shards, which are written under a temporary name and
never changed again. A shard holds, for E pairs of R rows in all: ``keys`` uint8 [E, 16]; ``rows``
int32 [E, 2], of the chosen and the rejected response; ``base_lse`` and ``base_logp`` float32 [R],
pair after pair, chosen rows first; and with hidden states ``base_hidden`` [R, D] and
``hidden_checksums`` int64 [E].
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from qadapter import files
from qadapter.text.data import FLAG_COLUMNS, TOKEN_COLUMNS
from qadapter.training.base_identity import checksum as checksum_of
from qadapter.training.base_identity import differences, identity, weights_hash

__all__ = [
    "BaseCache",
    "CachedCollator",
    "example_key",
    "hidden_mib",
    "identity",
    "pair_rows",
    "precompute",
    "weights_hash",
]

IDENTITY_NAME = "identity.json"
SHARDS = "base-*.safetensors"
# `precompute` writes a shard when either is reached: a crash loses no more than this.
FLUSH_SECONDS = 30.0
FLUSH_BYTES = 256 * 2**20


# What a cached value belongs to.


def example_key(feature: Mapping[str, Any]) -> str:
    """32 hex digits for a tokenised pair: of its ids and its two truncated flags, nothing else."""
    digest = hashlib.blake2b(digest_size=16)
    for column in TOKEN_COLUMNS:
        if column not in feature:
            raise ValueError(f"expected a tokenised pair with '{column}', got {', '.join(feature)}")
        ids = np.asarray(feature[column], dtype="<i8")
        digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
    digest.update(bytes(bool(feature.get(flag, False)) for flag in FLAG_COLUMNS))
    return digest.hexdigest()


def pair_rows(feature: Mapping[str, Any]) -> tuple[int, int]:
    """State rows of the chosen and of the rejected response; a truncated one has one more."""
    chosen, rejected = (
        len(feature[f"{column}_ids"]) + bool(feature.get(f"{column}_truncated", False))
        for column in ("chosen", "rejected")
    )
    return chosen, rejected


def hidden_mib(dataset: Any, dim: int, itemsize: int) -> float:
    """MiB of the last hidden states of a data set's rows, ``dim * itemsize`` bytes each; equal
    pairs, which a cache keeps once, count every time."""
    return sum(sum(pair_rows(feature)) for feature in dataset) * dim * itemsize / 2**20


# The cache.


class BaseCache:
    """Values of the base by `example_key`, on disk; made by `BaseCache.open`.

    ``cache[key]`` is a dict of CPU tensors over the n rows of a pair, chosen rows first:
    ``base_lse`` and ``base_logp`` float32 [n] and, in a cache with hidden states, ``base_hidden``
    [n, D] in their own dtype; KeyError for a pair that is not there. The first two are held in
    memory, hidden states are read when asked for. Works in forked DataLoader workers; a pickled
    cache opens its folder again. One process writes, others see new shards after `reload`.
    """

    def __init__(self, directory: str | Path, identity: dict[str, Any], with_hidden: bool) -> None:
        self.directory = Path(directory).absolute()
        self.identity = identity
        self.with_hidden = with_hidden
        self.pending_bytes = 0
        self.names = ("base_lse", "base_logp", "base_hidden")[: 3 if with_hidden else 2]
        self._pending: dict[str, tuple[dict[str, Tensor], tuple[int, int]]] = {}
        self._loaded: set[Path] = set()
        self._index: dict[str, tuple[_Shard, int, tuple[int, int], int]] = {}
        self.reload()

    @classmethod
    def open(
        cls, directory: str | Path, identity: dict[str, Any], with_hidden: bool = False
    ) -> "BaseCache":
        """Open the cache in ``directory``, or begin one there.

        Args:
            identity: what `identity` returns.
            with_hidden: keep hidden states too; pairs that were cached without count as missing.

        Raises:
            ValueError: the cache is for another base or data preparation, every difference named;
                or a damaged file, named.
        """
        path = Path(directory) / IDENTITY_NAME
        now = json.loads(json.dumps(identity))
        if path.exists():
            different = "".join(f"  {line}\n" for line in differences(files.read_json(path), now))
            if different:
                raise ValueError(
                    f"the base cache {directory} was made for something else, so that its values "
                    f"do not hold here:\n{different}Give another directory, or delete this one to "
                    "have it computed again"
                )
        elif any(Path(directory).glob(SHARDS)):
            raise ValueError(
                f"{directory} holds shards of a base cache but no {IDENTITY_NAME} to say what they "
                "belong to: give another directory, or delete this one"
            )
        else:
            files.write_json(path, now)
        return cls(directory, now, with_hidden)

    def __reduce__(self) -> Any:
        self.flush()  # the copy reads everything from disk
        return BaseCache.open, (self.directory, self.identity, self.with_hidden)

    def __len__(self) -> int:
        return len(self._index.keys() | self._pending.keys())

    def __contains__(self, key: str) -> bool:
        return key in self._index or key in self._pending

    def __getitem__(self, key: str) -> dict[str, Tensor]:
        return self._read(key)[0]

    def batch(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The values of P pairs in the N rows that `PreferenceCollator` makes of them: ``base_lse``
        and ``base_logp`` float32 [N], and ``base_hidden`` [N, D] if kept.

        KeyError for a pair that is not cached, ValueError for one with another number of rows.
        """
        chosen, rejected = [], []
        for feature in features:
            values, rows = self._read(example_key(feature))
            _check_rows(f"cached in {self.directory}", rows, feature)
            chosen.append({name: value[: rows[0]] for name, value in values.items()})
            rejected.append({name: value[rows[0] :] for name, value in values.items()})
        parts = chosen + rejected
        return {name: torch.cat([part[name] for part in parts]) for name in self.names}

    def add(self, key: str, values: Mapping[str, Tensor], rows: tuple[int, int]) -> None:
        """Keep the values of a pair in memory until `flush`; one that is there stays as it is.

        Args:
            key: the pair's `example_key`.
            values: ``base_lse``, ``base_logp`` [n] and, in a cache with hidden states,
                ``base_hidden`` [n, D]; any device, chosen rows first. Others are ignored.
            rows: the pair's `pair_rows`, which add up to n.

        Raises:
            ValueError: something missing, a wrong number of rows, a base_lse that is not finite.
        """
        if key in self:
            return
        kept = {}
        for name in self.names:
            if name not in values:
                raise ValueError(f"{name} expected, got {', '.join(values) or 'nothing'}")
            dims, dtype = 1, torch.float32
            if name == "base_hidden":
                dims, dtype = 2, values[name].dtype
            kept[name] = values[name].detach().to("cpu", dtype).contiguous()
            if kept[name].ndim != dims or len(kept[name]) != sum(rows):
                raise ValueError(
                    f"{name}: expected {rows[0]} + {rows[1]} rows in {dims} dimension(s), got "
                    f"shape {list(kept[name].shape)}"
                )
        if not kept["base_lse"].isfinite().all():
            raise ValueError("base_lse: not finite; do the base's logits overflow in its dtype?")
        self._pending[key] = kept, rows
        self.pending_bytes += sum(tensor.nbytes for tensor in kept.values())

    def flush(self) -> None:
        """Write what was added as a new shard. OSError where that fails; it is then still added."""
        if not self._pending:
            return
        kept = [values for values, _ in self._pending.values()]
        tensors = {name: torch.cat([values[name] for values in kept]) for name in kept[0]}
        keys = bytearray().join(bytes.fromhex(key) for key in self._pending)
        tensors["keys"] = torch.frombuffer(keys, dtype=torch.uint8).view(-1, 16)
        rows = [rows for _, rows in self._pending.values()]
        tensors["rows"] = torch.tensor(rows, dtype=torch.int32)
        if self.with_hidden:
            sums = [checksum_of({"base_hidden": values["base_hidden"]}) for values in kept]
            tensors["hidden_checksums"] = torch.tensor(sums, dtype=torch.int64)
        checksum = f"{checksum_of({k: v for k, v in tensors.items() if k != 'base_hidden'}):08x}"
        # With its checksum in the name, a shard never takes the place of another writer's.
        path = self.directory / SHARDS.replace("*", f"{len(self._loaded):05d}-{checksum}")
        with files.replacing_file(path) as temporary:
            save_file(tensors, temporary, {"checksum": checksum})
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        self._load(path)
        self._pending.clear()
        self.pending_bytes = 0

    def reload(self) -> int:
        """Load the shards that are new in the folder, and say how many. ValueError: a damaged one,
        named."""
        new = sorted(set(self.directory.glob(SHARDS)) - self._loaded)
        for path in new:
            self._load(path)
        return len(new)

    def _load(self, path: Path) -> None:
        shard = _Shard(path)
        if shard.has_hidden or not self.with_hidden:
            starts = accumulate((sum(rows) for rows in shard.rows), initial=0)
            entries = zip(shard.keys, starts, shard.rows, shard.hidden_checksums, strict=False)
            for key, start, rows, checksum in entries:
                self._index[key] = shard, start, rows, checksum
        self._loaded.add(path)

    def _read(self, key: str) -> tuple[dict[str, Tensor], tuple[int, int]]:
        if key in self._pending:
            values, rows = self._pending[key]
            return {name: tensor.clone() for name, tensor in values.items()}, rows
        if key not in self._index:
            raise KeyError(f"pair {key} is not in the base cache {self.directory}")
        shard, start, rows, checksum = self._index[key]
        part = slice(start, start + sum(rows))
        values = {"base_lse": shard.lse[part].clone(), "base_logp": shard.logp[part].clone()}
        if self.with_hidden:
            values["base_hidden"] = shard.hidden(part, checksum)
        return values, rows


class CachedCollator:
    """A collator whose batches carry the base's values, where all their pairs are cached."""

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]], cache: BaseCache) -> None:
        self.collate = collate
        self.cache = cache

    def __call__(self, features: list[Any]) -> dict[str, Any]:
        batch = self.collate(features)
        if all(example_key(feature) in self.cache for feature in features):
            batch.update(self.cache.batch(features))
        return batch


class _Shard:
    """One file, checked when it is opened; hidden states are checked as they are read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._hidden: Any = None
        try:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
                self.has_hidden = "base_hidden" in names
                read = {name: file.get_tensor(name).clone() for name in names - {"base_hidden"}}
                if (file.metadata() or {}).get("checksum") != f"{checksum_of(read):08x}":
                    raise ValueError("its checksum is not that of its contents")
        except (ValueError, SafetensorError) as error:
            raise self._damaged(error) from error
        self.lse, self.logp = read["base_lse"], read["base_logp"]
        self.rows: list[tuple[int, int]] = [(c, r) for c, r in read["rows"].tolist()]
        self.keys = [bytes(key).hex() for key in read["keys"].tolist()]
        sums = read.get("hidden_checksums", torch.zeros(len(self.keys), dtype=torch.int64))
        self.hidden_checksums: list[int] = sums.tolist()

    def hidden(self, part: slice, checksum: int) -> Tensor:
        """[n, D], a copy of these rows; no others are read from disk."""
        try:
            if self._hidden is None:
                self._hidden = safe_open(self.path, framework="pt").get_slice("base_hidden")
            hidden = self._hidden[part].clone()
        except SafetensorError as error:
            raise self._damaged(error) from error
        if checksum_of({"base_hidden": hidden}) != checksum:
            raise self._damaged(f"hidden states of rows {part.start}:{part.stop}: wrong checksum")
        return hidden

    def _damaged(self, error: object) -> ValueError:
        return ValueError(
            f"{self.path} is damaged ({error}). Delete this file to have its pairs computed again; "
            "the other shards can stay"
        )


def _check_rows(what: str, rows: tuple[int, int], feature: Mapping[str, Any]) -> None:
    expected = pair_rows(feature)
    if rows != expected:
        raise ValueError(
            f"{what}: expected {expected[0]} + {expected[1]} rows (chosen + rejected) of a pair, "
            f"got {rows[0]} + {rows[1]}"
        )


# Computing.


def precompute(
    model: Any,
    dataset: Any,
    cache: BaseCache,
    collate: Callable[[list[Any]], dict[str, Tensor]],
    *,
    batch_tokens: int = 4096,
    description: str = "Base statistics",
    progress: bool = True,
) -> tuple[int, int]:
    """Compute what ``cache`` lacks of a data set, equal pairs once. Call it under the autocast of
    training. An interruption or error keeps what is done, and the next call goes on from there.

    Args:
        model: has ``device`` and ``base_statistics(batch)``, which returns ``base_lse`` and
            ``base_logp`` float32 [N] and, for a cache with hidden states, ``base_hidden`` [N, D].
        dataset: tokenised pairs, as `qadapter.text.data.prepare_dataset` makes them.
        collate: a `PreferenceCollator`.
        batch_tokens: pairs of similar length run together, up to so many tokens with padding; a
            longer pair runs alone.
        description, progress: of a progress bar in pairs.

    Returns:
        The number of pairs computed, and of those that were cached or equal to another.

    Raises:
        ValueError: statistics that are missing or whose rows are not those of the data.
    """
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens: expected at least 1, got {batch_tokens}")
    missing: dict[str, tuple[int, int]] = {}
    for index, feature in enumerate(dataset):
        key = example_key(feature)
        if key not in cache and key not in missing:
            response = max(len(feature["chosen_ids"]), len(feature["rejected_ids"]))
            missing[key] = index, len(feature["prompt_ids"]) + response
    written = time.monotonic()
    silent = not (progress and missing)
    with tqdm(total=len(missing), desc=description, unit="pair", disable=silent) as bar:
        try:
            for keys in _by_length(missing, batch_tokens):
                _compute(model, {k: dataset[missing[k][0]] for k in keys}, cache, collate)
                bar.update(len(keys))
                late = time.monotonic() - written > FLUSH_SECONDS
                if late or cache.pending_bytes >= FLUSH_BYTES:
                    cache.flush()
                    written = time.monotonic()
        finally:
            cache.flush()
    return len(missing), len(dataset) - len(missing)


def _by_length(missing: dict[str, tuple[int, int]], batch_tokens: int) -> Iterator[list[str]]:
    # Longest first: if memory does not suffice, that shows at once.
    keys: list[str] = []
    for key in sorted(missing, key=lambda key: -missing[key][1]):
        if keys and 2 * missing[keys[0]][1] * (len(keys) + 1) > batch_tokens:
            yield keys
            keys = []
        keys.append(key)
    if keys:
        yield keys


def _compute(
    model: Any, features: dict[str, Any], cache: BaseCache, collate: Callable[[list[Any]], Any]
) -> None:
    batch = collate(list(features.values()))
    ends = batch["cu_seqlens"].tolist()
    moved = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    with torch.no_grad():
        statistics = model.base_statistics(moved)
    statistics = {name: statistics[name].cpu() for name in cache.names if name in statistics}
    for name, values in statistics.items():
        if len(values) != ends[-1]:
            raise ValueError(f"{name}: expected {ends[-1]} rows of a batch, got {len(values)}")
    for i, (key, feature) in enumerate(features.items()):
        parts = [slice(ends[s], ends[s + 1]) for s in (i, len(features) + i)]
        rows = (parts[0].stop - parts[0].start, parts[1].stop - parts[1].start)
        _check_rows("collator", rows, feature)
        cache.add(key, {k: torch.cat([v[p] for p in parts]) for k, v in statistics.items()}, rows)
