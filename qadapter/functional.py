"""The stateless public API: fused operations on logits and on per-token values.

Rows are flat: row n is one state s_n, its action is ``actions[n]``. Sequences are consecutive rows,
delimited by ``cu_seqlens``; the P chosen responses come first, then the P rejected ones. Equations
are those of Q-Adapter (arXiv 2407.03856); `qadapter.reference` is the same in plain PyTorch.
"""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from qadapter import shards
from qadapter.kl import base_moments, kl_to_base
from qadapter.ops import checks, linear, residual  # noqa: F401  (residual registers itself)
from qadapter.ops import sample as sample_ops
from qadapter.outputs import BaseMoments, PreferenceLoss, ResidualValues, Sample

__all__ = [
    "BaseMoments",
    "PreferenceLoss",
    "ResidualValues",
    "Sample",
    "base_moments",
    "kl_to_base",
    "linear_qadapter_loss",
    "linear_residual_values",
    "preference_loss",
    "qadapter_loss",
    "residual_values",
    "sample",
]


def residual_values(
    base_logits: Tensor | None,
    q_logits: Tensor,
    actions: Tensor,
    *,
    alpha_0: float = 1.0,
    alpha_tilde: float = 1.0,
    center: float = 1.0,
    base_lse: Tensor | None = None,
    base_logp: Tensor | None = None,
) -> ResidualValues:
    """Q(s, a), V(s) and both log-probabilities of the actions, in one read of each logits tensor.

    With z_b, z_q the two logits and m = alpha_0 - center:

        q     = z_q[a] - center * z_b[a]
        value = alpha_tilde * lse((z_q + m z_b) / alpha_tilde) - alpha_0 * lse(z_b)

    Args:
        base_logits: [N, V], the frozen base's logits; no gradient ever flows to them. None is
            allowed where m == 0 and both ``base_lse`` and ``base_logp`` are given.
        q_logits: [N, V], float32, bfloat16 or float16 (float64 on the torch backend, which then
            returns float64); any row stride. Logits of -inf are masked tokens.
        actions: int64 [N], token ids; -100 marks a row without action, whose q, base_logp and
            policy_logp are 0 and whose value is still given.
        alpha_0, alpha_tilde: entropy weights of the base and of the composed policy (paper's
            alpha_0 and alpha-tilde).
        center: 1 if q_logits hold z_b + Q, 0 if they hold Q itself.
        base_lse, base_logp: float32 [N], known logsumexp and log-probability of the base.

    Returns:
        `ResidualValues`, float32 [N]; q, value and policy_logp are differentiable w.r.t. q_logits.

    Raises:
        ValueError: a shape, dtype, device or parameter that does not fit, named. An action out of
            range is an error on a CPU; on a GPU, where looking would stall, it gives NaN in its
            row. So does, on any device, a row with a NaN or without a finite logit.
    """
    alpha_0, alpha_tilde, center = checks.composition(alpha_0, alpha_tilde, center)
    checks.statistics(base_logits, q_logits, actions, base_lse, base_logp, alpha_0 - center)
    q, value, base_logp, policy_logp, base_lse, _, _ = torch.ops.qadapter.residual_fwd(
        base_logits, q_logits, actions, base_lse, base_logp, alpha_0, alpha_tilde, center
    )
    return ResidualValues(q, value, base_logp.detach(), policy_logp, base_lse.detach())


def preference_loss(
    values: ResidualValues,
    actions: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float = 1.0,
    reg_coef: float = 0.1,
    bt_scale: float = 1.0,
    value_at: str = "next",
    length_norm: str = "response",
    denominators: Tensor | None = None,
) -> PreferenceLoss:
    """Bradley-Terry loss and squared-reward regulariser on per-token values.

    r_t = q_t - gamma * V(s_{t+1}) with V = 0 after the last row of a sequence (inverse soft Bellman
    operator); R = mean (or sum) of r over the response; loss = mean over pairs of
    -log sigmoid(bt_scale * (R_chosen - R_rejected)) + reg_coef * mean of r^2 over all actions.

    Args:
        values: of `residual_values`; only ``q`` and ``value`` are used, float32 [N].
        actions: int64 [N]; rows with -100 have no reward (their value still counts for the row
            before: the end of a truncated response).
        cu_seqlens: int32 or int64 [2P+1]; sequences 0..P-1 chosen, P..2P-1 rejected, pair i is
            (i, P+i).
        gamma: discount of the Bellman operator.
        reg_coef: weight of the regulariser (``beta`` of the released code).
        bt_scale: inverse temperature of Bradley-Terry; reported rewards and margins are unscaled.
        value_at: "next" is the maths; "same" takes V(s_t), as the released code does.
        length_norm: "response" takes the mean over the response's actions, "none" the sum. A
            sequence without actions has R = 0.
        denominators: float32 [2], numbers of pairs and of actions to divide by instead of this
            batch's own: the totals of a gradient-accumulated batch.

    Returns:
        `PreferenceLoss`; only ``loss`` carries a gradient. Nothing is copied to the host.

    Raises:
        ValueError: arguments that do not fit, named; on a CPU also cu_seqlens that do not run from
            0 to N in non-decreasing steps (on a GPU the loss is NaN then).
    """
    q, value = values.q, values.value
    checks.tensor("values.q", q, 1, (torch.float32, torch.float64))
    checks.same("values.value", value, "values.q", q)
    checks.tensor("actions", actions, 1, (torch.int64,))
    checks.rows("actions", actions, q.shape[0], q.device, "values")
    checks.sequences(cu_seqlens, q.device)
    checks.denominators(denominators, q.device)
    arguments = checks.preference(gamma, reg_coef, bt_scale, value_at, length_norm)
    return PreferenceLoss.of(
        torch.ops.qadapter.preference_fwd(q, value, actions, cu_seqlens, denominators, *arguments)
    )


def qadapter_loss(
    base_logits: Tensor | None,
    q_logits: Tensor,
    actions: Tensor,
    cu_seqlens: Tensor,
    *,
    alpha_0: float = 1.0,
    alpha_tilde: float = 1.0,
    center: float = 1.0,
    base_lse: Tensor | None = None,
    base_logp: Tensor | None = None,
    gamma: float = 1.0,
    reg_coef: float = 0.1,
    bt_scale: float = 1.0,
    value_at: str = "next",
    length_norm: str = "response",
    denominators: Tensor | None = None,
) -> PreferenceLoss:
    """The whole Q-Adapter loss from logits: `preference_loss` of `residual_values`, fused.

    Arguments, result and errors are those of the two functions. Forward reads each logits tensor
    once and keeps four floats a row; backward reads each once more and writes the gradient of
    ``q_logits``, the only [N, V] tensor that is made.
    """
    composition = checks.composition(alpha_0, alpha_tilde, center)
    checks.statistics(base_logits, q_logits, actions, base_lse, base_logp, alpha_0 - center)
    checks.sequences(cu_seqlens, q_logits.device)
    checks.denominators(denominators, q_logits.device)
    arguments = checks.preference(gamma, reg_coef, bt_scale, value_at, length_norm)
    return PreferenceLoss.of(
        torch.ops.qadapter.loss_fwd(
            base_logits,
            q_logits,
            actions,
            cu_seqlens,
            base_lse,
            base_logp,
            denominators,
            *composition,
            *arguments,
        )
    )


def linear_residual_values(
    base_hidden: Tensor | None,
    q_hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    *,
    bias: Tensor | None = None,
    alpha_0: float = 1.0,
    alpha_tilde: float = 1.0,
    center: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    base_lse: Tensor | None = None,
    base_logp: Tensor | None = None,
    chunk_size: int | None = None,
    memory_mib: float | None = None,
    group: "dist.ProcessGroup | None" = None,
    vocab_offset: int | None = None,
) -> ResidualValues:
    """`residual_values` from hidden states and a frozen head, without the logits.

    The logits of a row would be cap(logit_scale * (hidden W^T + bias)) with
    cap(s) = logit_softcap * tanh(s / logit_softcap). They are formed in float32 for a few rows (on
    the cpp backend for a few columns) at a time and reduced at once. As the head has no gradient,
    that of the hidden state is known in the forward up to two factors a row, whatever the loss on
    (q, value, policy_logp): forward costs three matrix products of 2 N D V FLOPs, or two where the
    base's logits are not needed; backward next to nothing.

    Args:
        base_hidden: [N, D], last hidden states of the frozen base; no gradient ever flows to them.
            None is allowed where alpha_0 == center and ``base_lse`` and ``base_logp`` are given.
        q_hidden: [N, D], those of the adapter stream: float32, bfloat16 or float16 (float64 on the
            torch backend).
        weight: [V, D], the head, in the dtype of the hidden states or another one (then products
            are taken in float32). It must not require a gradient.
        actions: int64 [N], token ids; -100 marks a row without action.
        bias: [V]; entries of -inf are masked tokens (a soft cap makes them finite: -logit_softcap).
        alpha_0, alpha_tilde, center: see `residual_values`.
        logit_scale, logit_softcap: what the model does to its logits.
        base_lse, base_logp: float32 [N], known logsumexp and log-probability of the base. With
            ``base_lse`` one product less is taken: none for the base where alpha_0 == center, else
            one for both streams, on q_hidden + (alpha_0 - center) * base_hidden rounded to the
            hidden states' dtype. They must belong to this base and these rows: a wrong value
            shifts every result and cannot be noticed here.
        chunk_size: rows whose logits may exist at a time; default, as many as fit in 48 MiB on a
            CPU, 1 GiB on a GPU. The cpp backend takes it as an upper bound, and needs none.
        memory_mib: the same as a budget in MiB.
        group, vocab_offset: of a head in shards over the processes of a group (`qadapter.shards`):
            ``weight`` and ``bias`` are rows vocab_offset, ... of the whole one, everything else is
            as for the whole in all of them, and so are the results. An action that is in no shard
            gives NaN.

    Returns:
        `ResidualValues`, float32 [N]; q, value and policy_logp are differentiable w.r.t. q_hidden.
        Under autocast hidden states and head are cast as for any matrix product.

    Raises:
        ValueError: as `residual_values`; and for a ``weight`` or ``bias`` that requires a gradient.
    """
    alpha_0, alpha_tilde, center = checks.composition(alpha_0, alpha_tilde, center)
    if group is not None or vocab_offset is not None:
        composition = {"alpha_0": alpha_0, "alpha_tilde": alpha_tilde, "center": center}
        options: Any = {"logit_scale": logit_scale, "logit_softcap": logit_softcap}
        options |= {"chunk_size": chunk_size, "memory_mib": memory_mib, **composition}
        options |= {"bias": bias, "base_lse": base_lse, "base_logp": base_logp}
        streams, shard = (base_hidden, q_hidden), (weight, actions, group, vocab_offset)
        return shards.residual_values(linear_residual_values, streams, *shard, **options)
    scale, softcap = checks.head(logit_scale, logit_softcap)
    chunking = checks.chunk(chunk_size, memory_mib)
    checks.linear_statistics(
        base_hidden, q_hidden, weight, actions, bias, base_lse, base_logp, alpha_0 - center
    )
    base_hidden, q_rows, head_weight = linear.autocast(base_hidden, q_hidden, weight)
    assert q_rows is not None
    q, value, base_logp, policy_logp, base_lse, *_ = torch.ops.qadapter.linear_fwd(
        base_hidden,
        q_rows,
        head_weight,
        actions,
        bias,
        base_lse,
        base_logp,
        alpha_0,
        alpha_tilde,
        center,
        scale,
        softcap,
        *chunking,
        linear.needs_grad(q_rows),
    )
    return ResidualValues(q, value, base_logp.detach(), policy_logp, base_lse.detach())


def linear_qadapter_loss(
    base_hidden: Tensor | None,
    q_hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    cu_seqlens: Tensor,
    *,
    bias: Tensor | None = None,
    alpha_0: float = 1.0,
    alpha_tilde: float = 1.0,
    center: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    base_lse: Tensor | None = None,
    base_logp: Tensor | None = None,
    chunk_size: int | None = None,
    memory_mib: float | None = None,
    gamma: float = 1.0,
    reg_coef: float = 0.1,
    bt_scale: float = 1.0,
    value_at: str = "next",
    length_norm: str = "response",
    denominators: Tensor | None = None,
) -> PreferenceLoss:
    """The whole Q-Adapter loss from hidden states: `preference_loss` of `linear_residual_values`.

    Arguments, result and errors are those of the two functions. What is kept for backward is one
    [N, D] tensor and a few floats a row.
    """
    composition = checks.composition(alpha_0, alpha_tilde, center)
    scale, softcap = checks.head(logit_scale, logit_softcap)
    chunking = checks.chunk(chunk_size, memory_mib)
    checks.linear_statistics(
        base_hidden, q_hidden, weight, actions, bias, base_lse, base_logp, alpha_0 - center
    )
    checks.sequences(cu_seqlens, q_hidden.device)
    checks.denominators(denominators, q_hidden.device)
    preference = checks.preference(gamma, reg_coef, bt_scale, value_at, length_norm)
    base_hidden, q_rows, head_weight = linear.autocast(base_hidden, q_hidden, weight)
    assert q_rows is not None
    outputs = torch.ops.qadapter.linear_loss_fwd(
        base_hidden,
        q_rows,
        head_weight,
        actions,
        bias,
        base_lse,
        base_logp,
        cu_seqlens,
        denominators,
        *composition,
        scale,
        softcap,
        *chunking,
        linear.needs_grad(q_rows),
        *preference,
    )
    return PreferenceLoss.of(outputs)


def sample(
    base_logits: Tensor | None,
    q_logits: Tensor,
    *,
    alpha_0: float | Tensor = 1.0,
    alpha_tilde: float | Tensor = 1.0,
    center: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | Tensor | None = None,
    position: int | Tensor | None = None,
    group: Any = None,
    vocab_offset: int | None = None,
) -> Sample:
    """Draw one token per row from softmax((Q + alpha_0 log pi_base) / alpha_tilde).

    Args:
        base_logits: [B, V] floating; may be None where alpha_0 == center (the base then cancels).
        q_logits: [B, V] floating.
        alpha_0, alpha_tilde, center: as in `residual_values`; the first two also as a float tensor
            [B], a value per row.
        temperature: divides the policy's logits; 0 takes the most probable token (lowest id first).
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: then the smallest set of most probable tokens that holds this mass, in (0, 1].
        min_p: then the tokens with at least this share of the largest probability, in [0, 1].
            Filters work on renormalised probabilities; ties go to the lowest token id.
        seed: None (torch's global generator), an int (row b draws stream b of that seed), or
            int64 [B], one stream per row whatever the batch.
        position: None, an int or int64 [B]: which draw of its stream a row takes, such as the
            position of the token in its sequence.
        group, vocab_offset: as in `linear_residual_values`: the logits are the columns of this
            process, [B, V_s], in the order of the ranks; all have the same seed, not None, and get
            the same tokens, those of the whole rows but for rounding. ``top_p`` without ``top_k``
            puts the logits together first; nothing else does.

    Returns:
        `Sample`: tokens int64 [B], and logprobs float32 [B] under the filtered policy. At
        temperature 0 they are those of the filtered policy at temperature 1. A row that holds a NaN
        or +inf, or no token at all, gives token -1 with logprob NaN. Neither has a gradient.

    Raises:
        ValueError: an argument that does not fit, named.
    """
    checks.logits(base_logits, q_logits)
    alpha_0 = sample_ops.float_rows("alpha_0", alpha_0, q_logits)
    alpha_tilde = sample_ops.float_rows("alpha_tilde", alpha_tilde, q_logits)
    if not isinstance(alpha_tilde, Tensor):
        checks.number("alpha_tilde", alpha_tilde, above=0.0)
    center = checks.number("center", center)
    if base_logits is None and (isinstance(alpha_0, Tensor) or alpha_0 != center):
        raise ValueError(
            "base_logits: may only be None where alpha_0 == center (both numbers), got None"
        )
    if checks.number("temperature", temperature) < 0:
        raise ValueError(f"temperature: expected 0 (greedy) or more, got {temperature!r}")
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 0:
        raise ValueError(f"top_k: expected 0 (off) or a positive int, got {top_k!r}")
    if not 0.0 < checks.number("top_p", top_p) <= 1.0:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p!r}")
    if not 0.0 <= checks.number("min_p", min_p) <= 1.0:
        raise ValueError(f"min_p: expected a number in [0, 1], got {min_p!r}")

    q_logits = q_logits.detach()
    batch, vocab = q_logits.shape
    device = q_logits.device
    base_weight = alpha_0 - center
    number = not isinstance(base_weight, Tensor)
    no_base = number and base_weight == 0
    sharded = group is not None or vocab_offset is not None
    offset = shards.check(group, vocab_offset) if sharded else 0
    if sharded and seed is None:
        raise ValueError("seed: expected an int or int64 [B] with shards of the logits")
    arguments = (
        # A base without weight cancels, and need not be read.
        None if base_logits is None or no_base else base_logits.detach(),
        q_logits,
        sample_ops.scales(alpha_tilde, temperature, q_logits),
        sample_ops.as_rows(base_weight, q_logits),
        sample_ops.row_keys(seed, batch, device),
        sample_ops.int64_rows("position", 0 if position is None else position, batch, device),
        temperature == 0,
        top_k if sharded else min(top_k, vocab),
        float(top_p),
        float(min_p),
    )
    if sharded:
        return Sample(*shards.sample(*arguments, group=group, vocab_offset=offset))
    numbers = number and not isinstance(alpha_tilde, Tensor)
    return Sample(*sample_ops.call(*arguments, numbers=numbers))
