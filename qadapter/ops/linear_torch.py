"""The linear operation of the torch backend: statistics and p @ W from hidden states, any device.

    z = W h for a chunk of tokens, in float32; both log-sum-exps; p, in place; u = p @ W

Logits exist for one chunk of tokens at a time. Two or three products of 2 N D V FLOPs; everything
else is O(N V) and memory-bound. Where the hardware multiplies 16-bit numbers into float32 (CUDA),
it does so here; elsewhere the weight is widened tile by tile, so that logits are never rounded.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qadapter.ops.rows import NEG_INF, finish_rows, stats_dtype

CHUNK_BYTES = {"cpu": 48 << 20, "cuda": 1 << 30}  # of float32 logits that exist at a time
TILE_BYTES = 4 << 20  # of widened weight
# Of float32 rows of W that the backward gathers at a time: on a CPU they stay in the cache, on a
# GPU every piece is some launches.
BWD_BYTES = {"cpu": 2 << 20}
BWD_BYTES_ELSEWHERE = 256 << 20


@dataclass(frozen=True)
class Head:
    """z = cap(scale * (W h + bias)), cap(s) = softcap * tanh(s / softcap); 0 is no soft cap."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float
    dtype: torch.dtype

    def tiles(self) -> list[slice]:
        step = max(64, TILE_BYTES // (self.weight.shape[1] * self.dtype.itemsize))
        return [slice(i, i + step) for i in range(0, self.weight.shape[0], step)]

    def finish(self, z: Tensor, bias: Tensor | None, bias_factor: float = 1.0) -> Tensor:
        """Bias, scale and soft cap, in place."""
        if bias is not None:
            bias = bias.to(z.dtype)
            # a factor below 0 must not turn -inf, a masked token, into +inf
            z.add_(torch.where(bias == NEG_INF, NEG_INF, bias_factor * bias))
        if self.scale != 1.0:
            z.mul_(self.scale)
        if self.softcap != 0.0:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z

    def logits(self, hidden: Tensor, out: Tensor, bias_factor: float = 1.0) -> Tensor:
        """[n, D] -> [n, V] in ``out``."""
        weight = self.weight
        if hidden.dtype == weight.dtype == self.dtype:
            torch.mm(hidden, weight.t(), out=out)
        elif hidden.dtype == weight.dtype and weight.device.type == "cuda":
            torch.ops.aten.mm.dtype_out(hidden, weight.t(), torch.float32, out=out)
        else:
            wide = hidden.to(self.dtype)
            for tile in self.tiles():
                out[:, tile] = wide @ weight[tile].to(self.dtype).t()
        return self.finish(out, self.bias, bias_factor)

    def action_logits(self, hidden: Tensor, actions: Tensor) -> Tensor:
        """[n]: the logits of one token a row, without the others."""
        dots = (hidden.to(self.dtype) * self.weight[actions].to(self.dtype)).sum(-1)
        return self.finish(dots, None if self.bias is None else self.bias[actions])

    def slope(self, z: Tensor) -> Tensor:
        """dz/ds, times the scale."""
        if self.softcap == 0.0:
            return torch.full_like(z, self.scale)
        return (1.0 - (z / self.softcap).square()) * self.scale

    def pull_back(self, p: Tensor, out: Tensor) -> None:
        """out = p @ W; p in the weight's dtype where that has 16 bits, the sums in float32."""
        if p.dtype == self.weight.dtype == out.dtype:
            torch.mm(p, self.weight, out=out)
        elif self.weight.device.type == "cuda" and self.weight.dtype == out.dtype:
            # a 16-bit result could be added up from partial sums of 16 bits
            out.copy_(torch.mm(p.to(out.dtype), self.weight, out_dtype=torch.float32))
        elif self.weight.dtype == out.dtype:
            torch.mm(p.to(out.dtype), self.weight, out=out)
        else:
            wide = torch.zeros(out.shape, dtype=self.dtype, device=out.device)
            for tile in self.tiles():
                wide.addmm_(p[:, tile], self.weight[tile].to(self.dtype))
            out.copy_(wide)


def _shift_and_log_sum(x: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """As in `_torch`, with a temporary of a few columns only."""
    shift = x.amax(-1)
    total = torch.zeros_like(shift)
    for part in x.split(8192, dim=1):
        total += ((part - shift[:, None]) / alpha).exp_().sum(-1)
    return shift, total.log_()


def rows_per_chunk(buffers: float, vocab: int, itemsize: int, device: str, chunk_size: int) -> int:
    if chunk_size > 0:
        return chunk_size
    rows = int(CHUNK_BYTES.get(device, 1 << 30) / (buffers * vocab * itemsize))
    return max(1, rows if rows < 128 else rows // 128 * 128)


def linear_fwd(
    base_hidden: Tensor | None,
    q_hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    bias: Tensor | None,
    base_lse: Tensor | None,
    base_logp: Tensor | None,
    alpha_0: float,
    alpha_tilde: float,
    center: float,
    logit_scale: float,
    logit_softcap: float,
    chunk_size: int,
    need_grad: bool,
) -> tuple[Tensor, ...]:
    num_rows, vocab = q_hidden.shape[0], weight.shape[0]
    dtype = stats_dtype(torch.promote_types(q_hidden.dtype, weight.dtype))
    head = Head(weight, bias, logit_scale, logit_softcap, dtype)
    m = alpha_0 - center
    merged = m != 0 and base_lse is not None and logit_softcap == 0.0
    base_product = base_hidden is not None and not merged and (m != 0 or base_lse is None)
    two_buffers = base_product and m != 0
    # the 16-bit copy of p counts half a buffer, the slopes of a soft-capped head one
    buffers = 1.0 + two_buffers + need_grad * ((logit_softcap != 0) + 0.5 * (dtype != weight.dtype))
    step = rows_per_chunk(buffers, vocab, dtype.itemsize, weight.device.type, chunk_size)

    in_range = (actions >= 0) & (actions < vocab)
    safe = torch.where(in_range, actions, 0)

    def column() -> Tensor:
        return torch.empty(num_rows, dtype=dtype, device=q_hidden.device)

    q_action, x_action, shift, log_sum = (column() for _ in range(4))
    base_action = None if base_hidden is None else column()
    base_sum = (column(), column()) if base_lse is None else None
    u = torch.empty_like(
        q_hidden if need_grad else q_hidden[:0], memory_format=torch.contiguous_format
    )
    shape = (min(step, num_rows), vocab)
    buffer = torch.empty(shape, dtype=dtype, device=q_hidden.device)
    base_buffer = torch.empty_like(buffer) if two_buffers else buffer

    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        count, action = rows.stop - start, safe[rows]
        at = action[:, None]
        base_z = base_buffer[:count]
        if base_product:
            assert base_hidden is not None and base_action is not None
            head.logits(base_hidden[rows], base_z)
            base_action[rows] = base_z.gather(1, at)[:, 0]
            if base_sum is not None:
                base_sum[0][rows], base_sum[1][rows] = _shift_and_log_sum(base_z, 1.0)
        x = buffer[:count]
        if merged:
            assert base_hidden is not None
            mixed = (q_hidden[rows].to(dtype) + m * base_hidden[rows].to(dtype)).to(q_hidden.dtype)
            head.logits(mixed, x, 1.0 + m)
        else:
            head.logits(q_hidden[rows], x)
        z_action = x.gather(1, at)[:, 0]
        slopes = head.slope(x) if need_grad and logit_softcap != 0.0 else None
        if two_buffers:
            masked = (x == NEG_INF) | (base_z == NEG_INF)
            x.add_(base_z, alpha=m).masked_fill_(masked, NEG_INF)
        x_action[rows] = x.gather(1, at)[:, 0]
        q_action[rows] = z_action
        if base_action is not None and not base_product:
            assert base_hidden is not None
            # Both logits of the action by the same arithmetic, so that equal streams cancel.
            base_action[rows] = head.action_logits(base_hidden[rows], action)
            q_action[rows] = head.action_logits(q_hidden[rows], action)
        shift[rows], log_sum[rows] = _shift_and_log_sum(x, alpha_tilde)
        if need_grad:
            x.sub_(shift[rows, None]).div_(alpha_tilde).sub_(log_sum[rows, None]).exp_()
            hold_out = torch.where(in_range[rows, None], 0, x.gather(1, at))
            x.scatter_(1, at, hold_out)
            x.mul_(slopes) if slopes is not None else x.mul_(logit_scale)
            head.pull_back(x, u[rows])

    outputs = finish_rows(
        actions,
        vocab,
        q_action,
        base_action,
        x_action,
        (shift, log_sum),
        base_sum,
        base_lse,
        base_logp,
        (alpha_0, alpha_tilde, center),
    )
    policy_logp = outputs[3]
    has_action = actions != -100
    p_action = torch.where(has_action, policy_logp.exp(), 0)
    slope_action = torch.where(in_range, head.slope(q_action), 0)
    return (*outputs[:5], p_action, slope_action, u)


def linear_bwd(
    u: Tensor,
    weight: Tensor,
    actions: Tensor,
    p_action: Tensor,
    slope_action: Tensor,
    coef_p: Tensor,
    coef_a: Tensor,
) -> Tensor:
    vocab, dim = weight.shape
    dtype = coef_p.dtype
    grad = torch.empty_like(u)
    has_action = actions != -100
    safe = torch.where((actions >= 0) & (actions < vocab), actions, 0)
    of_action = torch.where(has_action, (coef_p * p_action + coef_a) * slope_action, 0)
    step = max(1, BWD_BYTES.get(u.device.type, BWD_BYTES_ELSEWHERE) // (4 * dim))
    for start in range(0, u.shape[0], step):
        part = slice(start, start + step)
        gathered = weight[safe[part]].to(dtype).mul_(of_action[part, None])
        torch.add(gathered.addcmul_(u[part].to(dtype), coef_p[part, None]), 0, out=grad[part])
    return grad
