"""Rewards, segment sums, Bradley-Terry and the regulariser, with gradients, on per-row floats.

    r_t  = q_t - gamma V'_t     V' the value of the next row of the sequence (0 after the last) or,
                                with value_next off, of the same row; rows without action have none
    R_s  = sum_t r_t            divided by the number of actions if length_mean
    loss = sum_i softplus(-bt_scale (R_i - R_{P+i})) / pairs + reg_coef sum_t r_t^2 / actions
    d r_t   = +-d loss / d margin (/ actions of s) + 2 reg_coef r_t / actions
    d q_t   = d r_t             d V'_t = -gamma d r_t, on the row that V' was read from

Three kernels in stream order, no host synchronisation, no atomics, so results are deterministic:
one program per sequence (sums), one program for the scalars, one program per block of rows (the
gradients, a row finds its sequence by bisection). cu_seqlens is checked before it is trusted: where
it does not run from 0 to N without decreasing, every result is NaN and nothing outside is read.

Bytes: about 16 read per row twice and 8 written; 0.4 MB for N = 8192, so the floor is the three
launches, not the bandwidth. Not measured on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qadapter.kernels.common import NO_ACTION, label_pointer, on_device

BLOCK = 1024


@triton.jit
def row_reward(row, end, valid, q_ptr, value_ptr, actions_ptr, gamma, VALUE_NEXT: tl.constexpr):
    """(reward, has an action) of some rows of sequences that end at `end`."""
    has_action = valid & (tl.load(actions_ptr + row, mask=valid, other=NO_ACTION) != NO_ACTION)
    if VALUE_NEXT:
        value = tl.load(value_ptr + row + 1, mask=has_action & (row + 1 < end), other=0.0)
    else:
        value = tl.load(value_ptr + row, mask=has_action, other=0.0)
    reward = tl.load(q_ptr + row, mask=has_action, other=0.0) - gamma * value
    return tl.where(has_action, reward, 0.0), has_action


@triton.jit(do_not_specialize=["num_rows"])
def sequence_kernel(
    q_ptr,
    value_ptr,
    actions_ptr,
    cu_ptr,
    sums_ptr,
    squares_ptr,
    counts_ptr,
    num_rows,
    gamma,
    VALUE_NEXT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum of rewards, of their squares, and the number of actions of one sequence."""
    gamma = tl.cast(gamma, tl.float32)
    sequence = tl.program_id(0)
    start = tl.load(cu_ptr + sequence).to(tl.int64)
    end = tl.load(cu_ptr + sequence + 1).to(tl.int64)
    usable = (start >= 0) & (start <= end) & (end <= num_rows)
    start = tl.where(usable, start, 0)
    end = tl.where(usable, end, 0)

    sums = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    counts = tl.zeros([BLOCK], tl.int32)
    for first in range(start, end, BLOCK):
        row = first + tl.arange(0, BLOCK)
        reward, has_action = row_reward(
            row, end, row < end, q_ptr, value_ptr, actions_ptr, gamma, VALUE_NEXT
        )
        sums += reward
        squares += reward * reward
        counts += has_action.to(tl.int32)
    tl.store(sums_ptr + sequence, tl.sum(sums, axis=0))
    tl.store(squares_ptr + sequence, tl.sum(squares, axis=0))
    tl.store(counts_ptr + sequence, tl.sum(counts, axis=0))


@triton.jit
def softplus_and_sigmoid(x):
    """ln(1 + e^x) and its derivative, both accurate for any x."""
    small = tl.exp(-tl.abs(x))
    grown = 1.0 + small
    # log1p: dividing by the rounded argument's own distance from 1 takes its rounding out again.
    log1p = tl.where(grown == 1.0, small, tl.log(grown) * (small / (grown - 1.0)))
    return tl.maximum(x, 0.0) + log1p, tl.where(x >= 0.0, 1.0, small) / grown


@triton.jit(do_not_specialize=["num_rows", "num_pairs"])
def pairs_kernel(
    cu_ptr,
    sums_ptr,
    squares_ptr,
    counts_ptr,
    denominators_ptr,
    loss_ptr,
    bt_loss_ptr,
    reg_loss_ptr,
    chosen_ptr,
    rejected_ptr,
    margins_ptr,
    accuracy_ptr,
    slopes_ptr,
    num_rows,
    num_pairs,
    reg_coef,
    bt_scale,
    LENGTH_MEAN: tl.constexpr,
    HAS_DENOMINATORS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The scalars and, per sequence, d loss / d (sum of its rewards); one program.

    slopes[2P] is d loss / d r per unit of r, 2 reg_coef / actions; NaN if cu_seqlens is invalid.
    """
    reg_coef = tl.cast(reg_coef, tl.float32)
    bt_scale = tl.cast(bt_scale, tl.float32)
    lane = tl.arange(0, BLOCK)
    num_sequences = 2 * num_pairs

    actions = tl.zeros([BLOCK], tl.int64)
    squares = tl.zeros([BLOCK], tl.float32)
    faults = tl.zeros([BLOCK], tl.int32)
    for first in range(0, num_sequences, BLOCK):
        sequence = first + lane
        exists = sequence < num_sequences
        actions += tl.load(counts_ptr + sequence, mask=exists, other=0)
        squares += tl.load(squares_ptr + sequence, mask=exists, other=0.0)
        begin = tl.load(cu_ptr + sequence, mask=exists, other=0)
        end = tl.load(cu_ptr + sequence + 1, mask=exists, other=0)
        faults += (begin > end).to(tl.int32)
    fault = tl.sum(faults, axis=0) > 0
    fault = fault | (tl.load(cu_ptr) != 0) | (tl.load(cu_ptr + num_sequences) != num_rows)
    poison = tl.where(fault, float("nan"), 0.0)

    if HAS_DENOMINATORS:
        pair_count = tl.maximum(tl.load(denominators_ptr), 1.0)
        action_count = tl.maximum(tl.load(denominators_ptr + 1), 1.0)
    else:
        pair_count = tl.maximum(num_pairs, 1).to(tl.float32)
        action_count = tl.maximum(tl.sum(actions, axis=0), 1).to(tl.float32)

    losses = tl.zeros([BLOCK], tl.float32)
    correct = tl.zeros([BLOCK], tl.int32)
    for first in range(0, num_pairs, BLOCK):
        pair = first + lane
        exists = pair < num_pairs
        other = num_pairs + pair
        chosen = tl.load(sums_ptr + pair, mask=exists, other=0.0)
        rejected = tl.load(sums_ptr + other, mask=exists, other=0.0)
        chosen_share = tl.full([BLOCK], 1.0, tl.float32)
        rejected_share = tl.full([BLOCK], 1.0, tl.float32)
        if LENGTH_MEAN:
            chosen_actions = tl.load(counts_ptr + pair, mask=exists, other=1)
            rejected_actions = tl.load(counts_ptr + other, mask=exists, other=1)
            chosen_share = 1.0 / tl.maximum(chosen_actions, 1).to(tl.float32)
            rejected_share = 1.0 / tl.maximum(rejected_actions, 1).to(tl.float32)
        chosen = chosen * chosen_share + poison
        rejected = rejected * rejected_share + poison
        margin = chosen - rejected
        softplus, sigmoid = softplus_and_sigmoid(-bt_scale * margin)
        losses += tl.where(exists, softplus, 0.0)
        correct += (exists & (margin > 0.0)).to(tl.int32)
        slope = -bt_scale * sigmoid / pair_count
        tl.store(chosen_ptr + pair, chosen, mask=exists)
        tl.store(rejected_ptr + pair, rejected, mask=exists)
        tl.store(margins_ptr + pair, margin, mask=exists)
        tl.store(slopes_ptr + pair, slope * chosen_share, mask=exists)
        tl.store(slopes_ptr + other, -slope * rejected_share, mask=exists)

    bt_loss = tl.sum(losses, axis=0) / pair_count + poison
    reg_loss = tl.sum(squares, axis=0) / action_count + poison
    accuracy = tl.sum(correct, axis=0).to(tl.float32) / tl.maximum(num_pairs, 1).to(tl.float32)
    tl.store(loss_ptr, bt_loss + reg_coef * reg_loss)
    tl.store(bt_loss_ptr, bt_loss)
    tl.store(reg_loss_ptr, reg_loss)
    tl.store(accuracy_ptr, accuracy + poison)
    tl.store(slopes_ptr + num_sequences, 2.0 * reg_coef / action_count + poison)


@triton.jit(do_not_specialize=["num_rows", "num_sequences", "steps"])
def gradient_kernel(
    q_ptr,
    value_ptr,
    actions_ptr,
    cu_ptr,
    slopes_ptr,
    grad_q_ptr,
    grad_value_ptr,
    num_rows,
    num_sequences,
    steps,
    gamma,
    VALUE_NEXT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """d loss / d q and d loss / d value of a block of rows."""
    gamma = tl.cast(gamma, tl.float32)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = row < num_rows

    # The last sequence that starts at or before the row; stays inside [0, num_sequences) always.
    low = tl.zeros([BLOCK], tl.int32)
    high = tl.zeros([BLOCK], tl.int32) + num_sequences
    for _ in range(steps):
        middle = (low + high) // 2
        below = tl.load(cu_ptr + middle).to(tl.int64) <= row
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    known = exists & (low < num_sequences)
    begin = tl.load(cu_ptr + low, mask=known, other=0).to(tl.int64)
    end = tl.load(cu_ptr + low + 1, mask=known, other=0).to(tl.int64)
    end = tl.minimum(end, num_rows)
    per_reward = tl.load(slopes_ptr + num_sequences)  # NaN poisons every row
    per_sum = tl.load(slopes_ptr + low, mask=exists, other=0.0)

    reward, has_action = row_reward(
        row, end, exists, q_ptr, value_ptr, actions_ptr, gamma, VALUE_NEXT
    )
    poison = tl.where(per_reward == per_reward, 0.0, float("nan"))
    slope = tl.where(has_action, per_sum + per_reward * reward, poison)
    tl.store(grad_q_ptr + row, slope, mask=exists)
    if VALUE_NEXT:
        # V of this row belongs to the reward of the row before it.
        follows = exists & (row > begin) & (begin >= 0)
        reward, has_action = row_reward(
            row - 1, end, follows, q_ptr, value_ptr, actions_ptr, gamma, VALUE_NEXT
        )
        slope = tl.where(has_action, per_sum + per_reward * reward, poison)
    tl.store(grad_value_ptr + row, -gamma * slope, mask=exists)


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
    """(loss, bt_loss, reg_loss, chosen, rejected, margins, accuracy, grad_q, grad_value)."""
    num_rows, num_sequences = q.shape[0], cu_seqlens.shape[0] - 1
    num_pairs = num_sequences // 2

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    loss, bt_loss, reg_loss, accuracy = empty(), empty(), empty(), empty()
    chosen, rejected, margins = empty(num_pairs), empty(num_pairs), empty(num_pairs)
    grad_q, grad_value = empty(num_rows), empty(num_rows)
    # The slopes have one entry more than there are sequences, see pairs_kernel.
    sums, squares, slopes = empty(3, num_sequences + 1).unbind()
    counts = empty(num_sequences, dtype=torch.int32)
    actions, cu_seqlens = label_pointer(actions), label_pointer(cu_seqlens)
    with on_device(q.device):
        if num_pairs > 0:
            sequence_kernel[(num_sequences,)](
                q,
                value,
                actions,
                cu_seqlens,
                sums,
                squares,
                counts,
                num_rows,
                float(gamma),
                VALUE_NEXT=bool(value_next),
                BLOCK=BLOCK,
                num_warps=4,
                enable_fp_fusion=True,
            )
        pairs_kernel[(1,)](
            cu_seqlens,
            sums,
            squares,
            counts,
            loss if denominators is None else denominators,
            loss,
            bt_loss,
            reg_loss,
            chosen,
            rejected,
            margins,
            accuracy,
            slopes,
            num_rows,
            num_pairs,
            float(reg_coef),
            float(bt_scale),
            LENGTH_MEAN=bool(length_mean),
            HAS_DENOMINATORS=denominators is not None,
            BLOCK=BLOCK // 2,
            num_warps=8,
            enable_fp_fusion=True,
        )
        if num_rows > 0:
            gradient_kernel[(triton.cdiv(num_rows, BLOCK),)](
                q,
                value,
                actions,
                cu_seqlens,
                slopes,
                grad_q,
                grad_value,
                num_rows,
                num_sequences,
                num_sequences.bit_length(),
                float(gamma),
                VALUE_NEXT=bool(value_next),
                BLOCK=BLOCK,
                num_warps=8,
                enable_fp_fusion=True,
            )
    return (loss, bt_loss, reg_loss, chosen, rejected, margins, accuracy, grad_q, grad_value)
