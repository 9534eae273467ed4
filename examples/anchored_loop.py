"""The loss with an anchor in a loop of one's own: a new preference, and text that shall not change.

    python examples/anchored_loop.py
    python examples/anchored_loop.py --model smollm2 --steps 8

The anchors are states of other text. What the loss needs of the base there is made once
(`QF.base_moments`); in a step their rows go through the same operation as the pairs', without
actions, and `QF.kl_to_base` makes KL(base || policy) of its soft values: exact over the whole
vocabulary, and without the base or any logits. `QAdapterTrainer` does this from ``anchor_coef`` or
``kl_budget``, and makes the anchors by the base.
"""

from typing import Any

import torch
from _common import load, options, preference_pairs
from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader

from qadapter import functional as QF
from qadapter.outputs import ResidualValues
from qadapter.text.anchors import Anchor, tokenize_anchor
from qadapter.text.collator import PreferenceCollator
from qadapter.text.data import prepare_dataset

COEF = 3.0  # of the anchors' KL, nats a token
KEPT = [
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Name a primary colour.", "Blue is a primary colour."),
    ("How many days has a week?", "A week has seven days."),
    ("What do bees make?", "Bees make honey and wax."),
]


def hidden_states(model: PeftModel, batch: dict[str, Any], rows: Tensor) -> Tensor:
    """[N, D]: last hidden states, without the head."""
    trunk: Any = model.get_base_model().base_model
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return trunk(**inputs, use_cache=False)[0].flatten(0, 1)[rows]


def main(argv: list[str] | None = None) -> list[float]:
    args = options(__doc__, argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load(args.model)
    model.to(device)
    head: Any = model.get_base_model().get_output_embeddings()
    pairs = prepare_dataset(preference_pairs(4 * args.pairs), tokenizer, max_length=512)
    collate = PreferenceCollator(tokenizer.eos_token_id)
    anchors: list[Anchor] = [
        tokenize_anchor(
            {
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ]
            },
            tokenizer,
        )
        for question, answer in KEPT
    ]

    def moved(batch: dict[str, Any]) -> dict[str, Any]:
        return {k: moved(v) if isinstance(v, dict) else v.to(device) for k, v in batch.items()}

    # Once: the base alone in the anchors' states.
    kept = moved(collate([], anchors))
    with torch.no_grad(), model.disable_adapter():
        base_hidden = hidden_states(model, kept, kept["anchors"]["rows"])
    moments = QF.base_moments(base_hidden, head.weight)
    unused = torch.zeros_like(moments.lse)  # log-probabilities of actions that the anchors lack

    def losses(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The preference's, and the anchors' KL."""
        only_pairs, rows, more = batch["anchors"]["pair_inputs"], batch["rows"], len(moments.lse)
        with torch.no_grad(), model.disable_adapter():
            base = hidden_states(model, only_pairs, rows)
            of_base = QF.linear_residual_values(base, base, head.weight, batch["actions"])
        q_hidden = hidden_states(model, batch, torch.cat((rows, batch["anchors"]["rows"])))
        values = QF.linear_residual_values(
            None,
            q_hidden,
            head.weight,
            torch.cat((batch["actions"], batch["actions"].new_full((more,), -100))),
            base_lse=torch.cat((of_base.base_lse, moments.lse)),
            base_logp=torch.cat((of_base.base_logp, unused)),
        )
        of_pairs = ResidualValues(*(field[:-more] for field in values))
        loss = QF.preference_loss(
            of_pairs, batch["actions"], batch["cu_seqlens"], length_norm="none", bt_scale=0.1
        ).loss
        return loss, QF.kl_to_base(values.value[-more:], q_hidden[-more:], moments).mean()

    loader = DataLoader(
        pairs, batch_size=args.pairs, collate_fn=lambda features: collate(features, anchors)
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0)
    made: list[float] = []
    while len(made) < args.steps:
        for batch in loader:
            loss, kl = losses(moved(batch))
            (loss + COEF * kl).backward()
            optimizer.step()
            optimizer.zero_grad()
            made.append(loss.item())
            print(f"step {len(made):3}  preference {made[-1]:.4f}  KL on anchors {kl:.5f} nats")
            if len(made) == args.steps:
                break
    print(f"{args.model}: preference {made[0]:.4f} -> {made[-1]:.4f} in {args.steps} steps")
    return made


if __name__ == "__main__":
    main()
