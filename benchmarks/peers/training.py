"""Who takes training steps (`training_problem`), apart from this package.

TRL's trains another objective: it is what people come from, not the same work.
"""

import importlib
import tempfile
from collections.abc import Callable
from typing import Any

import datasets
import torch
from torch import Tensor

from benchmarks.bases import sharing_copy
from benchmarks.peers import why_not
from qadapter import QAdapterModel
from qadapter.reference import released_loss

CANNOT = {
    "released": "keeps float32 logits of every position of the padded batch, prompts included; has "
    "V at the wrong position and divides by the padded length",
    "TRL DPO": "trains DPO, which has no soft value and no regulariser; pads; computes metrics in "
    "every step and cannot be told not to; its logits are rounded to the dtype of the hidden "
    "states",
}


def released(model: QAdapterModel, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    """A step as the paper's released code does it: two full forwards, float32 logits at every
    position of the padded batch, its loss, backward. (Its two discarded cross-entropies and its
    logging are left out, which flatters it.)"""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    # -100 on the prompts: everything before the first action of a sequence
    labels = batch["input_ids"].clone()
    width = labels.shape[1]
    first_rows = batch["rows"][batch["cu_seqlens"][:-1].long()] % width
    labels[torch.arange(width, device=labels.device) <= first_rows[:, None]] = -100
    settings = {"alpha_0": 0.01, "alpha_tilde": 1.0, "gamma": 1.0, "beta": 0.1}

    def run() -> Tensor:
        with model.adapter_off():
            base_logits = model.peft_model(**inputs, use_cache=False).logits.float().detach()
        q_logits = model.peft_model(**inputs, use_cache=False).logits.float()
        loss = released_loss(base_logits, q_logits, **inputs, labels=labels, **settings)
        loss.backward()
        return loss.detach()

    return run


def trl_reason(tokenizer: Any) -> str:
    if reason := why_not("trl.trainer.dpo_trainer", "trl"):
        return reason
    there = tokenizer is not None
    return "" if there else "its trainer needs a tokenizer, and random weights have none"


def trl_trainer(peft_model: Any, tokenizer: Any, device: str) -> Any:
    """TRL's DPOTrainer, whose model shares all weights with ``peft_model``.

    Its own loss with beta 0.1, without gradient checkpointing and mixed precision, which the others
    do not use either.
    """
    trl = importlib.import_module("trl")
    # The trainer wants some data; what is measured is collated by hand.
    some = datasets.Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}])
    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.DPOConfig(
            output_dir=folder,
            beta=0.1,
            max_length=None,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=device == "cpu",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        model = sharing_copy(peft_model)
        trainer = trl.DPOTrainer(
            model, args=arguments, train_dataset=some, processing_class=tokenizer
        )
    trainer.model.train()
    return trainer


def trl_dpo(trainer: Any, pairs: list[dict[str, Any]]) -> Callable[[], Tensor]:
    """A step on tokenised pairs, token for token those of the others, by its own collator. It
    computes entropies, mean logits and accuracies for its logs in every step and cannot be told not
    to."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [{name: list(pair[name]) for name in names} for pair in pairs]
    batch = trainer._prepare_inputs(trainer.data_collator(rows))

    def run() -> Tensor:
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        return loss.detach()

    return run
