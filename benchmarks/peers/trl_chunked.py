"""TRL's log-probabilities from hidden states in tiles of the vocabulary, one call per stream.

TRL's trainers give this function to their fused head; here it is called with their width of tiles.
The logits are rounded to the dtype of the hidden states, and backward forms them again: one product
more than the logits need. On a GPU tiles are reduced by a Triton kernel; elsewhere by PyTorch, and
there the product with the head is taken in float32.
"""

import importlib
from typing import Any

from torch import Tensor

from benchmarks import logits_problem
from benchmarks.linear_problem import Peer, Problem, pair_loss, rewards_from_logps
from benchmarks.peers import eager


def _utils() -> Any:
    return importlib.import_module("trl.trainer.utils")


def _reason(_: Any, name: str = "_ChunkedLogProbFunction") -> str:
    try:
        utils = _utils()
    except Exception as error:  # not installed, or for another version of something
        return f"trl cannot be imported ({type(error).__name__}: {error})"
    if not hasattr(utils, name):
        return f"this version of trl has no {name} (1.16 has)"
    return ""


def _rewards(problem: Problem) -> Tensor:
    utils = _utils()
    width = utils._CHUNKED_LOGPROB_CHUNK_SIZE

    def logps(hidden: Tensor) -> Tensor:
        # bias, targets, temperature, width, soft-cap, scale, what else to compute
        rest = (None, problem.actions, 1.0, width, None, 1.0, ())
        return utils._ChunkedLogProbFunction.apply(hidden, problem.weight, *rest)[0]

    return rewards_from_logps(problem, logps)


LINEAR = Peer(
    "TRL",
    loss=lambda problem: pair_loss(_rewards(problem), problem.pairs),
    rewards=_rewards,
    reason=_reason,
    products=lambda problem: problem.mode.products + 1,
    cannot="gives no log-sum-exp and no value; rounds logits to the dtype of the hidden states and "
    "takes the product with the head again in backward; on a CPU that product is in float32",
)


def _values_of_logits(problem: logits_problem.Problem) -> logits_problem.Values:
    return logits_problem.values_from_logps(problem, _utils().selective_log_softmax)


def _loss_of_logits(problem: logits_problem.Problem) -> Tensor:
    q, value, _, _ = _values_of_logits(problem)
    return eager.preference_loss(q, value, problem.pairs, **logits_problem.LOSS)


LOGITS = logits_problem.Peer(
    "TRL",
    values=_values_of_logits,
    loss=_loss_of_logits,
    reason=lambda problem: _reason(problem, "selective_log_softmax"),
    cannot="gives the log-probability of the action only, in the dtype of the logits: the value is "
    "composed of it and a gather",
)
