"""PyTorch's own F.linear_cross_entropy in chunks of rows (2.13 or later), one call per stream.

With reduction="none" it gives -log pi(a) of every row, in the dtype of the hidden states, and takes
the product with the head again in backward: one product more than the logits need. On a CPU it
would choose chunks of 8 or 16 rows, for which matrix products are several times slower; it is told
to take 256.
"""

import torch
from torch import Tensor

from benchmarks.linear_problem import Peer, Problem, pair_loss, rewards_from_logps


def _reason(_: Problem) -> str:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has no chunked F.linear_cross_entropy"
    return ""


def _rewards(problem: Problem) -> Tensor:
    rows = 256 if problem.weight.device.type == "cpu" else None

    def logps(hidden: Tensor) -> Tensor:
        nll = torch.nn.functional.linear_cross_entropy(
            hidden,
            problem.weight,
            problem.actions,
            reduction="none",
            options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows),
        )
        return -nll.float()

    return rewards_from_logps(problem, logps)


LINEAR = Peer(
    "torch LCE",
    loss=lambda problem: pair_loss(_rewards(problem), problem.pairs),
    rewards=_rewards,
    reason=_reason,
    products=lambda problem: problem.mode.products + 1,
    cannot="gives no log-sum-exp and no value; takes the product with the head again in backward; "
    "rounds the loss of a row to the dtype of the hidden states",
)
