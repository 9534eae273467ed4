"""Who computes values and losses from logits (`logits_problem`): this package, and all peers."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.logits_problem import LOSS, Problem, Values, preference_loss
from benchmarks.peers import Peer
from benchmarks.peers.linear import quack_reason, trl_reason
from qadapter import functional as QF


def _peer(name: str, values: Callable[[Problem], Values], **more: Any) -> Peer:
    def loss(problem: Problem) -> Tensor:
        q, value, _, _ = values(problem)
        return preference_loss(q, value, problem.pairs, **LOSS)

    return Peer(name, **{"loss": loss, "values": values, **more})


# This package, by its public functions


def _our_values(problem: Problem) -> Values:
    values = QF.residual_values(problem.base, problem.q, problem.actions, **problem.names)
    return values.q, values.value, values.base_logp, values.policy_logp


def _our_loss(problem: Problem) -> Tensor:
    inputs = (problem.base, problem.q, problem.actions, problem.cu_seqlens)
    return QF.qadapter_loss(*inputs, **problem.names, **LOSS).loss


OURS = _peer("qadapter", _our_values, loss=_our_loss)

# Plain PyTorch, and torch.compile of the very functions


def eager_values(
    base_logits: Tensor,
    q_logits: Tensor,
    actions: Tensor,
    alpha_0: float,
    alpha_tilde: float,
    center: float,
) -> Values:
    """As the released code has Q and V: float32 copies of both logits and of every step."""
    z_b, z_q = base_logits.float(), q_logits.float()
    base_logps = torch.log_softmax(z_b, -1)
    q_values = z_q - center * z_b if center else z_q
    composed = (q_values + alpha_0 * base_logps) / alpha_tilde
    lse = torch.logsumexp(composed, -1)
    index = actions[:, None]
    q, base_logp, c = (t.gather(1, index)[:, 0] for t in (q_values, base_logps, composed))
    return q, alpha_tilde * lse, base_logp, c - lse


def _eager_loss(base, q, actions, alphas, pairs, gamma, reg_coef, bt_scale):  # type: ignore[no-untyped-def]
    q_a, value, _, _ = eager_values(base, q, actions, *alphas)
    return preference_loss(q_a, value, pairs, gamma, reg_coef, bt_scale)


_compiled_values, _compiled_loss = torch.compile(eager_values), torch.compile(_eager_loss)

EAGER = _peer(
    "eager",
    lambda p: eager_values(p.base, p.q, p.actions, *p.alphas),
    cannot="nothing, but it keeps float32 tensors of the size of the logits",
)
COMPILED = Peer(
    "compile",
    loss=lambda p: _compiled_loss(p.base, p.q, p.actions, p.alphas, p.pairs, *LOSS.values()),
    values=lambda p: _compiled_values(p.base, p.q, p.actions, *p.alphas),
    cannot="compiles for seconds to minutes before its first run, which is not counted",
)

# Both that follow have log pi(a) of a tensor of logits and nothing else.


def values_from_logps(problem: Problem, logps: Callable[[Tensor, Tensor], Tensor]) -> Values:
    """The log-sum-exp is z[a] - log pi(a); an x that is not z_q itself has to be made first."""
    alpha_0, alpha_tilde, center = problem.alphas
    index = problem.actions[:, None]
    with torch.no_grad():
        base_logp = logps(problem.base, problem.actions).float()
        base_action = problem.base.gather(1, index)[:, 0].float()
        base_lse = base_action - base_logp
    q_action = problem.q.gather(1, index)[:, 0].float()
    x, x_action = problem.q, q_action
    if problem.m != 0 or alpha_tilde != 1:
        x = ((problem.q.float() + problem.m * problem.base.float()) / alpha_tilde).to(x.dtype)
        x_action = x.gather(1, index)[:, 0].float()
    policy_logp = logps(x, problem.actions).float()
    value = alpha_tilde * (x_action - policy_logp) - alpha_0 * base_lse
    return q_action - center * base_action, value, base_logp, policy_logp


def _trl_logps(logits: Tensor, actions: Tensor) -> Tensor:
    return importlib.import_module("trl.trainer.utils").selective_log_softmax(logits, actions)


TRL = _peer(
    "TRL",
    lambda problem: values_from_logps(problem, _trl_logps),
    reason=lambda _: trl_reason("selective_log_softmax"),
    cannot="gives the log-probability of the action only, in the dtype of the logits: the value is "
    "composed of it and a gather",
)


def _quack_logps(logits: Tensor, actions: Tensor) -> Tensor:
    function = importlib.import_module("quack.cross_entropy").cross_entropy
    return -function(logits, actions, reduction="none")


QUACK = _peer(
    "QuACK",
    lambda problem: values_from_logps(problem, _quack_logps),
    reason=lambda problem: quack_reason(problem.q),
    cannot="runs on a GPU of compute capability 9.0 or later only; gives the log-probability of "
    "the action only: the value is composed of it and a gather",
)

PEERS = {peer.name: peer for peer in (OURS, COMPILED, EAGER, TRL, QUACK)}
