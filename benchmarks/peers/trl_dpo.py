"""TRL's DPOTrainer on the same pairs, token for token, and on the same weights.

Its own collator and its own loss with beta 0.1, without gradient checkpointing and mixed
precision, which the others do not use either. It computes entropies, mean logits and accuracies for
its logs in every step and cannot be told not to. It trains another objective: this is what people
come from, not the same work.
"""

import importlib
import tempfile
from collections.abc import Callable
from typing import Any

from benchmarks.bases import sharing_copy
from benchmarks.peers import why_not

NAME = "TRL DPO"
CANNOT = (
    "trains DPO, which has no soft value and no regulariser; pads; computes metrics in every step "
    "and cannot be told not to; its logits are rounded to the dtype of the hidden states"
)


def reason() -> str:
    return why_not("trl.trainer.dpo_trainer", "trl")


class Trainer:
    """One trainer, whose model shares all weights with ``peft_model``."""

    def __init__(self, peft_model: Any, tokenizer: Any, device: str) -> None:
        import datasets

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
            self.trainer = trl.DPOTrainer(
                sharing_copy(peft_model), args=arguments, train_dataset=some,
                processing_class=tokenizer,
            )  # fmt: skip
        self.trainer.model.train()

    def step(self, pairs: list[dict[str, Any]]) -> Callable[[], Any]:
        """A step, forward and backward, on tokenised pairs."""
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        rows = [{name: list(pair[name]) for name in names} for pair in pairs]
        batch = self.trainer._prepare_inputs(self.trainer.data_collator(rows))

        def run() -> Any:
            loss = self.trainer.compute_loss(self.trainer.model, batch)
            loss.backward()
            return loss.detach()

        return run
