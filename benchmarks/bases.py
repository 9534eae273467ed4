"""The bases that whole models are measured on, and the LoRA that is put into them."""

import copy
import itertools
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, LlamaConfig

from qadapter.model import large_pages
from qadapter.model.checkpoint import resolve_model

SHAPES: dict[str, dict[str, Any]] = {  # random weights
    "llama-8b": {  # that of Llama-3.1-8B
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,  # for logits that are far from flat
    },
}


def load_base(name: str, device: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    if name in SHAPES:
        torch.manual_seed(0)
        config = LlamaConfig(**SHAPES[name], max_position_embeddings=8192)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(resolve_model(name), dtype=dtype)
    model = model.eval().to(device)
    large_pages.settle(model)  # as `QAdapterModel.from_pretrained` does, for all who share it
    model.generation_config.eos_token_id = None  # all sequences get equally long
    model.generation_config.pad_token_id = 0
    return model


def sharing_copy(model: Any) -> Any:
    """The same modules again, for LoRA to be put into, around the same weights."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def lora_config(targets: str | None = None, layers: list[int] | None = None) -> LoraConfig:
    """On ``targets``, else on query and value, of all layers or of some: it costs every way the
    same, and the comparison is of the rest."""
    return LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=targets or ["q_proj", "v_proj"],
        layers_to_transform=layers,
        task_type="CAUSAL_LM",
    )
