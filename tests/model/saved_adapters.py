"""Saved adapters of many kinds, for what exports and merges them."""

import torch
from peft import LoraConfig, PeftModel

from qadapter import QAdapterModel
from tests.tiny_models import make_base

IDS = torch.randint(5, 97, (2, 12), generator=torch.Generator().manual_seed(1))
ATTENTION = ["q_proj", "v_proj"]
KINDS = {
    "plain": {"r": 4, "lora_alpha": 12},
    "other": {"r": 3, "lora_alpha": 7, "target_modules": ["v_proj", "down_proj"]},
    "rslora": {"r": 4, "use_rslora": True},
    "patterns": {
        "r": 4,
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6},
        "alpha_pattern": {"v_proj": 3, "q_proj": 5},
    },
    "rslora-patterns": {"r": 4, "use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "bias": {"r": 4, "lora_bias": True},
    "embedding": {"r": 4, "target_modules": ["embed_tokens", "q_proj", "lm_head"]},
    "some-layers": {"r": 4, "target_modules": ATTENTION, "layers_to_transform": [0, 2]},
    "gaussian": {"r": 4, "init_lora_weights": "gaussian", "lora_dropout": 0.1},
    "strength-2": {"r": 4},
}


def moved(model, seed):
    """All of the LoRA's weights random, biases and embeddings too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def save_all(folder):
    """Their base, and one adapter of each of KINDS."""
    make_base().save_pretrained(folder / "base")
    for seed, (name, options) in enumerate(KINDS.items()):
        alphas = {"alpha_0": 0.5, "alpha_tilde": 0.5} if name == "strength-2" else {}
        lora = LoraConfig(**{"target_modules": ATTENTION, **options})
        model = QAdapterModel.from_pretrained(folder / "base", lora_config=lora, **alphas)
        moved(model, seed).save_pretrained(folder / name)


def in_peft(folder):
    return PeftModel.from_pretrained(make_base(), str(folder)).eval()
