"""This package, by its public functions."""

from typing import Any

from torch import Tensor

from benchmarks import logits_problem
from benchmarks.linear_problem import BT_SCALE, Peer, Problem
from qadapter import functional as QF


def _arguments(problem: Problem) -> dict[str, Any]:
    # Known base statistics and a policy that the base does not enter: its states are not needed.
    unused = problem.mode.cached and problem.mode.m == 0
    return problem.arguments | ({"base_hidden": None} if unused else {})


def _loss(problem: Problem) -> Tensor:
    return QF.linear_qadapter_loss(
        cu_seqlens=problem.cu_seqlens,
        value_at="same",
        reg_coef=0.0,
        bt_scale=BT_SCALE,
        **_arguments(problem),
    ).loss


def _values(problem: Problem) -> tuple[Tensor, Tensor]:
    values = QF.linear_residual_values(**_arguments(problem))
    return values.q, values.value


LINEAR = Peer("qadapter", loss=_loss, values=_values)


def _values_of_logits(problem: logits_problem.Problem) -> logits_problem.Values:
    values = QF.residual_values(problem.base, problem.q, problem.actions, **problem.names)
    return values.q, values.value, values.base_logp, values.policy_logp


def _loss_of_logits(problem: logits_problem.Problem) -> Tensor:
    keywords = {**problem.names, **logits_problem.LOSS}
    return QF.qadapter_loss(
        problem.base, problem.q, problem.actions, problem.cu_seqlens, **keywords
    ).loss


LOGITS = logits_problem.Peer("qadapter", values=_values_of_logits, loss=_loss_of_logits)
