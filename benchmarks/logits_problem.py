"""What the logits benchmark computes: inputs, the float64 truth, errors against it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qadapter import reference
from qadapter.outputs import ResidualValues

LOSS = {"gamma": 1.0, "reg_coef": 0.1, "bt_scale": 1.0}
Values = tuple[Tensor, Tensor, Tensor, Tensor]  # q, value, base_logp, policy_logp


@dataclass(frozen=True)
class Problem:
    base: Tensor  # [N, V]
    q: Tensor  # the leaf whose gradient is wanted
    actions: Tensor
    alphas: tuple[float, float, float]  # alpha_0, alpha_tilde, center
    pairs: int
    grads: Tensor  # [3, N], of q, value and policy_logp

    @property
    def m(self) -> float:
        return self.alphas[0] - self.alphas[2]

    @property
    def names(self) -> dict[str, float]:
        return dict(zip(("alpha_0", "alpha_tilde", "center"), self.alphas, strict=True))

    @property
    def cu_seqlens(self) -> Tensor:
        """2 * pairs sequences of one length."""
        step = self.q.shape[0] // (2 * self.pairs)
        places = torch.arange(2 * self.pairs + 1, device=self.q.device, dtype=torch.int32)
        return places * step


@dataclass(frozen=True)
class Peer:
    """A way to compute the values, and the loss, from logits.

    ``reason`` says why a problem cannot be run, ``cannot`` what the peer cannot do at all or is
    made to do beside its work.
    """

    name: str
    values: Callable[[Problem], Values]
    loss: Callable[[Problem], Tensor]
    reason: Callable[[Problem], str] = lambda _: ""
    cannot: str = ""


def make_problem(
    n: int,
    v: int,
    dtype: torch.dtype,
    device: str,
    alphas: tuple[float, float, float],
    pairs: int,
) -> Problem:
    generator = torch.Generator(device=device).manual_seed(0)
    base = torch.randn(n, v, device=device, generator=generator).mul_(3)
    q = torch.randn(n, v, device=device, generator=generator).mul_(0.3).add_(base)
    return Problem(
        base=base.to(dtype),
        q=q.to(dtype).requires_grad_(),
        actions=torch.randint(0, v, (n,), device=device, generator=generator),
        alphas=alphas,
        pairs=pairs,
        grads=torch.randn(3, n, device=device, generator=generator),
    )


def values_from_logps(problem: Problem, logps: Callable[[Tensor, Tensor], Tensor]) -> Values:
    """For whoever has log pi(a) of a tensor of logits and nothing else.

    The log-sum-exp is z[a] - log pi(a); an x that is not z_q itself has to be made first.
    """
    alpha_0, alpha_tilde, center = problem.alphas
    index = problem.actions[:, None]
    with torch.no_grad():
        base_logp = logps(problem.base, problem.actions).float()
        base_action = problem.base.gather(1, index)[:, 0].float()
        base_lse = base_action - base_logp
    q_action = problem.q.gather(1, index)[:, 0].float()
    x, x_action = problem.q, q_action
    if problem.m != 0 or alpha_tilde != 1:
        x = ((problem.q.float() + problem.m * problem.base.float()) / alpha_tilde).to(x.dtype)
        x_action = x.gather(1, index)[:, 0].float()
    policy_logp = logps(x, problem.actions).float()
    value = alpha_tilde * (x_action - policy_logp) - alpha_0 * base_lse
    return q_action - center * base_action, value, base_logp, policy_logp


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


def peer_of_logps(name: str, logps: Callable[[Tensor, Tensor], Tensor], **more: Any) -> Peer:
    """Of who has log pi(a) of a tensor of logits and actions; the rest is plain PyTorch."""

    def values(problem: Problem) -> Values:
        return values_from_logps(problem, logps)

    def loss(problem: Problem) -> Tensor:
        q, value, _, _ = values(problem)
        return preference_loss(q, value, problem.pairs, **LOSS)

    return Peer(name, values, loss, **more)


@dataclass(frozen=True)
class Truth:
    """Float64 from the same (rounded) inputs. ``grad`` and ``of_loss`` are gradients of q."""

    value: Tensor
    policy_logp: Tensor
    grad: Tensor
    of_loss: Tensor


def solve(problem: Problem, step: int = 32) -> Truth:
    """The specification in float64, in chunks of rows; the loss couples them by two floats."""
    n = problem.q.shape[0]
    columns: dict[str, list[Tensor]] = {"q": [], "value": [], "policy_logp": []}

    def chunk(rows: slice) -> tuple[Tensor, Any]:
        leaf = problem.q.detach()[rows].double().requires_grad_()
        base = problem.base[rows].double()
        return leaf, reference.residual_values(base, leaf, problem.actions[rows], **problem.names)

    parts = [slice(i, min(i + step, n)) for i in range(0, n, step)]
    with torch.no_grad():
        for rows in parts:
            values = chunk(rows)[1]
            for name, column in columns.items():
                column.append(getattr(values, name))
    q, value, policy_logp = (torch.cat(column) for column in columns.values())
    nothing = torch.zeros_like(q)
    of_values = ResidualValues(
        q.requires_grad_(), value.requires_grad_(), nothing, nothing, nothing
    )
    loss = reference.preference_loss(of_values, problem.actions, problem.cu_seqlens, **LOSS).loss
    loss_q, loss_value = torch.autograd.grad(loss, (q, value))
    wanted = problem.grads.double()
    grads, of_loss = [], []
    for rows in parts:
        leaf, values = chunk(rows)
        outputs = (values.q, values.value, values.policy_logp)
        both = torch.autograd.grad(outputs, leaf, list(wanted[:, rows]), retain_graph=True)
        grads.append(both[0].float())
        from_loss = (loss_q[rows], loss_value[rows])
        of_loss.append(torch.autograd.grad(outputs[:2], leaf, from_loss)[0].float())
    return Truth(value.detach(), policy_logp, torch.cat(grads), torch.cat(of_loss))


def value_errors(truth: Truth, values: Values) -> dict[str, float]:
    """Largest absolute errors."""
    found = {"value": (values[1], truth.value), "policy_logp": (values[3], truth.policy_logp)}
    return {
        name: (ours.detach().double() - right).abs().max().item()
        for name, (ours, right) in found.items()
    }


def gradient_error(grad: Tensor, right: Tensor, step: int = 32) -> float:
    """The worst row's, relative."""
    worst = 0.0
    for i in range(0, len(grad), step):
        ours, exact = grad[i : i + step].double(), right[i : i + step].double()
        worst = max(worst, ((ours - exact).norm(dim=-1) / exact.norm(dim=-1)).max().item())
    return worst
