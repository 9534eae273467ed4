"""What a training step logs: sums and counts of a batch, which add up over micro-batches."""

from typing import Any

import torch
from torch import Tensor

from qadapter.outputs import PreferenceLoss, ResidualValues

KL_ROWS = 32
"""Rows of a training batch whose exact KL(base || policy) is logged; evaluation takes all rows."""


@torch.no_grad()
def batch_sums(
    inputs: dict[str, Any], values: ResidualValues, outputs: PreferenceLoss, kl: Tensor | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Sum and count of each metric, scalars on the batch's device; names are TRL's where it has
    them. ``kl`` is KL(base || policy) in some rows."""
    actions, cu_seqlens = inputs["actions"], inputs["cu_seqlens"]
    has_action = actions != -100
    num_pairs = outputs.margins.numel()
    is_chosen = torch.arange(len(actions), device=actions.device) < cu_seqlens[num_pairs]
    chosen_logp = torch.where(is_chosen, values.policy_logp, 0).sum()
    # filled on the device: a copy of a number of the host's would wait for it
    pairs = torch.full((), float(num_pairs), device=actions.device)
    tokens = has_action.sum().float()
    # bt_loss and reg_loss come divided by these; undone, they add up over micro-batches.
    denominators = inputs.get("denominators")
    per_pair, per_action = (pairs, tokens) if denominators is None else denominators
    sums = {
        "rewards/chosen": (outputs.chosen_rewards.sum(), pairs),
        "rewards/rejected": (outputs.rejected_rewards.sum(), pairs),
        "rewards/margins": (outputs.margins.sum(), pairs),
        "rewards/accuracies": (outputs.accuracy * pairs, pairs),
        "logps/chosen": (chosen_logp, pairs),
        "logps/rejected": (values.policy_logp.sum() - chosen_logp, pairs),
        "loss/bt": (outputs.bt_loss * per_pair, pairs),
        "reg_loss": (outputs.reg_loss * per_action, tokens),
        "q/mean": (values.q.sum(), tokens),
        "value/mean": (torch.where(has_action, values.value, 0).sum(), tokens),
    }
    if kl is not None:
        sums["kl"] = (kl.sum(), torch.full((), float(kl.numel()), device=kl.device))
    return sums


def spread(total: int, count: int | None, device: torch.device) -> Tensor:
    """At most ``count`` row numbers spread evenly over ``total``; all of them for None. int64."""
    if count is None or total <= count:
        return torch.arange(total, device=device)
    return torch.linspace(0, total - 1, count, device=device).long()
