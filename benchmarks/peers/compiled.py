"""torch.compile of the very functions of `benchmarks.peers.eager`, forward and backward."""

import torch
from torch import Tensor

from benchmarks import logits_problem
from benchmarks.linear_problem import Peer, Problem, pair_loss
from benchmarks.peers import eager

residual_values = torch.compile(eager.residual_values)


def _loss(base, q, actions, alphas, pairs, gamma, reg_coef, bt_scale):  # type: ignore[no-untyped-def]
    q_a, value, _, _ = eager.residual_values(base, q, actions, *alphas)
    return logits_problem.preference_loss(q_a, value, pairs, gamma, reg_coef, bt_scale)


loss = torch.compile(_loss)


def _linear(pairs, **arguments):  # type: ignore[no-untyped-def]
    q, value = eager.linear_values(**arguments)
    return pair_loss(q - value, pairs), q.detach(), value.detach()


# Compiled for each shape: code for shapes that vary would only be slower.
_compiled_linear = torch.compile(_linear, dynamic=False)


def _call(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():  # one graph, also where only the values are wanted
        return _compiled_linear(problem.pairs, **problem.arguments)


LINEAR = Peer(
    "compile",
    loss=lambda problem: _call(problem)[0],
    values=lambda problem: _call(problem)[1:],
    cannot="keeps logits; compiles for seconds to minutes before its first run, not counted",
)


def _loss_of_logits(problem: logits_problem.Problem) -> Tensor:
    settings = logits_problem.LOSS.values()
    arguments = (problem.base, problem.q, problem.actions, problem.alphas, problem.pairs)
    return loss(*arguments, *settings)


LOGITS = logits_problem.Peer(
    "compile",
    values=lambda p: residual_values(p.base, p.q, p.actions, *p.alphas),
    loss=_loss_of_logits,
    cannot="compiles for seconds to minutes before its first run, which is not counted",
)
