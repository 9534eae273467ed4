"""What transformers' Trainer asks of a model, for one whose base is frozen."""

from typing import Any, Self, cast

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qadapter.model import locking


def without_dropout(model: nn.Module) -> None:
    """Set the dropout to 0 that the layers which do gradient checkpointing apply themselves: it
    would follow the training mode that makes them do it."""
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            for name, value in vars(module).items():
                if "dropout" in name and isinstance(value, float):
                    vars(module)[name] = 0.0


def _adapter_modules(peft_model: PeftModel) -> set[nn.Module]:
    """What PEFT has put around the layers of the base, dropout among it."""
    found: set[nn.Module] = set()
    for layer in peft_model.modules():
        if isinstance(layer, BaseTunerLayer):
            base = set(layer.get_base_layer().modules())
            found |= {module for module in layer.modules() if module not in base}
    return found


class TrainerHooks(nn.Module):
    """Training mode and gradient checkpointing of a PEFT model; a base class."""

    peft_model: PeftModel

    @property
    def hf_model(self) -> PreTrainedModel:
        """The transformers model, LoRA layers in place."""
        return cast(PreTrainedModel, self.peft_model.base_model.model)

    @property
    def _no_split_modules(self) -> list[str]:
        """Classes of layers that an engine may shard one at a time, those that are there: an FSDP2
        unit each. (What is left, embedding, last norm and head, is a unit too, which is whole
        during forward and backward: the loss reads the head's weight outside of its module.)"""
        there = {type(module).__name__ for module in self.hf_model.modules()}
        return sorted(there & set(self.hf_model._no_split_modules or ()))

    def train(self, mode: bool = True) -> Self:
        """Training mode for the adapter alone.

        The base is frozen, so its dropout would be noise between the two streams: it stays off.
        The adapter's own dropout and the layers that do gradient checkpointing follow ``mode``.
        """
        with locking.alone(self.hf_model):  # another thread's decoding has its own mode
            super().train(mode)
            if mode:
                adapter = _adapter_modules(self.peft_model)
                for module in self.peft_model.modules():
                    checkpoints = isinstance(module, GradientCheckpointingLayer)
                    module.training = checkpoints or module in adapter
        return self

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Recompute activations in backward; the base stream keeps none and is not affected."""
        model = self.hf_model
        model.enable_input_require_grads()
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable(
                activation_checkpointing_kwargs=activation_checkpointing_kwargs, **kwargs
            )
        else:
            model.gradient_checkpointing_enable(activation_checkpointing_kwargs)
        locking.recompute_alone(model)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        self.hf_model.gradient_checkpointing_disable()
        self.hf_model.disable_input_require_grads()
