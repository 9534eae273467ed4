"""The linear operation on quack-kernels: softmax in the products' epilogues, no logits in memory.

    E_j = 2^(z_j log2 e - k)   in 16 bits, k an integer for every row and 192 (256, 128, 64) columns
    sum of E over the same, k, and z_a in float32            all from one product, h W^T
    lse = ln sum_k 2^k sum_k E        u = (2^(k - k_r) E) W / sum_k 2^(k - k_r) sum_k E

The second product scales E on its way in, by powers of two, and its rows on their way out: what
`linear_chunk` reads and writes between the products of the other backends (6 to 10 bytes an element
there) is 2 bytes written and 2 read. The base's product leaves a log-sum-exp alone. The
action's column is taken out of E, as everywhere.

Served: bfloat16, alpha_0 = center and alpha_tilde = 1 (training's default), no bias, logit scale or
soft-cap, V a multiple of 128, D of 8; with a gradient on compute capability 9.0 alone (the scaling
product is Hopper's), else from 9.0 on. Everything else runs on Triton. Log-probabilities at the
start of an adapter are equal to rounding (1e-6) here, not to the bit; q is 0 exactly.

N = 8192, D = 4096, V = 128256, 790 TFLOP/s: 10.9 ms a product; predicted 1.05 to 1.08 times the
products, against 1.11 to 1.17 of `linear_chunk`. Memory: E, 1 GiB at most. Not measured on a GPU.
"""

import functools
import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from qadapter.kernels.linear_head import aligned_rows, rows_per_chunk
from qadapter.ops.linear_torch import Head
from qadapter.ops.rows import finish_rows

ROWS = 128  # of a tile of either product
STRIP = 64  # columns of E with a scale of their own in the second product


@functools.cache
def quack() -> Any:
    """The functions of quack-kernels that are used, and two of the same kind; ImportError."""
    from quack.epilogue.frontend import gemm_epilogue
    from quack.epilogue.library import lse_target_epi
    from quack.epilogue.ops import ColVecLoad
    from quack.epilogue.scaled_exp import scaled_exp_target_epi
    from quack.operand_transform import a_transform
    from quack.operand_transform.host import transform_a_operand

    @a_transform(vec_size=8, args={"u": "colvec_ktile"})
    def scaled(x, u):  # type: ignore[no-untyped-def]
        return x * u

    # Said, since from shapes it would be a guess where a chunk has as many rows as D.
    @gemm_epilogue(ops={"v": ColVecLoad("v")})
    def by_row(acc, v):  # type: ignore[no-untyped-def]
        return {"D": acc * v}

    return SimpleNamespace(
        lse=lse_target_epi,
        scaled_exp=scaled_exp_target_epi,
        scaled=scaled,
        by_row=by_row,
        operand=transform_a_operand,
    )


def tile_columns(vocab: int) -> int | None:
    """Columns that share a k: a divisor of V that the product has a tile for."""
    return next((tile for tile in (192, 256, 128, 64) if vocab % tile == 0), None)


def why_not(
    q_hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    composition: tuple[float, float, float],
    logit_scale: float,
    logit_softcap: float,
    need_grad: bool,
    capability: tuple[int, int],
) -> str | None:
    """None where this call is served, else what of it is not."""
    alpha_0, alpha_tilde, center = composition
    vocab, dim = weight.shape
    if capability < (9, 0) or (need_grad and capability != (9, 0)):
        return f"compute capability {capability[0]}.{capability[1]}"
    if q_hidden.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16:
        return f"hidden states of {q_hidden.dtype} and a head of {weight.dtype}"
    if alpha_0 != center or alpha_tilde != 1.0:
        return "alpha_0 != center or alpha_tilde != 1"
    if bias is not None or logit_scale != 1.0 or logit_softcap != 0.0:
        return "a head with bias, logit_scale or soft-cap"
    if vocab % 128 != 0 or dim % 8 != 0 or not weight.is_contiguous():
        return f"a head of {vocab} x {dim}: V % 128, D % 8"
    return None


def linear_fwd(
    base_hidden: Tensor | None,
    q_hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    base_lse: Tensor | None,
    base_logp: Tensor | None,
    alpha_0: float,
    chunk_size: int,
    need_grad: bool,
) -> tuple[Tensor, ...]:
    """q, value, base_logp, policy_logp, base_lse, p_action, slope_action, each float32 [N]; u.

    For calls that `why_not` has nothing against, with at least one row.
    """
    if base_hidden is None and (base_lse is None or base_logp is None):
        raise ValueError(
            "without base_hidden: alpha_0 == center, base_lse and base_logp are needed"
        )
    num_rows, dim = q_hidden.shape
    vocab, device = weight.shape[0], q_hidden.device
    q_hidden = aligned_rows(q_hidden)
    in_range = (actions >= 0) & (actions < vocab)
    safe = torch.where(in_range, actions, 0)
    u = torch.empty((num_rows if need_grad else 0, dim), dtype=q_hidden.dtype, device=device)
    if need_grad:
        lse, x_action = _rows_with_gradient(q_hidden, weight, safe, in_range, chunk_size, u)
    else:
        lse, x_action = _log_sums(q_hidden, weight, safe)
    q_action, base_action, base_sum = x_action, None, None
    if base_hidden is not None:
        base_hidden = aligned_rows(base_hidden)
        # Both logits of the action by the same arithmetic, so that equal streams cancel.
        head = Head(weight, None, 1.0, 0.0, torch.float32)
        q_action = head.action_logits(q_hidden, safe)
        base_action = head.action_logits(base_hidden, safe)
        if base_lse is None:
            base_sum = _split(_log_sums(base_hidden, weight, safe)[0])
    results = finish_rows(
        actions,
        vocab,
        q_action,
        base_action,
        x_action,
        _split(lse),
        base_sum,
        base_lse,
        base_logp,
        (alpha_0, 1.0, alpha_0),
    )
    p_action = torch.where(actions != -100, results[3].exp(), 0)
    return (*results[:5], p_action, in_range.float(), u)


def _split(lse: Tensor) -> tuple[Tensor, Tensor]:
    """(shift, log_sum), float32, of log-sum-exps in float64 or float32."""
    shift = lse.float()
    return shift, (lse - shift).float()


def _log_sums(hidden: Tensor, weight: Tensor, safe: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and the action's logit of every row, nothing else of the product."""
    found = quack().lse(hidden, weight.mT, store_d=False, target=safe, tuned=False)
    return found["lse"].view(-1), found["target_logit"].view(-1)


def _rows_with_gradient(
    hidden: Tensor, weight: Tensor, safe: Tensor, in_range: Tensor, chunk_size: int, u: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp (float64) and the action's logit of every row; u is written."""
    functions = quack()
    num_rows, dim = hidden.shape
    vocab, device = weight.shape[0], hidden.device
    tile = tile_columns(vocab)
    assert tile is not None
    rows = rows_per_chunk(num_rows, vocab // 2, 1, chunk_size)  # of 16 bits
    most = -(-rows // ROWS) * ROWS
    exponentials = torch.empty((most, vocab), dtype=weight.dtype, device=device)
    sums, powers = torch.empty((2, most, vocab // tile), dtype=torch.float32, device=device)
    logits = torch.zeros(num_rows, dtype=torch.float32, device=device)
    lse = torch.empty(num_rows, dtype=torch.float64, device=device)
    for start in range(0, num_rows, rows):
        chunk = slice(start, min(start + rows, num_rows))
        count = chunk.stop - start
        padded = -(-count // ROWS) * ROWS
        x, target = hidden[chunk], safe[chunk]
        if padded != count:  # rows of zeros, whose results are not looked at
            x = torch.cat([x, x.new_zeros(padded - count, dim)])
            target = torch.cat([target, target.new_zeros(padded - count)])
        e, s, k = exponentials[:padded], sums[:padded], powers[:padded]
        z = torch.empty(padded, dtype=torch.float32, device=device)
        functions.scaled_exp.gemm(
            x,
            weight,
            e,
            epi_args={
                "max_log2": tile,
                "sum_exp": s,
                "max_log2_out": k,
                "target": target,
                "target_logit": z,
            },
            tile_M=ROWS,
            tile_N=tile,
            cluster_M=2,
            cluster_N=1,
            pingpong=tile <= 208,
        )
        largest = k.amax(1, keepdim=True)
        shares = torch.exp2(k - largest)
        total = (s * shares).sum(1)
        lse[chunk] = (largest[:, 0].double() + total.double().log2())[:count] * math.log(2)
        logits[chunk] = z[:count]
        # The action's column is not in u; a row without an action keeps all of them.
        at = target[:count, None]
        kept = torch.where(in_range[chunk, None], 0, e[:count].gather(1, at))
        e[:count].scatter_(1, at, kept)
        strip = shares.to(e.dtype).t().repeat_interleave(tile // STRIP, 0).contiguous()
        into = u[chunk] if padded == count else torch.empty_like(x)
        functions.by_row.gemm(
            functions.operand(functions.scaled, e, {"u": strip}, ROWS, STRIP),
            weight.mT,
            into,
            epi_args={"v": total.reciprocal().unsqueeze(0)},
            transform_a=functions.scaled,
            tile_M=ROWS,
            tile_N=192 if dim % 192 == 0 else 256,
            tile_K=STRIP,
            cluster_M=2,
            cluster_N=1,
        )
        if padded != count:
            u[chunk] = into[:count]
    return lse, logits
