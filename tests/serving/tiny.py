"""Tiny random models of the architectures that are served, and adapters on them.

Heads are of 32 entries: vLLM's attention on the CPU knows none smaller.
"""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from qadapter import QAdapterModel

LAYERS, VOCAB = 3, 97
KINDS = ("llama", "mistral", "qwen2", "qwen3", "gemma3")


def config(kind: str, **options: Any) -> Any:
    import transformers as tf

    classes = {
        "llama": tf.LlamaConfig,
        "mistral": tf.MistralConfig,
        "qwen2": tf.Qwen2Config,
        "qwen3": tf.Qwen3Config,
        "gemma2": tf.Gemma2Config,
        "gemma3": tf.Gemma3TextConfig,
        "gpt_neox": tf.GPTNeoXConfig,
    }
    settings = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": VOCAB,
        "max_position_embeddings": 256,
        # Logits far from flat; Gemma scales its embeddings up.
        "initializer_range": 0.1 if kind.startswith("gemma") else 0.2,
        "tie_word_embeddings": kind == "qwen3",
        "bos_token_id": 1,
        "eos_token_id": None,  # answers are as long as they are asked to be
        "pad_token_id": 0,
    }
    if kind == "mistral":
        settings["sliding_window"] = None
    if kind.startswith("gemma"):
        settings["query_pre_attn_scalar"] = 32
        settings["sliding_window"] = 16  # shorter than the prompts
    if kind == "qwen2":
        settings.pop("head_dim")
        settings["hidden_size"] = 128
    return classes[kind](**settings | options)


def save_base(folder: Path, kind: str, **options: Any) -> Path:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(kind, **options), dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


def save_adapter(
    folder: Path, base: Path, lora: LoraConfig | None = None, seed: int = 1, **options: Any
) -> QAdapterModel:
    """An adapter that changes most tokens, on every linear layer of the trunk if ``lora`` does not
    say otherwise; the model that it was saved from."""
    torch.manual_seed(seed)
    lora = lora or LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    model = QAdapterModel.from_pretrained(base, lora_config=lora, dtype=torch.float32, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return model.eval()
