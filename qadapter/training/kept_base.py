"""What `QAdapterTrainer` keeps of the base, computed before training: the base cache."""

import logging
from pathlib import Path
from typing import Any

import torch

from qadapter.model import quantised, sharded
from qadapter.model.modeling import QAdapterModel
from qadapter.training import base_cache
from qadapter.training.base_cache import BaseCache
from qadapter.training.engines import EngineTraining

logger = logging.getLogger(__name__)

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class KeptBase(EngineTraining):
    """A base class of `QAdapterTrainer`."""

    @property
    def _autocast_dtype(self) -> torch.dtype | None:
        """Of the autocast that the model runs under. These engines have none: they cast weights."""
        casts = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return None if casts else _DTYPES.get(self.accelerator.mixed_precision)

    def _check_base_dtype(self) -> None:
        """ValueError where what is kept of the base before training would not be what the engine
        computes: it casts weights to 16 bits, which a base in float32 is not in yet."""
        dtype = _DTYPES.get(self.accelerator.mixed_precision)
        engine = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if engine and dtype is not None and self._own.hf_model.dtype != dtype:
            name = str(dtype).removeprefix("torch.")
            raise ValueError(
                f"precompute_base, anchors: the base is in {self._own.hf_model.dtype}, and its "
                f"shards compute in {name}: load it in {name} (dtype={name!r})"
            )

    def _cache_directory(self) -> Path:
        return Path(self.args.base_cache_dir or Path(str(self.args.output_dir)) / "base-cache")

    def _base_identity(self) -> dict[str, Any]:
        """Of what is kept of the base (`base_identity.identity`)."""
        if sharded.is_sharded(self._own):
            raise ValueError(
                "precompute_base, anchors: what is kept of the base is computed before an engine "
                "shards the model: train before evaluating, and with a new trainer each time"
            )
        self._check_base_dtype()
        own, tokenizer, dtype = self._own, self.processing_class, self._autocast_dtype
        return base_cache.identity(own, tokenizer, self.args.max_length, autocast=dtype)

    def _precomputed_base(self, collate: Any) -> BaseCache:
        own, dtype, directory = self._own, self._autocast_dtype, self._cache_directory()
        if quantised.mixes_rows(own.hf_model):
            raise ValueError(
                "precompute_base: bitsandbytes' int8 takes columns with outliers from all rows of "
                "a batch, so that what the base makes of a pair depends on the others: take "
                "llm_int8_threshold=0, or nf4"
            )
        made_with = self._base_identity()
        with_hidden = own.alpha_0 != own.center and self._hidden_states_fit(own)
        with self.accelerator.main_process_first():
            cache = BaseCache.open(directory, made_with, with_hidden)
            if self.accelerator.is_main_process:
                with torch.autocast(own.device.type, dtype, enabled=dtype is not None):
                    computed, reused = base_cache.precompute(
                        own,
                        self.train_dataset,
                        cache,
                        collate,
                        progress=not self.args.disable_tqdm,
                    )
                logger.info("base cache %s: %d computed, %d there", directory, computed, reused)
        cache.reload()
        return cache

    def _hidden_states_fit(self, own: QAdapterModel) -> bool:
        head: Any = own.hf_model.get_output_embeddings()  # a config may have no hidden_size
        needed = base_cache.hidden_mib(
            self.train_dataset, head.in_features, own.hf_model.dtype.itemsize
        )
        if needed > self.args.base_hidden_mib:
            logger.warning(
                "alpha_0 != center: the base's hidden states would take %.0f MiB on disk, above "
                "base_hidden_mib=%g, so that every step runs the base; its logsumexp is cached",
                needed,
                self.args.base_hidden_mib,
            )
        return needed <= self.args.base_hidden_mib
