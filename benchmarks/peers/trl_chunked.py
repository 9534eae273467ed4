"""TRL's log-probabilities from hidden states in tiles of the vocabulary, one call per stream.

TRL's trainers give this function to their fused head; here it is called with their width of tiles.
The logits are rounded to the dtype of the hidden states, and backward forms them again: one product
more than the logits need. On a GPU tiles are reduced by a Triton kernel; elsewhere by PyTorch, and
there the product with the head is taken in float32.
"""

import importlib
from typing import Any

from torch import Tensor

from benchmarks.linear_problem import Peer, Problem, pair_loss, rewards_from_logps


def _utils() -> Any:
    return importlib.import_module("trl.trainer.utils")


def _reason(_: Problem) -> str:
    try:
        utils = _utils()
    except Exception as error:  # not installed, or for another version of something
        return f"trl cannot be imported ({type(error).__name__}: {error})"
    if not hasattr(utils, "_ChunkedLogProbFunction"):
        return "this version of trl has no chunked log-probabilities (1.16 has)"
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
)
