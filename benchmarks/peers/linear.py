"""Who computes the loss from hidden states (`linear_problem`): this package, and all peers."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.linear_problem import BT_SCALE, Problem, pair_loss
from benchmarks.peers import Peer, why_not
from qadapter import functional as QF

Values = tuple[Tensor, Tensor | None]  # r of every token, and the value of its state


def _peer(name: str, values: Callable[[Problem], Values], **more: Any) -> Peer:
    """Of who has r of every token."""

    def loss(problem: Problem) -> Tensor:
        return pair_loss(values(problem)[0], problem.pairs)

    return Peer(name, **{"loss": loss, "values": values, **more})


# This package, by its public functions


def _our_arguments(problem: Problem) -> dict[str, Any]:
    # Known base statistics and a policy that the base does not enter: its states are not needed.
    unused = problem.mode.cached and problem.mode.m == 0
    return problem.arguments | ({"base_hidden": None} if unused else {})


def _our_values(problem: Problem) -> Values:
    values = QF.linear_residual_values(**_our_arguments(problem))
    return values.q - values.value, values.value


def _our_loss(problem: Problem) -> Tensor:
    settings = {"value_at": "same", "reg_coef": 0.0, "bt_scale": BT_SCALE}
    arguments = {**_our_arguments(problem), **settings}
    return QF.linear_qadapter_loss(cu_seqlens=problem.cu_seqlens, **arguments).loss


OURS = _peer("qadapter", _our_values, loss=_our_loss)

# Plain PyTorch, and torch.compile of the very function


def eager_values(
    base_hidden: Tensor,
    q_hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    alpha_0: float,
    alpha_tilde: float,
    center: float,
    base_lse: Tensor | None,
    base_logp: Tensor | None,
) -> Values:
    """r and value from hidden states by way of the logits, as a careful person writes it.

    Known statistics of the base save its product, or merge the two, as they do for anyone else; and
    nothing but the logits and what logsumexp needs has [N, V] elements.
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
    value = alpha_tilde * lse - alpha_0 * base_lse
    return q - value, value


EAGER = _peer(
    "eager",
    lambda problem: eager_values(**problem.arguments),
    cannot="nothing, but it keeps the logits and what the gradient needs of them",
)


def _eager_loss(pairs, **arguments):  # type: ignore[no-untyped-def]
    rewards, value = eager_values(**arguments)
    return pair_loss(rewards, pairs), rewards.detach(), value.detach()


# Compiled for each shape: code for shapes that vary would only be slower.
_compiled = torch.compile(_eager_loss, dynamic=False)


def _call_compiled(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():  # one graph, also where only the values are wanted
        return _compiled(problem.pairs, **problem.arguments)


COMPILED = Peer(
    "compile",
    loss=lambda problem: _call_compiled(problem)[0],
    values=lambda problem: _call_compiled(problem)[1:],
    cannot="keeps logits; compiles for seconds to minutes before its first run, not counted",
)

# Liger-Kernel's chunked preference loss with this loss plugged in. It computes the gradient chunk
# by chunk of pairs in forward (compiled, one pair at a time, as its losses do by default), so a
# loss must be a sum over pairs of what their two sequence means are: this one is, the Q-Adapter
# regulariser and a value at the next state are not. The head's gradient is computed unless the
# weight does not require one, which is the case here.

LIGER = "liger_kernel.chunked_loss.fused_linear_preference"


def mixed_hidden(problem: Problem) -> Tensor:
    """What the merged product is taken of: one rounding to the dtype of the head."""
    q, base, m = problem.q_hidden, problem.base_hidden, problem.mode.m
    return q if m == 0 else (q.float() + m * base.float()).to(q.dtype)


@functools.cache
def _liger_function() -> Any:
    base = importlib.import_module(LIGER).LigerFusedLinearPreferenceBase
    settings = {"compute_nll_loss": False, "compiled": True, "average_log_prob": True}
    settings |= {"beta": BT_SCALE, "use_ref_model": True, "chunk_size": 1}

    class QAdapterPreference(base):
        @staticmethod
        def preference_loss_fn(  # type: ignore[no-untyped-def]
            chosen, rejected, full_target, beta, ref_chosen_logps, ref_rejected_logps, alpha_0
        ):
            margin = (rejected - alpha_0 * ref_rejected_logps) - (
                chosen - alpha_0 * ref_chosen_logps
            )
            loss = torch.nn.functional.softplus(beta * margin)
            return loss.sum() / (full_target.shape[0] // 2)

        @classmethod
        def forward(cls, ctx, hidden, weight, target, base_hidden, alpha_0):  # type: ignore[no-untyped-def]
            reference = {"ref_input": base_hidden, "ref_weight": weight, "alpha_0": alpha_0}
            inputs = {"_input": hidden, "weight": weight, "target": target}
            return super().forward(cls=cls, ctx=ctx, **inputs, **reference, **settings)

        @staticmethod
        def backward(ctx, *grads):  # type: ignore[no-untyped-def]
            return base.backward(ctx, grads)[0], None, None, None, None

    return QAdapterPreference


def _liger_reason(problem: Problem) -> str:
    reason = why_not(LIGER, "liger-kernel")
    if not reason and problem.mode.cached:
        return "its preference losses have no place for known statistics of the base"
    return reason


def _liger_loss(problem: Problem) -> Tensor:
    shape = (2 * problem.pairs, -1, problem.weight.shape[1])
    hidden, base = mixed_hidden(problem).view(shape), problem.base_hidden.view(shape)
    target = problem.actions.view(2 * problem.pairs, -1)
    loss, _ = _liger_function().apply(hidden, problem.weight, target, base, problem.mode.alpha_0)
    return loss


PLUGGED_IN = Peer(
    "Liger",
    loss=_liger_loss,
    reason=_liger_reason,
    cannot="gives no value of a token, so neither the regulariser nor a value at the next state; "
    "sequences of one length only; no known statistics of the base",
)


# All that follow have log pi(a) of every row and nothing else, one call per stream.


def _of_logps(name: str, logps: Callable[[Problem, Tensor], Tensor], **more: Any) -> Peer:
    """``logps`` is of a problem and hidden states. What is known of the base is used; else its
    hidden states take a call of their own. alpha_tilde is 1."""

    def values(problem: Problem) -> Values:
        assert problem.mode.alpha_tilde == 1.0
        base = problem.base_logp
        if base is None:
            with torch.no_grad():
                base = logps(problem, problem.base_hidden)
        return logps(problem, mixed_hidden(problem)) - problem.mode.alpha_0 * base, None

    return _peer(name, values, **more)


def _lce_logps(problem: Problem, hidden: Tensor) -> Tensor:
    """In chunks of rows. On a CPU it would choose 8 or 16, for which matrix products are several
    times slower; it is told to take 256."""
    rows = None if problem.weight.is_cuda else 256
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
    nll = torch.nn.functional.linear_cross_entropy(
        hidden, problem.weight, problem.actions, reduction="none", options=options
    )
    return -nll.float()


def _lce_reason(_: Problem) -> str:
    there = hasattr(torch.nn, "LinearCrossEntropyOptions")  # 2.13 or later
    return "" if there else f"torch {torch.__version__} has no chunked F.linear_cross_entropy"


TORCH_LCE = _of_logps(
    "torch LCE",
    _lce_logps,
    reason=_lce_reason,
    cannot="gives no log-sum-exp and no value; takes the product with the head again in backward; "
    "rounds the loss of a row to the dtype of the hidden states",
)


def _trl_logps(problem: Problem, hidden: Tensor) -> Tensor:
    """In tiles of the vocabulary, as its trainers have it, and with their width of tiles. On a GPU
    tiles are reduced by a Triton kernel; elsewhere by PyTorch."""
    utils = importlib.import_module("trl.trainer.utils")
    # bias, targets, temperature, width, soft-cap, scale, what else to compute
    rest = (None, problem.actions, 1.0, utils._CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ())
    return utils._ChunkedLogProbFunction.apply(hidden, problem.weight, *rest)[0]


def trl_reason(name: str) -> str:
    """Why a function of TRL's cannot be called; "" if it can."""
    reason = why_not("trl.trainer.utils", "trl")
    if not reason and not hasattr(importlib.import_module("trl.trainer.utils"), name):
        return f"this version of trl has no {name} (1.16 has)"
    return reason


TRL = _of_logps(
    "TRL",
    _trl_logps,
    reason=lambda _: trl_reason("_ChunkedLogProbFunction"),
    cannot="gives no log-sum-exp and no value; rounds logits to the dtype of the hidden states and "
    "takes the product with the head again in backward; on a CPU that product is in float32",
)


def _cce(name: str, filter_eps: str | None, reason: Callable[[Problem], str]) -> Peer:
    """Cut Cross-Entropy, logits in registers only: on a GPU its Triton kernel, which by default
    skips blocks of a gradient that are small; on a CPU torch.compile of the logits."""

    def logps(problem: Problem, hidden: Tensor) -> Tensor:
        function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
        options: dict[str, Any] = {"impl": "torch_compile"}
        if problem.weight.is_cuda:
            options = {"impl": "cce", "filter_eps": filter_eps}
        nll = function(hidden, problem.weight, problem.actions, reduction="none", **options)
        return -nll.float()

    return _of_logps(
        name,
        logps,
        reason=reason,
        cannot="gives no log-sum-exp and no value (25.1.1 has no `return_lse`), so a composition "
        "with alpha_tilde other than 1 is out of reach; takes the product with the head again in "
        "backward; on a CPU it is torch.compile of the logits",
    )


def _cce_reason(problem: Problem) -> str:
    reason = why_not("cut_cross_entropy", "cut-cross-entropy")
    if not reason and problem.weight.is_cuda and problem.weight.dtype == torch.float32:
        return "its backward takes 16-bit hidden states only"
    return reason


def _exact_reason(problem: Problem) -> str:
    return _cce_reason(problem) if problem.weight.is_cuda else "on a CPU the same as CCE"


CCE = _cce("CCE", "high", _cce_reason)
CCE_EXACT = _cce("CCE exact", None, _exact_reason)


def quack_reason(tensor: Tensor) -> str:
    if not tensor.is_cuda:
        return "it has CUDA kernels only"
    reason = why_not("quack.cross_entropy", "quack-kernels")
    if not reason and torch.cuda.get_device_capability() < (9, 0):
        return "its kernels are for compute capability 9.0 and later"
    return reason


def _quack_logps(problem: Problem, hidden: Tensor) -> Tensor:
    """Its chunked product with the head gives a mean over rows only; this one keeps the logits."""
    function = importlib.import_module("quack.linear_cross_entropy").linear_cross_entropy_func
    return -function(hidden, problem.weight, None, problem.actions, reduction="none").float()


QUACK = _of_logps(
    "QuACK",
    _quack_logps,
    reason=lambda problem: quack_reason(problem.weight),
    cannot="runs on a GPU of compute capability 9.0 or later only; keeps 16-bit logits where every "
    "row is wanted, as its chunked version gives their mean only",
)

ALL = (OURS, EAGER, COMPILED, PLUGGED_IN, TORCH_LCE, TRL, CCE, CCE_EXACT, QUACK)
PEERS = {peer.name: peer for peer in ALL}
CANNOT = {peer.name: peer.cannot for peer in ALL if peer.cannot}
