"""Plain PyTorch, as the released code has Q and V: float copies, log_softmax, logsumexp; and
torch.compile of the very functions, forward and backward."""

from typing import Any

import torch
from torch import Tensor

from benchmarks import logits_problem
from benchmarks.linear_problem import Peer, Problem, pair_loss


def residual_values(
    base_logits: Tensor,
    q_logits: Tensor,
    actions: Tensor,
    alpha_0: float,
    alpha_tilde: float,
    center: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, value, base_logp and policy_logp, with float32 copies of both logits and of every step."""
    z_b, z_q = base_logits.float(), q_logits.float()
    base_logps = torch.log_softmax(z_b, -1)
    q_values = z_q - center * z_b if center else z_q
    composed = (q_values + alpha_0 * base_logps) / alpha_tilde
    lse = torch.logsumexp(composed, -1)
    index = actions[:, None]
    q, base_logp, c = (t.gather(1, index)[:, 0] for t in (q_values, base_logps, composed))
    return q, alpha_tilde * lse, base_logp, c - lse


def linear_values(
    base_hidden: Tensor,
    q_hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    alpha_0: float,
    alpha_tilde: float,
    center: float,
    base_lse: Tensor | None,
    base_logp: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """q and value from hidden states by way of the logits, as a careful person writes it.

    Known statistics of the base save its product, or merge the two, as they do for anyone else; and
    nothing but the logits and what logsumexp needs has [N, V] elements, unlike `residual_values`.
    """
    m = alpha_0 - center
    index = actions[:, None]
    known = base_lse is not None and base_logp is not None
    if known and m != 0:
        hidden = (q_hidden.float() + m * base_hidden.float()).to(weight.dtype)
        x = (hidden @ weight.T).float()
        # z_q[a] from the logits that are there, so that it cancels against the value exactly
        q = x.gather(1, index)[:, 0] - alpha_0 * (base_logp + base_lse)
    else:
        x = z_q = (q_hidden @ weight.T).float()
        if known:
            base_action = base_logp + base_lse
        else:
            with torch.no_grad():
                z_b = (base_hidden @ weight.T).float()
                base_lse = torch.logsumexp(z_b, -1)
                base_action = z_b.gather(1, index)[:, 0]
            if m != 0:
                x = z_q + m * z_b
            del z_b
        q = z_q.gather(1, index)[:, 0] - center * base_action
    lse = torch.logsumexp(x if alpha_tilde == 1 else x / alpha_tilde, -1)
    return q, alpha_tilde * lse - alpha_0 * base_lse


def _linear_loss(problem: Problem) -> Tensor:
    q, value = linear_values(**problem.arguments)
    return pair_loss(q - value, problem.pairs)


LINEAR = Peer(
    "eager",
    loss=_linear_loss,
    values=lambda problem: linear_values(**problem.arguments),
    cannot="nothing, but it keeps the logits and what the gradient needs of them",
)


def _linear(pairs, **arguments):  # type: ignore[no-untyped-def]
    q, value = linear_values(**arguments)
    return pair_loss(q - value, pairs), q.detach(), value.detach()


# Compiled for each shape: code for shapes that vary would only be slower.
_compiled_linear = torch.compile(_linear, dynamic=False)


def _call(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():  # one graph, also where only the values are wanted
        return _compiled_linear(problem.pairs, **problem.arguments)


COMPILED_LINEAR = Peer(
    "compile",
    loss=lambda problem: _call(problem)[0],
    values=lambda problem: _call(problem)[1:],
    cannot="keeps logits; compiles for seconds to minutes before its first run, not counted",
)


def _loss(base, q, actions, alphas, pairs, gamma, reg_coef, bt_scale):  # type: ignore[no-untyped-def]
    q_a, value, _, _ = residual_values(base, q, actions, *alphas)
    return logits_problem.preference_loss(q_a, value, pairs, gamma, reg_coef, bt_scale)


def _of_logits(name: str, values: Any, loss: Any, cannot: str) -> logits_problem.Peer:
    settings = logits_problem.LOSS.values()
    return logits_problem.Peer(
        name,
        values=lambda p: values(p.base, p.q, p.actions, *p.alphas),
        loss=lambda p: loss(p.base, p.q, p.actions, p.alphas, p.pairs, *settings),
        cannot=cannot,
    )


LOGITS = _of_logits(
    "eager",
    residual_values,
    _loss,
    "nothing, but it keeps float32 tensors of the size of the logits",
)
COMPILED_LOGITS = _of_logits(
    "compile",
    torch.compile(residual_values),
    torch.compile(_loss),
    "compiles for seconds to minutes before its first run, which is not counted",
)
