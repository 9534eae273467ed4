"""What `QAdapterTrainer` does where an engine holds the model, or the optimiser, in parts.

The engines are FSDP2 and DeepSpeed's ZeRO, through accelerate.

A checkpoint holds the adapter as a plain LoRA, written once, whatever the engine; what it holds of
the optimiser is the engine's. The base is never written.
"""

import dataclasses
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_optimizer
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer
from transformers.integrations.deepspeed import deepspeed_load_checkpoint

from qadapter import files
from qadapter.model import quantised, sharded
from qadapter.model.modeling import QAdapterModel
from qadapter.training import arguments, processes
from qadapter.training.config import QAdapterConfig

logger = logging.getLogger(__name__)

# Whose product is the number of pairs in an update.
_OF_UPDATE = ("per_device_train_batch_size", "gradient_accumulation_steps", "world_size")
# Of a `QAdapterModel`, besides its forward and `generate`.
FORWARDS = ("anchor_hidden", "both_streams", "base_statistics", "base_moments", "generate")


def _forget_evaluation(accelerator: Any, model: Any) -> None:
    """accelerate takes what was evaluated for prepared, and would leave DistributedDataParallel
    out: each process would train alone."""
    if vars(model).pop("_is_accelerate_prepared", False):
        accelerator._models.clear()
        # What an autocast was put around, so that there will not be two.
        plain = vars(model).pop("_original_forward", None)
        if plain is not None:
            model.forward = plain


def _engine_of(checkpoint: Path) -> str | None:
    """Who has saved its optimiser; None where it has none."""
    if any(checkpoint.glob("global_step*")):
        return "DeepSpeed"
    if (checkpoint / "optimizer.bin").exists() or any(checkpoint.glob("optimizer_*/")):
        return "FSDP2"
    return "DDP or one process" if (checkpoint / "optimizer.pt").exists() else None


class EngineTraining(Trainer):
    """A base class of `QAdapterTrainer`."""

    args: QAdapterConfig

    @property
    def _own(self) -> QAdapterModel:
        return self.accelerator.unwrap_model(self.model)

    # Making ready.

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if not self.is_fsdp_enabled:
            return
        plugin = self.accelerator.state.fsdp_plugin
        arguments.check_fsdp(plugin)
        if plugin.mixed_precision_policy is not None:
            # Layers compute in 16 bits. The loss and what is known of the base are float32, and
            # stay so on the way in and out; so are the sums of the gradients over processes.
            plugin.mixed_precision_policy = dataclasses.replace(
                plugin.mixed_precision_policy,
                output_dtype=None,
                cast_forward_inputs=False,
                reduce_dtype=torch.float32,
            )

    def _refuse_quantised_shards(self) -> None:
        if self.is_fsdp_enabled:
            policy = self.accelerator.state.fsdp_plugin.mixed_precision_policy
            casts = None if policy is None else policy.param_dtype
            quantised.refuse_shards(self._own.hf_model, "FSDP2", casts)
        elif self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3:
            quantised.refuse_shards(self._own.hf_model, "ZeRO-3", None)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> Any:
        folder = resume_from_checkpoint
        if folder is not None:
            self._check_checkpoint(Path(folder))
        evaluated = self.is_deepspeed_enabled and self.deepspeed is not None
        if evaluated and self.accelerator.deepspeed_engine_wrapped is None:
            raise ValueError(
                "train: under ZeRO-3 a model that was evaluated before is made ready for that "
                "alone; take eval_on_start=True, or a trainer of its own"
            )
        if isinstance(self.model, FSDPModule):
            self.model.reshard()  # what was evaluated before is as its last forward left it
        elif self.accelerator.num_processes > 1 and self.model_wrapped is self.model:
            _forget_evaluation(self.accelerator, self.model)
        if folder is None or not self.is_deepspeed_enabled:
            made = super()._prepare_for_training(max_steps, train_dataloader, folder)
        else:
            # The Trainer would ask the checkpoint for the weights of the base.
            made = super()._prepare_for_training(max_steps, train_dataloader, None)
            self._load_engine(folder)
            self._load_optimizer_and_scheduler(folder)
            self._load_scaler(folder)
        sharded.outside_forward(self._own, *FORWARDS)
        return made

    def _check_checkpoint(self, folder: Path) -> None:
        """ValueError for one whose optimiser this engine cannot read; a warning where updates were
        of another number of pairs."""
        found = _engine_of(folder)
        here = "FSDP2" if self.is_fsdp_enabled else "DDP or one process"
        here = "DeepSpeed" if self.is_deepspeed_enabled else here
        if found is not None and found != here:
            raise ValueError(
                f"{folder}: its optimiser was saved by {found}, this is {here}: resume as it was, "
                "or start anew from its adapter (--model, from_pretrained)"
            )
        parts = len(list(folder.glob("global_step*/*zero_pp_rank_*_optim_states.pt")))
        if found == "DeepSpeed" and parts != self.args.world_size:
            raise ValueError(
                f"{folder}: ZeRO keeps its optimiser in a part for each of {parts} processes, and "
                f"there are {self.args.world_size}: resume on {parts}, or start anew from its "
                "adapter (--model, from_pretrained)"
            )
        saved = folder / "training_args.json"
        before: Any = files.read_json(saved) if saved.exists() else {}
        if "world_size" in before:
            now: Any = {**self.args.to_dict(), "world_size": self.args.world_size}
            then, here_now = (math.prod(of[name] for name in _OF_UPDATE) for of in (before, now))
            if then != here_now:
                logger.warning(
                    "%s: an update was of %d pairs, and is of %d now (%s): the epoch goes on with "
                    "other pairs than those that were left",
                    folder,
                    then,
                    here_now,
                    " x ".join(_OF_UPDATE),
                )

    def _save_rng_state(self, output_dir: str) -> None:
        # Of all processes, before the first one writes what a checkpoint is known to be whole by.
        with processes.together(self.accelerator, "save the state of random numbers"):
            super()._save_rng_state(output_dir)

    def _load_engine(self, folder: str) -> None:
        """Weights and optimiser from a checkpoint of DeepSpeed."""
        deepspeed_load_checkpoint(self.model_wrapped, folder, load_module_strict=False)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.model
        if self.is_fsdp_enabled and not sharded.is_sharded(model):
            # accelerate prepares it with an optimiser alone.
            self.model = self.model_wrapped = fsdp2_prepare_model(self.accelerator, model)
            self.accelerator._models.append(self.model)
            sharded.outside_forward(self._own, *FORWARDS)
        if self._is_whole_under_deepspeed:
            # transformers has an engine for evaluation alone with ZeRO-3, and refuses others.
            self.is_deepspeed_enabled = False
            try:
                return super().evaluation_loop(*args, **kwargs)
            finally:
                self.is_deepspeed_enabled = True
                _forget_evaluation(self.accelerator, self.model)
        return super().evaluation_loop(*args, **kwargs)

    @property
    def _is_whole_under_deepspeed(self) -> bool:
        """Whether DeepSpeed, which has made no engine yet, would not shard the model."""
        if not self.is_deepspeed_enabled or self.deepspeed is not None:
            return False
        return self.accelerator.state.deepspeed_plugin.zero_stage < 3

    def _prepare_input(self, data: Any) -> Any:
        """On the device, and nothing else: under DeepSpeed the Trainer would cast what floats, and
        what is known of the base is float32."""
        if isinstance(data, Tensor):
            return data.to(self.args.device)
        return super()._prepare_input(data)

    # Files.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter, as `QAdapterModel.save_pretrained` does, once. All processes call it:
        an engine puts the adapter together."""
        own = self._own
        state = sharded.adapter_state(own) if sharded.is_sharded(own) else None
        with processes.together(self.accelerator, "save the adapter"):
            self._save(output_dir, state)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        scheduler: Any = self.lr_scheduler
        engine: Any = self.model_wrapped
        if self.is_deepspeed_enabled:
            engine.save_checkpoint(output_dir, exclude_frozen_parameters=True)
            # A scheduler of DeepSpeed's own is in its checkpoint.
            theirs = type(scheduler).__name__ == "DeepSpeedSchedulerWrapper"
            if self.args.should_save and not theirs:
                torch.save(scheduler.state_dict(), Path(output_dir) / "scheduler.pt")
        elif self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
            if self.args.should_save:
                torch.save(scheduler.state_dict(), Path(output_dir) / "scheduler.pt")
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        try:
            with processes.together(self.accelerator, "save a checkpoint"):
                super()._save_checkpoint(model, trial)
        except Exception as error:
            if self.accelerator.is_main_process:
                shutil.rmtree(folder, ignore_errors=True)
            raise OSError(f"could not save {folder}, which is removed again: {error}") from error

    def _load_best_model(self) -> None:
        folder = str(self.state.best_model_checkpoint)
        if self.is_deepspeed_enabled:
            self._load_engine(folder)
        else:
            self._load_from_checkpoint(folder)
