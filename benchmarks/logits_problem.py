"""What the logits benchmark computes: inputs, the float64 truth, errors against it."""

from collections.abc import Sequence
from dataclasses import dataclass

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
    alphas: Sequence[float]  # alpha_0, alpha_tilde, center
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


def make_problem(
    n: int, v: int, dtype: torch.dtype, device: str, alphas: Sequence[float], pairs: int
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


@dataclass(frozen=True)
class Truth:
    """Float64 from the same (rounded) inputs. ``grad`` and ``of_loss`` are gradients of q."""

    value: Tensor
    policy_logp: Tensor
    grad: Tensor
    of_loss: Tensor


def solve(problem: Problem, step: int = 32) -> Truth:
    """The specification in float64, in chunks of rows; the loss couples them by two floats."""

    def chunk(rows: slice) -> tuple[Tensor, tuple[Tensor, ...]]:
        leaf = problem.q.detach()[rows].double().requires_grad_()
        base, actions = problem.base[rows].double(), problem.actions[rows]
        values = reference.residual_values(base, leaf, actions, **problem.names)
        return leaf, (values.q, values.value, values.policy_logp)

    parts = [slice(i, i + step) for i in range(0, problem.q.shape[0], step)]
    with torch.no_grad():
        found = zip(*(chunk(rows)[1] for rows in parts), strict=True)
        q, value, policy_logp = map(torch.cat, found)
    nothing = torch.zeros_like(q)
    of_values = ResidualValues(
        q.requires_grad_(), value.requires_grad_(), nothing, nothing, nothing
    )
    loss = reference.preference_loss(of_values, problem.actions, problem.cu_seqlens, **LOSS).loss
    of_loss = torch.autograd.grad(loss, (q, value))
    wanted = problem.grads.double()
    grads = []
    for rows in parts:
        leaf, outputs = chunk(rows)
        both = torch.autograd.grad(outputs, leaf, list(wanted[:, rows]), retain_graph=True)
        both += torch.autograd.grad(outputs[:2], leaf, [column[rows] for column in of_loss])
        grads.append([grad.float() for grad in both])
    return Truth(value.detach(), policy_logp, *map(torch.cat, zip(*grads, strict=True)))


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
    for ours, exact in zip(grad.split(step), right.split(step), strict=True):
        error = (ours.double() - exact.double()).norm(dim=-1) / exact.double().norm(dim=-1)
        worst = max(worst, error.max().item())
    return worst
