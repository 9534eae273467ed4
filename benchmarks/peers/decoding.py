"""Combined-logits decoding as it is written without this package.

Two forwards per token with PEFT's `disable_adapter()` around one of them, a cache for each, a
log-softmax of the base, the sum, transformers' processors, softmax, multinomial (or argmax).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList


@torch.no_grad()
def generate(
    peft_model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    new: int,
    alpha_0: float,
    alpha_tilde: float,
    center: float,
    warpers: LogitsProcessorList | None,
    clock: Callable[[Tensor, None], Any] | None = None,
) -> Tensor:
    """int64 [B, T + new] from left-padded prompts; greedy without ``warpers``."""
    q_cache, base_cache = DynamicCache(), DynamicCache()
    step_ids, mask = input_ids, attention_mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for _ in range(new):
        inputs = {
            "input_ids": step_ids,
            "attention_mask": mask,
            "position_ids": positions,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        z_q = peft_model(**inputs, past_key_values=q_cache).logits[:, -1].float()
        with peft_model.disable_adapter():
            z_b = peft_model(**inputs, past_key_values=base_cache).logits[:, -1].float()
        q_values = z_q - center * z_b
        scores = (q_values + alpha_0 * torch.log_softmax(z_b, -1)) / alpha_tilde
        if warpers is None:
            step_ids = scores.argmax(-1, keepdim=True)
        else:
            probs = torch.softmax(warpers(input_ids, scores), -1)
            step_ids = torch.multinomial(probs, num_samples=1)
        input_ids = torch.cat([input_ids, step_ids], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        positions = positions[:, -1:] + 1
        if clock is not None:
            clock(input_ids, None)
    return input_ids
