"""PyTorch's own F.linear_cross_entropy in chunks of rows (2.13 or later), one call per stream.

With reduction="none" it gives -log pi(a) of every row, in the dtype of the hidden states, and takes
the product with the head again in backward: one product more than the logits need. On a CPU it
would choose chunks of 8 or 16 rows, for which matrix products are several times slower; it is told
to take 256.
"""

import torch
from torch import Tensor

from benchmarks.linear_problem import Problem, peer_of_logps


def _reason(_: Problem) -> str:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has no chunked F.linear_cross_entropy"
    return ""


def _logps(problem: Problem, hidden: Tensor) -> Tensor:
    rows = None if problem.weight.is_cuda else 256
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
    nll = torch.nn.functional.linear_cross_entropy(
        hidden, problem.weight, problem.actions, reduction="none", options=options
    )
    return -nll.float()


LINEAR = peer_of_logps(
    "torch LCE",
    _logps,
    reason=_reason,
    products=lambda problem: problem.mode.products + 1,
    cannot="gives no log-sum-exp and no value; takes the product with the head again in backward; "
    "rounds the loss of a row to the dtype of the hidden states",
)
