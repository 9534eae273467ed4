"""The Q-Adapter loss in TRL: a DPOTrainer with another `compute_loss`.

    python examples/trl_trainer.py
    python examples/trl_trainer.py --model smollm2 --steps 8

TRL prepares the data, makes the LoRA, collates, checkpoints and logs as ever. Only public names of
TRL are used: `DPOTrainer`, `DPOConfig`, the override of `compute_loss`, and what its collator
gives, ``input_ids``, ``attention_mask`` and ``completion_mask``, the chosen sequences first.
As in transformers_trainer.py the logits are meant to be head(last hidden state) and no more.
"""

import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from _common import load_base, lora_config, options, preference_pairs
from trl import DPOConfig, DPOTrainer

from qadapter import functional as QF


def states(
    input_ids: torch.Tensor, completion_mask: torch.Tensor, cut: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, actions and cu_seqlens of a padded batch.

    A state is a position whose next token belongs to the response; that token is the action. A
    response that was ``cut`` off went on: its last token is a state, too, whose action is unknown.
    """
    actions = input_ids.roll(-1, 1).masked_fill(completion_mask.roll(-1, 1) == 0, -100)
    actions[:, -1] = -100  # what rolled around
    is_state = actions != -100
    position = torch.arange(input_ids.shape[1], device=input_ids.device)
    last = (position * completion_mask).argmax(1)
    is_state |= cut[:, None] & (position == last[:, None])
    rows = is_state.flatten().nonzero().squeeze(1)
    cu_seqlens = F.pad(is_state.sum(1).cumsum(0), (1, 0)).int()
    return rows, actions.flatten()[rows], cu_seqlens


class QAdapterDPOTrainer(DPOTrainer):
    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        length = inputs["attention_mask"].sum(1)
        last_token = inputs["input_ids"].gather(1, length[:, None] - 1).squeeze(1)
        full = torch.zeros_like(length, dtype=torch.bool)
        if self.args.max_length is not None:
            full = length == self.args.max_length
        cut = full & (last_token != self.processing_class.eos_token_id)
        rows, actions, cu_seqlens = states(inputs["input_ids"], inputs["completion_mask"], cut)

        peft_model = self.accelerator.unwrap_model(model)
        with torch.no_grad(), peft_model.disable_adapter():
            base_hidden = self.hidden_states(model, inputs, rows)
        q_hidden = self.hidden_states(model, inputs, rows)
        outputs = QF.linear_qadapter_loss(
            base_hidden,
            q_hidden,
            peft_model.get_output_embeddings().weight,
            actions,
            cu_seqlens,
        )
        return (outputs.loss, outputs._asdict()) if return_outputs else outputs.loss

    @staticmethod
    def hidden_states(
        model: Any, inputs: dict[str, torch.Tensor], rows: torch.Tensor
    ) -> torch.Tensor:
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            output_hidden_states=True,
            use_cache=False,
            logits_to_keep=1,  # the logits are not wanted, and this makes next to none
        )
        return outputs.hidden_states[-1].flatten(0, 1)[rows]


def make_trainer(name: str, pairs: int, max_length: int = 512, **settings: Any) -> DPOTrainer:
    base, tokenizer = load_base(name)
    data = preference_pairs(4 * pairs)
    return QAdapterDPOTrainer(
        model=base,
        args=DPOConfig(
            max_length=max_length,
            per_device_train_batch_size=pairs,
            per_device_eval_batch_size=pairs,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            lr_scheduler_type="constant",
            dataloader_pin_memory=torch.cuda.is_available(),
            gradient_checkpointing=False,
            bf16=torch.cuda.is_available(),
            **settings,
        ),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
        peft_config=lora_config(),
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
