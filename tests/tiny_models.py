"""Small random models that tests make themselves; nothing is downloaded."""

from pathlib import Path

import torch
from safetensors.torch import save_file


def make_base(kind: str = "llama", *, dtype: torch.dtype = torch.float32, vocab: int = 97):
    """A random 3-layer causal LM whose logits are far from flat."""
    import transformers as tf

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    special = {"vocab_size": vocab, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if kind == "llama":
        config = tf.LlamaConfig(**sizes, **heads, **special, max_position_embeddings=256)
    elif kind == "llama-64":  # as wide as a block of bitsandbytes
        sizes |= {"hidden_size": 64, "intermediate_size": 128}
        config = tf.LlamaConfig(**sizes, **heads | {"initializer_range": 0.2}, **special)
    elif kind == "llama-tied":
        config = tf.LlamaConfig(**sizes, **heads, **special, tie_word_embeddings=True)
    elif kind == "qwen2":
        config = tf.Qwen2Config(**sizes, **heads, **special, max_position_embeddings=256)
    elif kind == "gemma2":  # logits are soft-capped
        config = tf.Gemma2Config(
            **sizes, **heads, **special, head_dim=8, final_logit_softcapping=5.0, sliding_window=8
        )
    elif kind == "gpt2":
        config = tf.GPT2Config(
            n_embd=32, n_layer=3, n_head=4, n_positions=256, initializer_range=0.3, **special
        )
    else:
        raise ValueError(kind)
    return tf.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def quantisation_of(how: str, dtype: torch.dtype = torch.float32):
    """transformers' settings; without the package that quantises, the test is skipped."""
    import pytest
    import transformers as tf

    pytest.importorskip("torchao" if how == "torchao" else "bitsandbytes")
    if how == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return tf.TorchAoConfig(Int8WeightOnlyConfig())
    if how == "nf4":
        from qadapter.model.quantised import bits_and_bytes

        return bits_and_bytes(4, dtype)
    threshold = {"int8": 0.0, "LLM.int8": 6.0}[how]
    return tf.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)


def make_quantised(folder, how: str, dtype: torch.dtype = torch.float32):
    """A random Llama, saved in ``folder``, quantised on loading."""
    import transformers as tf

    settings = quantisation_of(how, dtype)
    # By hand: save_pretrained writes in the first of several processes alone.
    base = make_base("llama-64", dtype=dtype)
    Path(folder).mkdir(exist_ok=True)
    base.config.save_pretrained(folder)
    save_file(base.state_dict(), Path(folder) / "model.safetensors", {"format": "pt"})
    return tf.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, dtype=dtype
    ).eval()


def perturb(model, std: float = 0.3):
    """Move LoRA away from its start, where it does nothing."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def make_model(kind: str = "llama", *, moved: bool = True, **composition):
    from peft import LoraConfig

    from qadapter import QAdapterModel

    torch.manual_seed(0)
    model = QAdapterModel.from_base(make_base(kind), lora_config=LoraConfig(r=4), **composition)
    # Gemma scales its embeddings up, so the adapter must push harder to be seen.
    return perturb(model, std=2.0 if kind == "gemma2" else 0.3) if moved else model


def save_two_adapters(folder, tokenizer, **lora):
    """``base`` with the tokenizer, and the adapters ``one`` and ``two`` of it, in a folder."""
    from peft import LoraConfig

    from qadapter import QAdapterModel

    make_base("llama", vocab=len(tokenizer)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for name, std in (("one", 0.3), ("two", -0.4)):
        config = LoraConfig(r=4, **lora)
        model = QAdapterModel.from_pretrained(folder / "base", lora_config=config)
        perturb(model, std=std).save_pretrained(folder / name)
    return folder
