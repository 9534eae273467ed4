"""What the examples share: a model with a LoRA, a tokenizer and a few preference pairs.

Without ``--model`` the model is tiny and random and its tokenizer has one id a byte, so that every
example runs in seconds without a download. ``--model smollm2`` is the packaged SmolLM2-135M;
anything else is what `from_pretrained` takes.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import qadapter
from qadapter.model.precision import base_dtype
from qadapter.text.data import load_preference_data

# The pairs of the demo: the chosen answer opens with "In short,", the rejected one does not.
DATA = Path(qadapter.__file__).parent / "demo_data" / "train.jsonl"
CHAT = (
    "{% for m in messages %}{{ '<user>' if m['role'] == 'user' else '<assistant>' }}"
    "{{ m['content'] }}{{ '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def options(description: str | None, argv: list[str] | None, **defaults: Any) -> argparse.Namespace:
    """The command line that the examples have in common."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument(
        "--model", default="tiny", help="tiny (random, the default), smollm2, a folder or a Hub id"
    )
    parser.add_argument("--steps", type=int, default=defaults.get("steps", 12))
    parser.add_argument("--pairs", type=int, default=4, help="pairs in a batch")
    parser.add_argument("--lr", type=float, help="default 1e-2 for the tiny model, else 1e-3")
    args = parser.parse_args(argv)
    if args.lr is None:
        args.lr = 1e-2 if args.model == "tiny" else 1e-3
    return args


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<pad>", "</s>", "<user>", "<assistant>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*special, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", chat_template=CHAT
    )


def load_base(name: str) -> tuple[PreTrainedModel, Any]:
    """The frozen model and its tokenizer."""
    torch.manual_seed(0)
    if name != "tiny":
        source = str(qadapter.packaged_model(name)) if name == "smollm2" else name
        dtype = base_dtype("auto", source)  # not the checkpoint's where this machine is slow in it
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        return model.eval(), AutoTokenizer.from_pretrained(source)
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


def lora_config() -> LoraConfig:
    return LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", target_modules="all-linear")


def load(name: str) -> tuple[PeftModel, Any]:
    """The model with a fresh LoRA, which does nothing yet, and its tokenizer."""
    base, tokenizer = load_base(name)
    return get_peft_model(base, lora_config()), tokenizer


def preference_pairs(count: int) -> Any:
    """A `datasets.Dataset` with the columns prompt, chosen and rejected, as messages."""
    return load_preference_data(DATA).select(range(count))
