"""TRL's log-probabilities from hidden states in tiles of the vocabulary, one call per stream.

TRL's trainers give this function to their fused head; here it is called with their width of tiles.
The logits are rounded to the dtype of the hidden states, and backward forms them again: one product
more than the logits need. On a GPU tiles are reduced by a Triton kernel; elsewhere by PyTorch, and
there the product with the head is taken in float32.
"""

import importlib
from typing import Any

from torch import Tensor

from benchmarks import linear_problem, logits_problem
from benchmarks.peers import why_not


def _utils() -> Any:
    return importlib.import_module("trl.trainer.utils")


def _reason(name: str) -> str:
    reason = why_not("trl.trainer.utils", "trl")
    if not reason and not hasattr(_utils(), name):
        return f"this version of trl has no {name} (1.16 has)"
    return reason


def _logps(problem: linear_problem.Problem, hidden: Tensor) -> Tensor:
    utils = _utils()
    # bias, targets, temperature, width, soft-cap, scale, what else to compute
    rest = (None, problem.actions, 1.0, utils._CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ())
    return utils._ChunkedLogProbFunction.apply(hidden, problem.weight, *rest)[0]


LINEAR = linear_problem.peer_of_logps(
    "TRL",
    _logps,
    reason=lambda _: _reason("_ChunkedLogProbFunction"),
    products=lambda problem: problem.mode.products + 1,
    cannot="gives no log-sum-exp and no value; rounds logits to the dtype of the hidden states and "
    "takes the product with the head again in backward; on a CPU that product is in float32",
)
LOGITS = logits_problem.peer_of_logps(
    "TRL",
    lambda logits, actions: _utils().selective_log_softmax(logits, actions),
    reason=lambda _: _reason("selective_log_softmax"),
    cannot="gives the log-probability of the action only, in the dtype of the logits: the value is "
    "composed of it and a gather",
)
