"""Liger-Kernel's chunked preference loss with this loss plugged in.

Liger computes the gradient chunk by chunk of pairs in forward (compiled, one pair at a time, as its
losses do by default), so a loss must be a sum over pairs of what their two sequence means are: the
loss of these benchmarks is, the Q-Adapter regulariser and a value at the next state are not. The
head's gradient is computed unless the weight does not require one, which is the case here. There is
no place for statistics of the base that are known already. No log-probability of a token comes out.
"""

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from benchmarks.linear_problem import BT_SCALE, Peer, Problem, mixed_hidden
from benchmarks.peers import why_not

MODULE = "liger_kernel.chunked_loss.fused_linear_preference"


@functools.cache
def _function() -> Any:
    module = importlib.import_module(MODULE)
    base = module.LigerFusedLinearPreferenceBase

    class QAdapterPreference(base):
        @staticmethod
        def preference_loss_fn(  # type: ignore[no-untyped-def]
            chosen_logps,
            rejected_logps,
            full_target,
            beta,
            ref_chosen_logps,
            ref_rejected_logps,
            alpha_0,
        ):
            chosen = chosen_logps - alpha_0 * ref_chosen_logps
            rejected = rejected_logps - alpha_0 * ref_rejected_logps
            loss = torch.nn.functional.softplus(beta * (rejected - chosen))
            return loss.sum() / (full_target.shape[0] // 2)

        @classmethod
        def forward(cls, ctx, hidden, weight, target, base_hidden, alpha_0):  # type: ignore[no-untyped-def]
            return super().forward(
                cls=cls,
                ctx=ctx,
                _input=hidden,
                weight=weight,
                target=target,
                beta=BT_SCALE,
                compute_nll_loss=False,
                compiled=True,
                use_ref_model=True,
                ref_input=base_hidden,
                ref_weight=weight,
                average_log_prob=True,
                chunk_size=1,
                alpha_0=alpha_0,
            )

        @staticmethod
        def backward(ctx, *grads):  # type: ignore[no-untyped-def]
            return base.backward(ctx, grads)[0], None, None, None, None

    return QAdapterPreference


def _reason(problem: Problem) -> str:
    reason = why_not(MODULE, "liger-kernel")
    if not reason and problem.mode.cached:
        return "its preference losses have no place for known statistics of the base"
    return reason


def _loss(problem: Problem) -> Tensor:
    shape = (2 * problem.pairs, -1, problem.weight.shape[1])
    hidden, base = mixed_hidden(problem).view(shape), problem.base_hidden.view(shape)
    target = problem.actions.view(2 * problem.pairs, -1)
    loss, _ = _function().apply(hidden, problem.weight, target, base, problem.mode.alpha_0)
    return loss


LINEAR = Peer(
    "Liger",
    loss=_loss,
    reason=_reason,
    cannot="gives no value of a token, so neither the regulariser nor a value at the next state; "
    "sequences of one length only; no known statistics of the base",
)
