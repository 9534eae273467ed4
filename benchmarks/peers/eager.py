"""Plain PyTorch, as the released code has Q and V: float copies, log_softmax, logsumexp."""

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


def _loss_of_logits(problem: logits_problem.Problem) -> Tensor:
    q, value, _, _ = residual_values(problem.base, problem.q, problem.actions, *problem.alphas)
    return logits_problem.preference_loss(q, value, problem.pairs, **logits_problem.LOSS)


LOGITS = logits_problem.Peer(
    "eager",
    values=lambda p: residual_values(p.base, p.q, p.actions, *p.alphas),
    loss=_loss_of_logits,
    cannot="nothing, but it keeps float32 tensors of the size of the logits",
)
