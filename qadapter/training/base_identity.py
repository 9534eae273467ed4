"""What values of the frozen base depend on: the identity of a `qadapter.training.base_cache`."""

import hashlib
import json
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qadapter.model.checkpoint import is_adapter_name

FORMAT = 1
# Parts of a config that other code rewrites or that only describe it: no logit depends on them.
_WITHOUT_EFFECT = {
    *("transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "return_dict"),
    *("id2label", "label2id", "output_hidden_states", "output_attentions"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
}


def identity(
    model: Any,
    tokenizer: Any = None,
    max_length: int | None = None,
    *,
    autocast: torch.dtype | None = None,
) -> dict[str, Any]:
    """What the values depend on, JSON-able, for `BaseCache.open` to compare.

    Args:
        model: a `QAdapterModel`, neither sharded nor offloaded; its adapter does not count.
        tokenizer, max_length: what the pairs were tokenised with; None where that is not known.
        autocast: the dtype of the autocast that the base runs under (``TrainingArguments.bf16``:
            torch.bfloat16, ``fp16``: torch.float16), None for none.

    Raises:
        ValueError: a weight that is not in memory.
    """
    base = model.hf_model
    content = {
        "format": FORMAT,
        "vocab_size": int(base.get_input_embeddings().weight.shape[0]),
        "dtype": str(base.dtype).removeprefix("torch."),
        "autocast": "off" if autocast is None else str(autocast).removeprefix("torch."),
        "weights": weights_hash(base),
        # With soft cap and scale of the logits, like everything else that shapes them.
        "config": _lasting(base.config.get_text_config().to_dict()),
        "tokenizer": None if tokenizer is None else _tokenizer_hash(tokenizer),
        "max_length": max_length,
    }
    return json.loads(json.dumps(content, default=str))


def weights_hash(model: Any) -> str:
    """32 hex digits for all weights and persistent buffers of a base, adapters left out.

    `checkpoint.fingerprint` samples some entries to recognise a base in any dtype; values that are
    reused as they are must not outlive a change anywhere, so here every byte counts.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, Tensor) or is_adapter_name(name):
            continue
        if tensor.is_meta:
            raise ValueError(f"{name} is not in memory (offloaded), so it cannot be identified")
        # PEFT's wrappers rename a weight, which stays the same weight.
        name = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        digest.update(checksum({name: tensor}).to_bytes(4, "little"))
    return digest.hexdigest()


def _lasting(config: Mapping[Any, Any]) -> dict[Any, Any]:
    # None goes too: a later transformers adds options, and None is how they are off.
    return {
        key: _lasting(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if value is not None and key not in _WITHOUT_EFFECT and not str(key).startswith("_")
    }


def _tokenizer_hash(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    how = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    # A call with padding=True or truncation=True leaves its settings in the backend.
    how = {key: value for key, value in how.items() if key not in ("padding", "truncation")}
    special = {k: str(v) for k, v in tokenizer.special_tokens_map.items() if k != "pad_token"}
    content = [how, special, getattr(tokenizer, "chat_template", None)]
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def differences(then: Any, now: Any, name: str = "") -> list[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        parts = [differences(then.get(k), now.get(k), f"{name}.{k}") for k in {**then, **now}]
        return [line for part in parts for line in part]
    return [] if then == now else [f"{name[1:]}: {json.dumps(then)} then, {json.dumps(now)} now"]


def checksum(tensors: Mapping[str, Tensor]) -> int:
    value = 0
    for name, tensor in sorted(tensors.items()):
        if hasattr(tensor, "__tensor_flatten__"):  # torchao's: of plain ones
            parts, how = tensor.__tensor_flatten__()
            inner = {f"{name}.{part}": getattr(tensor, part) for part in parts}
            value = zlib.crc32(repr(how).encode(), value)
            value = zlib.crc32(checksum(inner).to_bytes(4, "little"), value)
            continue
        octets = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        value = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)};".encode(), value)
        value = zlib.crc32(octets.data, value)
    return value
