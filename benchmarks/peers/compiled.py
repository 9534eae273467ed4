"""torch.compile of the very functions of `benchmarks.peers.eager`, forward and backward."""

import torch

from benchmarks.peers import eager

residual_values = torch.compile(eager.residual_values)


def _loss(base, q, actions, alphas, pairs, gamma, reg_coef, bt_scale):  # type: ignore[no-untyped-def]
    q_a, value, _, _ = eager.residual_values(base, q, actions, *alphas)
    return eager.preference_loss(q_a, value, pairs, gamma, reg_coef, bt_scale)


loss = torch.compile(_loss)
