"""The Q-Adapter loss in a subclass of transformers.Trainer: `compute_loss` and a collator.

    python examples/transformers_trainer.py
    python examples/transformers_trainer.py --model smollm2 --steps 8

Here the loss comes from the last hidden states and the frozen head, so that the logits of the
responses never exist. That is right where logits are head(last hidden state) and no more; a model
that caps or scales them wants ``logit_softcap`` or ``logit_scale``. `qadapter.QAdapterTrainer` does
all this by itself, packs the batches too, and finds out what the model does to its logits.
"""

import tempfile
from typing import Any

import torch
from _common import load, options, preference_pairs
from transformers import Trainer, TrainingArguments

from qadapter import functional as QF
from qadapter.text.collator import PreferenceCollator
from qadapter.text.data import prepare_dataset


class PreferenceTrainer(Trainer):
    # The loss below is a mean over the micro-batch: the Trainer divides by the number of these.
    loss_is_scaled_for_ga = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # what transformers before 5.19 reads
        self.margins: list[torch.Tensor] = []

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        peft_model = self.accelerator.unwrap_model(model)
        with torch.no_grad(), peft_model.disable_adapter():
            base_hidden = self.hidden_states(model, inputs)
        q_hidden = self.hidden_states(model, inputs)
        head = peft_model.get_output_embeddings()
        outputs = QF.linear_qadapter_loss(
            base_hidden, q_hidden, head.weight, inputs["actions"], inputs["cu_seqlens"]
        )
        self.margins.append(outputs.margins.mean())
        return (outputs.loss, outputs._asdict()) if return_outputs else outputs.loss

    @staticmethod
    def hidden_states(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Last hidden states of the states, [N, D]."""
        # Through the model and not its trunk, for the sake of DDP and the like.
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            output_hidden_states=True,
            use_cache=False,
            logits_to_keep=1,  # the logits are not wanted, and this makes next to none
        )
        return outputs.hidden_states[-1].flatten(0, 1)[inputs["rows"]]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.margins:
            key = "rewards/margins" if "loss" in logs else "eval_rewards/margins"
            logs = {**logs, key: torch.stack(self.margins).mean().item()}
            self.margins.clear()
        super().log(logs, start_time)


def make_trainer(name: str, pairs: int, **settings: Any) -> PreferenceTrainer:
    model, tokenizer = load(name)
    data = prepare_dataset(preference_pairs(4 * pairs), tokenizer, max_length=512)
    pad = tokenizer.eos_token_id  # masked, so any id will do that the model knows
    return PreferenceTrainer(
        model=model,
        args=TrainingArguments(
            per_device_train_batch_size=pairs,
            per_device_eval_batch_size=pairs,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            lr_scheduler_type="constant",
            dataloader_pin_memory=torch.cuda.is_available(),
            remove_unused_columns=False,  # the collator reads columns that no model takes
            label_names=["actions"],  # so that evaluation computes the loss, too
            prediction_loss_only=True,
            **settings,
        ),
        data_collator=PreferenceCollator(pad),
        train_dataset=data,
        eval_dataset=data,
    )


def main(argv: list[str] | None = None) -> list[float]:
    args = options(__doc__, argv)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            args.model,
            args.pairs,
            output_dir=folder,
            max_steps=args.steps,
            learning_rate=args.lr,
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
    print(f"{args.model}: evaluation loss {before:.4f} -> {after:.4f} in {args.steps} steps")
    return [before, after]


if __name__ == "__main__":
    main()
