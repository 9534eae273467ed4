"""Which of PEFT's adapters leave the base as it is and can be turned off: read off their configs.

What a config cannot tell is tried on a few tokens: `qadapter.model.probe`. docs/peft.md has the
table of everything that PEFT offers.
"""

import json
from typing import Any

from peft import PeftConfig, PeftModel
from torch import nn

# Initialisations of LoRA that take something out of the frozen weights. Turning the adapter off
# does not put it back, and PEFT does it again wherever such an adapter is loaded.
_MOVES_THE_BASE = {
    "pissa": "PiSSA takes the largest singular values out of the base",
    "olora": "OLoRA takes its adapter out of the base",
    "corda": "CorDA takes its adapter out of the base",
    "loftq": "LoftQ replaces the base by a quantised one",
    "lora_ga": "LoRA-GA takes its adapter out of the base",
}
_BASE_IS_MOVED = (
    "there would be no base stream left to compose with. Use init_lora_weights=True, 'gaussian', "
    "'orthogonal', 'eva' or 'mica'; a trained PiSSA, OLoRA or CorDA adapter becomes a plain LoRA "
    "with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
)


class BaseMoved(ValueError):
    """An adapter has changed the base, and deleting it would not change it back."""


def refuse_adapter(name: str, config: PeftConfig, model: nn.Module | None = None) -> None:
    """ValueError for an adapter with which the streams would not be the base and the adapter.

    Args:
        name: of the adapter, for the message.
        config: its config.
        model: the base, where there is one.
    """
    moves = _why_the_base_moves(config)
    if moves is not None:
        raise BaseMoved(f"adapter {name!r}: {moves}; {_BASE_IS_MOVED}")
    reason = _why_refused(config, model)
    if reason is not None:
        raise ValueError(f"adapter {name!r}: {reason}")


def refuse(peft_model: PeftModel) -> None:
    """`refuse_adapter` for all that a model has: one of them is enough to move the base."""
    if str(peft_model.active_adapter) not in peft_model.peft_config:
        raise ValueError(
            "the model's own adapter was deleted: load one and make it the active one "
            "(peft_model.load_adapter, peft_model.set_adapter)"
        )
    active = peft_model.active_adapters
    if len(active) != 1:
        raise ValueError(f"expected one active adapter, got {len(active)}: {', '.join(active)}")
    for name, config in peft_model.peft_config.items():
        refuse_adapter(name, config, peft_model.get_base_model())


def differ(seen: dict[str, PeftConfig], peft_model: PeftModel) -> bool:
    """Whether there are other adapters than those seen, or more than one is active.

    One that was deleted and loaded again under its name is another: its config is another object.
    """
    now = peft_model.peft_config
    return (
        len(seen) != len(now)
        or any(seen.get(name) is not config for name, config in now.items())
        or len(peft_model.active_adapters) != 1
    )


def _why_the_base_moves(config: PeftConfig) -> str | None:
    kind = getattr(config, "init_lora_weights", None)
    if isinstance(kind, str):
        # "pissa_niter_4" and the like
        for prefix, what in _MOVES_THE_BASE.items():
            if kind.lower().startswith(prefix):
                return f"init_lora_weights={kind!r}: {what}"
    if getattr(config, "kasa_config", None):
        return "kasa_config: KaSA cuts the smallest singular values off the base"
    if getattr(config, "layer_replication", None):
        return "layer_replication: repeats layers of the base, with the adapter off too"
    return None


def _why_refused(config: PeftConfig, model: nn.Module | None) -> str | None:
    def option(name: str) -> Any:
        return getattr(config, name, None)

    if config.is_prompt_learning:
        return "prompt-learning adapters change the sequence: expected a LoRA"
    if config.peft_type == "LILY":
        return (
            "Lily weighs its experts by the mean over all tokens of a batch, so that a token's "
            "logits depend on later tokens and on other rows"
        )
    if option("alora_invocation_tokens"):
        return (
            "alora_invocation_tokens: an activated LoRA counts from its invocation tokens on, which"
            " PEFT looks for in a whole text; not known in a packed batch or at a decoding step"
        )
    if option("arrow_config"):
        return "arrow_config: routes between other adapters, which are not saved with this one"
    if option("use_qalora") and getattr(model, "quantization_method", None) != "gptq":
        return "use_qalora: PEFT has it for GPTQ bases only and gives a plain LoRA on others"
    if option("sample_at_inference"):
        return "sample_at_inference: the adapter's logits would be others at every forward"
    if option("bias") not in (None, "none", False) and model is not None and _has_bias(model):
        return (
            f"bias={option('bias')!r}: trains biases of the base, which must stay frozen; "
            "lora_bias=True gives the LoRA biases of its own"
        )
    try:
        # As PEFT writes it: known now, not when the training has ended.
        parts = config.to_dict().items()
        json.dumps({k: list(v) if isinstance(v, set) else v for k, v in parts}, sort_keys=True)
    except (TypeError, ValueError) as error:
        return f"its config cannot be saved as JSON: {error}"
    return None


def _has_bias(model: nn.Module) -> bool:
    return any(
        name.endswith(".bias") and ".lora_" not in name for name, _ in model.named_parameters()
    )
