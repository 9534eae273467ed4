"""The linear operation: Q, soft value and p @ W from hidden states, without the logits.

    z = head(h W^T)        chunk by chunk of tokens, float32 out of the product
    statistics, p          `linear_chunk`, p in the storage of the chunk
    u = p @ W              in the dtype of the hidden states

    m = 0, base_lse unknown   z_b through the same buffer first, for its statistics: 3 products
    m = 0, base_lse given     z_b[a] by a dot product: 2 products
    m != 0, base_lse given    one product of h_q + m h_b (no soft-cap): 2 products
    m != 0 otherwise          z_q and z_b side by side, two buffers: 3 products

Each product is 2 N D V FLOPs: N = 8192, D = 4096, V = 128256 is 8.6e12, 10.9 ms at 790 TFLOP/s, so
33 ms for three and 22 ms for two (one less without a gradient). On top come the rows' kernels: 6 to
10 bytes per element, 2.1 to 3.5 ms at 3.0 TB/s, and 4 (1.4 ms) for the base's pass. W is read once
per product and chunk (1.05 GB against 2.15 TFLOP: 13 % of the product's time, under it).

Memory: float32 buffers of 1 GiB at most (2048 rows at V = 128256, with two of them 1024), reused by
every chunk, in one piece whose size is 1 GiB in every call of more rows than that. Nothing on the
host waits for the device. Not measured on a GPU.
"""

import torch
import triton
from torch import Tensor

from qadapter.kernels.common import LOG2E, label_pointer, on_device
from qadapter.kernels.linear_chunk import ROW_PADDING, VEC, chunk_tile, linear_rows_kernel
from qadapter.kernels.linear_finish import action_logits, finish_rows
from qadapter.kernels.linear_head import (
    Head,
    aligned_rows,
    chunk_buffers,
    rows_per_chunk,
    weights_view,
)


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
    """q, value, base_logp, policy_logp, base_lse, p_action, slope_action, each float32 [N]; u."""
    num_rows, dim = q_hidden.shape
    vocab, device = weight.shape[0], q_hidden.device
    outputs = tuple(torch.empty(num_rows, dtype=torch.float32, device=device) for _ in range(7))
    u = torch.empty((num_rows if need_grad else 0, dim), dtype=q_hidden.dtype, device=device)
    if num_rows == 0:
        return (*outputs, u)
    mix_weight = float(alpha_0 - center)
    merged = mix_weight != 0 and base_lse is not None and logit_softcap == 0.0
    two_streams = mix_weight != 0 and not merged
    base_first = mix_weight == 0 and base_lse is None
    if base_hidden is None and (mix_weight != 0 or base_lse is None or base_logp is None):
        raise ValueError(
            "without base_hidden: alpha_0 == center, base_lse and base_logp are needed"
        )

    head = Head(weight, bias, logit_scale, logit_softcap)
    stride = triton.cdiv(vocab, ROW_PADDING) * ROW_PADDING
    rows = rows_per_chunk(num_rows, stride, 2 if two_streams else 1, chunk_size)
    buffers = chunk_buffers(rows, stride, 1 + two_streams, chunk_size, device)
    buffer, base_buffer = buffers[0], buffers[-1]
    p_dtype = weight.dtype
    p_rows = weights_view(buffer, p_dtype)
    plain_bias = head.scaled_bias(1.0, stride)
    x_bias = head.scaled_bias(1.0 + mix_weight, stride) if merged else plain_bias
    # Rows of a multiple of 4, so that every one of them starts on a 16-byte boundary.
    statistics = torch.empty((9, triton.cdiv(num_rows, 4) * 4), dtype=torch.float32, device=device)
    shift, log_sum, x_action, q_action, slope = statistics[:5]
    base_shift, base_log_sum, base_action, unused = statistics[5:]
    actions = label_pointer(actions)
    q_hidden = aligned_rows(q_hidden)
    base_hidden = None if base_hidden is None else aligned_rows(base_hidden)
    tile, warps = chunk_tile(vocab)

    def run_rows(
        count: int, first: int, x_bias: Tensor, outs: tuple[Tensor, ...], sign: int, write: bool
    ) -> None:
        linear_rows_kernel[(count,)](
            buffer,
            base_buffer,
            p_rows,
            x_bias,
            actions,
            *outs,
            base_shift,
            base_log_sum,
            base_action,
            first,
            stride,
            vocab,
            mix_weight,
            LOG2E / float(alpha_tilde) if outs[0] is shift else LOG2E,
            LOG2E,
            *head.scalars(),
            SIGN=sign,
            HAS_BIAS=bias is not None,
            CAPPED=logit_softcap != 0.0,
            SUM_BASE=base_lse is None,
            WRITE=write,
            P_PER_FLOAT=4 // p_dtype.itemsize,
            VEC=VEC,
            ROWS=tile,
            num_warps=warps,
            num_stages=1,  # a pipeline would load ahead of stores into the same row
            enable_fp_fusion=True,
        )

    sign = ((mix_weight > 0) - (mix_weight < 0)) if two_streams else 0
    with on_device(device):
        if base_hidden is not None and not two_streams and not base_first:
            action_logits(q_hidden, base_hidden, head, plain_bias, actions, q_action, base_action)
            # Both logits of the action by the same arithmetic, so that equal streams cancel.
            z_action = unused
        else:
            z_action = q_action
        for start in range(0, num_rows, rows):
            chunk = slice(start, min(start + rows, num_rows))
            count = chunk.stop - start
            z = buffer[:count, :vocab]
            if base_first:
                head.product(base_hidden[chunk], z)
                base_outs = (base_shift, base_log_sum, unused, base_action, unused)
                run_rows(count, start, plain_bias, base_outs, 0, False)
            hidden = q_hidden[chunk]
            if merged:
                mixed = torch.add(hidden.float(), base_hidden[chunk].float(), alpha=mix_weight)
                hidden = mixed.to(hidden.dtype) if hidden.dtype == weight.dtype else mixed
            elif two_streams:
                head.product(base_hidden[chunk], base_buffer[:count, :vocab])
            head.product(hidden, z)
            outs = (shift, log_sum, x_action, z_action, slope)
            run_rows(count, start, x_bias, outs, sign, need_grad)
            if need_grad:
                head.pull_back(p_rows[:count, :vocab], u[chunk])
        columns = (shift, log_sum, x_action, q_action, slope, base_shift, base_log_sum, base_action)
        known = base_hidden is not None
        composition = (alpha_0, alpha_tilde, center)
        finish_rows(actions, vocab, columns, known, base_lse, base_logp, composition, outputs)
    return (*outputs, u)
