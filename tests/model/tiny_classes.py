"""A tiny random model of every causal LM class of transformers, made from its config class."""

import dataclasses
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, SiglipVisionConfig, set_seed
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 97
LARGEST = 4_000_000

# By the names that configs have for them; a config takes those that it has.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "emb_dim", "embedding_dim"), 32),
    **dict.fromkeys(
        ("embedding_size", "word_embed_proj_dim", "lru_width", "input_embedding_size"), 32
    ),
    **dict.fromkeys(("output_embedding_size", "attention_hidden_size", "projection_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks"), 4),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers",), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "n_inner", "dim_ff"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim", "feed_forward_size"), 48),
    **dict.fromkeys(("ffn_hidden_size", "intermediate_size_mlp", "shared_intermediate_size"), 48),
    **dict.fromkeys(("dense_intermediate_size", "expert_ffn_hidden_size", "d_ff"), 48),
    **dict.fromkeys(("shared_expert_intermediate_size", "block_ffn_dim"), 48),
    **dict.fromkeys(("moe_shared_expert_intermediate_size",), 48),
    **dict.fromkeys(("prefix_dense_intermediate_size", "shared_experts_intermediate_size"), 48),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_nope_head_dim", "attention_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "dim_head", "attention_head_size", "d_head"), 8),
    **dict.fromkeys(("swa_head_dim", "global_head_dim", "swa_v_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("rotary_dim", "index_topk"), 4),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_d_ssm",), 64),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_heads"), 2),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("sliding_window", "attention_window_size", "sliding_window_size"), 6),
    **dict.fromkeys(("window_size", "attention_chunk_size"), 6),
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "unpadded_vocab_size"), VOCAB),
    **dict.fromkeys(("vocab_size_per_layer_input",), VOCAB),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank", "gated_norm_rank"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    "context_length": 128,
    "is_decoder": True,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 0,
    "initializer_range": 0.2,
    "init_std": 0.2,
    "type_vocab_size": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Dropout is off in any case; these are the same in training and evaluation.
    "router_jitter_noise": 0.0,
    "input_jitter_noise": 0.0,
}

# What the names above do not settle.
_MIXED = ["linear_attention", "full_attention"] * 2
_WINDOWS = ["sliding_attention", "full_attention"] * 2
_ASSISTANT = {
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "layer_types": _WINDOWS,
    "num_kv_shared_layers": 4,
    "global_head_dim": 8,
}

SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": _MIXED},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {
        "encoder_hash_byte_group_vocab": 101,
        "local_attention_window_len": 6,
        "patching_threshold": 4.17,
        "encoder_config": {"hidden_size_global": 32},
        "decoder_config": {"hidden_size_global": 32},
    },
    "cohere_compass_text": {
        "layer_types": _WINDOWS,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in _WINDOWS},
    },
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {
            "ffn_hidden_size": 48,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "hidden_size": 32,
        },
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "ernie4_5_moe": {"moe_k": 2},
    "gemma3n": {"text_config": {"num_kv_shared_layers": 2, "layer_types": _WINDOWS}},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": _WINDOWS},
    "gemma4_assistant": {"text_config": _ASSISTANT},
    "gemma4_unified": {
        "text_config": {"layer_types": _WINDOWS, "global_head_dim": 8},
        "vision_config": {"patch_size": 2, "mm_embed_dim": 32, "mm_posemb_size": 16},
    },
    "gemma4_unified_assistant": {"text_config": _ASSISTANT},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": _MIXED},
    "kimi_linear": {"layer_types": _MIXED},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "phi4_multimodal": {"vision_config": {}, "audio_config": {}},
    "qwen4_exp": {
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "ple_layer_ids": [1],
        "ngram_vocab_size_base": 50,
        "split_ngram_parts": 1,
    },
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [8, 24],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 2,
        "hidden_size": 32,
    },
    "roc_bert": {"pronunciation_vocab_size": 50, "shape_vocab_size": 50},
    "rwkv": {"rescale_every": 2},
    "xlstm": {"embedding_dim": None, "num_blocks": None, "hidden_size": 64, "num_heads": 4},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_dt_rank": 2,
    },
    "zamba2": {"initializer_range": 0.1, "layers_block_type": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}


def config_of(
    config_class: Any, special: dict[str, Any] | None = None, defaults: dict[str, Any] | None = None
) -> Any:
    special = dict(special or {})
    given: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        if field.name in SIZES:
            given[field.name] = SIZES[field.name]
    if {"kv_lora_rank", "num_key_value_heads"} <= given.keys():  # latent attention: one each
        given["num_key_value_heads"] = given["num_attention_heads"]
    specs = getattr(config_class, "sub_configs_defaults", {})
    for name, part in (getattr(config_class, "sub_configs", None) or {}).items():
        if part is AutoConfig:  # its class goes by the model type
            part = CONFIG_MAPPING[specs[name].model_type]
        if dataclasses.is_dataclass(part):
            kept = specs[name].init_kwargs if name in specs else None
            given[name] = config_of(part, special.pop(name, None), kept)
    return config_class(**{**(defaults or {}), **given, **special})


def kinds() -> list[str]:
    """Model types, the first of each class."""
    seen: dict[str, str] = {}
    for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        seen.setdefault(name, kind)
    return sorted(seen.values())


def config_for(kind: str) -> Any:
    """Of the causal LM class itself, where the model type's own is of more parts than that."""
    config_class: Any = CONFIG_MAPPING[kind]
    wanted = class_of(kind).config_class
    if wanted in (getattr(config_class, "sub_configs", None) or {}).values():
        config_class = wanted
    config = config_of(config_class, SPECIAL.get(kind))
    if kind in ("gemma4_assistant", "gemma4_unified_assistant"):
        # As the config wants it, all layers share; of that transformers 5.23 makes no layer.
        config.text_config.num_kv_shared_layers = 2
    if kind == "gemma3n":
        # Its own tower is of the timm library. No text gets there.
        own = config.vision_config
        tower = config_of(SiglipVisionConfig)
        for name in ("vocab_size", "vocab_offset", "rms_norm_eps"):
            setattr(tower, name, getattr(own, name))
        object.__setattr__(config, "vision_config", tower)  # past the config's check of types
    return config


def class_of(kind: str) -> Any:
    return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])


def make(kind: str) -> Any:
    """A tiny model of this model type, in float32 and evaluation mode."""
    with torch.device("meta"):
        sketch = class_of(kind)._from_config(config_for(kind))
    size = sum(parameter.numel() for parameter in sketch.parameters())
    if size > LARGEST:
        raise ValueError("its config makes no model that is small enough")
    set_seed(0)
    return class_of(kind)._from_config(config_for(kind), dtype=torch.float32).eval()
