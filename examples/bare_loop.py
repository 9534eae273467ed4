"""The Q-Adapter loss in a training loop of one's own: torch, a PEFT model, nothing else of ours.

    python examples/bare_loop.py
    python examples/bare_loop.py --model smollm2 --steps 8

The loss takes the logits of two streams, the base (LoRA off) and the adapter (LoRA on), at the
states of the responses. The collator says where these are (``rows``), what was done there
(``actions``) and where one response ends and the next begins (``cu_seqlens``).
"""

import torch
from _common import load, options, preference_pairs
from peft import PeftModel
from torch.utils.data import DataLoader

from qadapter import functional as QF
from qadapter.outputs import PreferenceLoss
from qadapter.text.collator import PreferenceCollator
from qadapter.text.data import prepare_dataset


def batch_loss(model: PeftModel, batch: dict[str, torch.Tensor]) -> PreferenceLoss:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad(), model.disable_adapter():
        base_logits = model(**inputs).logits.flatten(0, 1)[batch["rows"]]
    q_logits = model(**inputs).logits.flatten(0, 1)[batch["rows"]]
    return QF.qadapter_loss(base_logits, q_logits, batch["actions"], batch["cu_seqlens"])


def main(argv: list[str] | None = None) -> list[float]:
    args = options(__doc__, argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load(args.model)
    model.to(device)
    pairs = prepare_dataset(preference_pairs(4 * args.pairs), tokenizer, max_length=512)
    pad = tokenizer.eos_token_id  # masked, so any id will do that the model knows
    loader = DataLoader(pairs, batch_size=args.pairs, collate_fn=PreferenceCollator(pad))
    # Only the LoRA's weights ask for a gradient.
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0)

    losses: list[float] = []
    while len(losses) < args.steps:
        for batch in loader:
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            outputs = batch_loss(model, batch)
            outputs.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(outputs.loss.item())
            print(
                f"step {len(losses):3}  loss {losses[-1]:.4f}  "
                f"margin {outputs.margins.mean():+.4f}  accuracy {outputs.accuracy:.2f}"
            )
            if len(losses) == args.steps:
                break
    print(f"{args.model}: loss {losses[0]:.4f} -> {losses[-1]:.4f} in {args.steps} steps")
    return losses


if __name__ == "__main__":
    main()
