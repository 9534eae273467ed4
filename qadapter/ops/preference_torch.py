"""O(N) maths on per-token values, in plain PyTorch without host synchronisation.

Serves every device as the torch backend of `qadapter.functional.preference_loss`; the formulas and
the meaning of the arguments are documented there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

NAN = float("nan")


def preference_fwd(
    q: Tensor,
    value: Tensor,
    actions: Tensor,
    cu_seqlens: Tensor,
    denominators: Tensor | None,
    gamma: float,
    reg_coef: float,
    bt_scale: float,
    value_next: bool,
    length_mean: bool,
) -> tuple[Tensor, ...]:
    num_rows, num_seqs = q.shape[0], cu_seqlens.shape[0] - 1
    num_pairs = num_seqs // 2
    cu = cu_seqlens.long()
    valid = (cu[0] == 0) & (cu[-1] == num_rows) & (cu[1:] >= cu[:-1]).all()
    cu = cu.clamp(0, num_rows)
    row = torch.arange(num_rows, device=q.device)
    seq = torch.searchsorted(cu[1:], row, right=True).clamp(max=max(0, num_seqs - 1))
    has_action = actions != -100

    if value_next:
        is_last = row + 1 == cu[1:][seq] if num_seqs else torch.ones_like(has_action)
        paired = torch.where(is_last, 0, value.roll(-1))
    else:
        paired = value
    r = torch.where(has_action, q - gamma * paired, 0)
    counted = has_action.to(q.dtype)
    lengths = q.new_zeros(num_seqs).index_add_(0, seq, counted) if num_seqs else q.new_zeros(0)
    scale = 1.0 / lengths.clamp(min=1) if length_mean else torch.ones_like(lengths)
    returns = torch.zeros_like(lengths)
    if num_seqs:
        returns = returns.index_add_(0, seq, r) * scale
    # Sequences that do not fit must not look like a result.
    poison = torch.where(valid, 0.0, NAN).to(q.dtype)
    chosen, rejected = returns[:num_pairs] + poison, returns[num_pairs:] + poison
    margins = chosen - rejected

    if denominators is None:
        pair_count, action_count = q.new_tensor(max(1, num_pairs)), counted.sum().clamp(min=1)
    else:
        pair_count, action_count = denominators.to(q.dtype).clamp(min=1).unbind()
    bt_loss = F.softplus(-bt_scale * margins).sum() / pair_count + poison
    reg_loss = r.square().sum() / action_count + poison
    loss = bt_loss + reg_coef * reg_loss
    accuracy = (margins > 0).to(q.dtype).sum() / max(1, num_pairs) + poison

    d_margin = -bt_scale * torch.sigmoid(-bt_scale * margins) / pair_count
    d_return = torch.cat([d_margin, -d_margin]) * scale
    d_r = 2.0 * reg_coef / action_count * r
    if num_seqs:
        d_r = d_r + d_return[seq]
    d_r = torch.where(has_action, d_r, 0) + poison
    d_value = -gamma * d_r
    if value_next:
        # V(s_{t+1}) belongs to the reward of row t; the first row of a sequence is nobody's next.
        d_value = torch.where(is_last, 0, d_value).roll(1)
    return (
        loss,
        bt_loss,
        reg_loss,
        chosen,
        rejected,
        margins,
        accuracy,
        d_r,
        d_value,
    )
