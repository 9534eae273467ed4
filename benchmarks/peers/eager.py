"""Plain PyTorch, as the released code has Q and V: float copies, log_softmax, logsumexp."""

import torch
from torch import Tensor


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


def preference_loss(
    q: Tensor, value: Tensor, pairs: int, gamma: float, reg_coef: float, bt_scale: float
) -> Tensor:
    """Bradley-Terry and regulariser for 2 * pairs sequences of one length, every row an action."""
    q, value = q.view(2 * pairs, -1), value.view(2 * pairs, -1)
    following = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], 1)
    r = q - gamma * following
    returns = r.mean(1)
    margins = returns[:pairs] - returns[pairs:]
    bt = torch.nn.functional.softplus(-bt_scale * margins).mean()
    return bt + reg_coef * r.square().mean()
