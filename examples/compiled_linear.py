"""The loss from hidden states inside a function under torch.compile, in one graph.

    python examples/compiled_linear.py
    python examples/compiled_linear.py --model smollm2 --steps 8

The adapter is a low-rank correction of the last hidden state, so that the base runs once, before
the training. What is compiled is the adapter, the head with the loss, and with it the backward;
batches differ in their number of rows, and still one compilation serves them all.
"""

import time

import torch
from _common import load_base, options, preference_pairs
from torch import nn

from qadapter import functional as QF
from qadapter.text.collator import PreferenceCollator
from qadapter.text.data import prepare_dataset


class HiddenAdapter(nn.Module):
    """h + up(down(h)), which starts at h."""

    def __init__(self, dim: int, rank: int = 8) -> None:
        super().__init__()
        self.down = nn.Linear(dim, rank, bias=False)
        self.up = nn.Linear(rank, dim, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.up(self.down(hidden.float())).to(hidden.dtype)


def step_loss(
    adapter: HiddenAdapter,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    actions: torch.Tensor,
    cu_seqlens: torch.Tensor,
) -> torch.Tensor:
    return QF.linear_qadapter_loss(hidden, adapter(hidden), weight, actions, cu_seqlens).loss


def gradients(adapter: HiddenAdapter, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(adapter.parameters())))


def main(argv: list[str] | None = None) -> tuple[list[float], float]:
    args = options(__doc__, argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base, tokenizer = load_base(args.model)
    base.to(device).requires_grad_(False)
    pairs = prepare_dataset(preference_pairs(4 * args.pairs), tokenizer, max_length=512)
    pad = tokenizer.eos_token_id  # masked, so any id will do that the model knows
    collate = PreferenceCollator(pad)
    batches = []
    for first in range(0, len(pairs), args.pairs):
        batch = collate([pairs[i] for i in range(first, first + args.pairs)])
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.no_grad():
            outputs = base(batch["input_ids"], batch["attention_mask"], output_hidden_states=True)
        hidden = outputs.hidden_states[-1].flatten(0, 1)[batch["rows"]]
        batches.append((hidden, batch["actions"], batch["cu_seqlens"]))

    weight = base.get_output_embeddings().weight
    adapter = HiddenAdapter(weight.shape[1]).to(device)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=args.lr, weight_decay=0.0)
    compiled_loss = torch.compile(step_loss, fullgraph=True, dynamic=True)

    losses = []
    for step in range(args.steps):
        hidden, actions, cu_seqlens = batches[step % len(batches)]
        start = time.perf_counter()
        loss = compiled_loss(adapter, hidden, weight, actions, cu_seqlens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        milliseconds = 1e3 * (time.perf_counter() - start)
        print(
            f"step {step + 1:3}  rows {len(actions):5}  loss {losses[-1]:.4f}  "
            f"{milliseconds:9.1f} ms{'  (compiling)' if step == 0 else ''}"
        )

    # The same with and without the compiler, on weights that are no longer at their start.
    hidden, actions, cu_seqlens = batches[0]
    arguments = (adapter, hidden, weight, actions, cu_seqlens)
    compiled, plain = compiled_loss(*arguments), step_loss(*arguments)
    pairs_of_gradients = zip(gradients(adapter, compiled), gradients(adapter, plain), strict=True)
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs_of_gradients)
    error = max(error, abs(compiled.item() - plain.item()))
    print(
        f"{args.model}: loss {losses[0]:.4f} -> {losses[-1]:.4f} in {args.steps} steps; "
        f"largest difference to the function without torch.compile {error:.1e}"
    )
    return losses, error


if __name__ == "__main__":
    main()
