"""Small models and data that tests make themselves; nothing is downloaded."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest
import torch

WORDS = (  # noqa: SIM905
    "the a cat dog bird sat ran flew on under over mat tree house red blue green big small "
    "old new is was not and or but so yes no please thanks hello why how what who when where "
    "tell me about it they we you one two three four five short long answer good bad very ."
).split()


@pytest.fixture(params=["avx512", "avx2", "plain"])
def isa(request, monkeypatch):
    """The C++ kernels' vector code; skips what this CPU does not have."""
    from qadapter.ops import cpp

    monkeypatch.setenv("QADAPTER_CPU_CAPABILITY", request.param)
    if cpp.capability() != request.param:
        pytest.skip(f"this CPU has no {request.param}")
    return request.param


@pytest.fixture
def one_thread():
    """Small tensors gain nothing from more, and lose much where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A word-level chat tokenizer: one id a word, <s>, </s>, <pad>, <unk>."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "<u>", "<b>"])}
    for word in WORDS:
        vocab.setdefault(word, len(vocab))
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<u>", "<b>"],
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<u> ' if m['role'] == 'user' else '<b> ' }}{{ m['content'] }}"
        "{{ ' </s> ' }}{% endfor %}{% if add_generation_prompt %}{{ '<b> ' }}{% endif %}"
    )
    return tokenizer


def make_base(kind: str = "llama", *, dtype: torch.dtype = torch.float32, vocab: int = 97):
    """A random 3-layer causal LM whose logits are far from flat."""
    import transformers as tf

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    special = {"vocab_size": vocab, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if kind == "llama":
        config = tf.LlamaConfig(**sizes, **heads, **special, max_position_embeddings=256)
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


def preference_rows(count: int = 12) -> list[dict]:
    """Pairs in message format: chosen answers are short, rejected ones long, of varying length."""
    subjects = ["cat", "dog", "bird", "tree", "house"]
    rows = []
    for i in range(count):
        subject = subjects[i % len(subjects)]
        prompt = f"tell me about the {WORDS[14 + i % 7]} {subject}"
        chosen = "it is " + WORDS[14 + i % 7] + " ." * (i % 2)
        rejected = "it was " + "very " * (1 + i % 4) + "old and they ran under the " + subject
        rows.append(
            {
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
        )
    return rows


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def cuda_device(request, monkeypatch):
    """Where the CUDA C++ kernels run: compiled for a host (`cuda_host`), and on a GPU."""
    import cuda_host

    from qadapter.ops import cuda

    if request.param == "cuda":
        usable, reason = cuda.available()
        if not usable:
            pytest.skip(reason)
        return torch.device("cuda")
    if (reason := cuda_host.why_not()) is not None:
        pytest.skip(reason)
    monkeypatch.setattr(cuda, "extension", cuda_host.load)
    return torch.device("cpu")
