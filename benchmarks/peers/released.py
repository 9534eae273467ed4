"""A training step as the paper's released code does it: two full forwards, float32 logits at every
position of the padded batch, its loss, backward. (Its two discarded cross-entropies and its logging
are left out, which flatters it.)"""

import torch
from torch import Tensor

from qadapter import QAdapterModel
from qadapter.reference import released_loss


def labels_of(batch: dict[str, Tensor]) -> Tensor:
    """input_ids with -100 on the prompts: everything before the first action of a sequence."""
    labels = batch["input_ids"].clone()
    width = labels.shape[1]
    first_rows = batch["rows"][batch["cu_seqlens"][:-1].long()] % width
    labels[torch.arange(width, device=labels.device) <= first_rows[:, None]] = -100
    return labels


def step(
    model: QAdapterModel, batch: dict[str, Tensor], labels: Tensor, backward: bool = True
) -> Tensor:
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with model.adapter_off():
        base_logits = model.peft_model(**inputs, use_cache=False).logits.float().detach()
    q_logits = model.peft_model(**inputs, use_cache=False).logits.float()
    settings = {"alpha_0": 0.01, "alpha_tilde": 1.0, "gamma": 1.0, "beta": 0.1}
    loss = released_loss(base_logits, q_logits, **inputs, labels=labels, **settings)
    if backward:
        loss.backward()
    return loss.detach()
