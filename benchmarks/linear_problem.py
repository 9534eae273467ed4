"""What the linear benchmark computes: inputs, the float64 truth, errors against it.

Every competitor computes the same loss from the same hidden states,

    r    = q - value                        per token, the value at the same state
    loss = mean over pairs of softplus(mean r of the rejected - mean r of the chosen)

which is `preference_loss` with value_at="same", gamma=1 and no regulariser. It is the one loss that
all of them can express: with alpha_0 = center = 1 it is DPO with the mean log-ratio, and
r = alpha_tilde * policy_logp - alpha_0 * base_logp in general. It is also the hardest case for the
gradient: coef_p = -coef_a in every row, so that where p_a is close to 1 nearly everything cancels.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qadapter import reference

BT_SCALE = 1.0
SUM_TOKENS = 512
# p_a of a row: how sure the policy is of the action. The last band is where gradients cancel.
BANDS = {"<0.9": (-1.0, 0.9), "0.9-0.99": (0.9, 0.99), ">0.99": (0.99, 2.0)}


@dataclass(frozen=True)
class Mode:
    """What is known in advance, and so how many products of 2 N D V FLOPs are needed."""

    alpha_0: float
    alpha_tilde: float
    center: float
    cached: bool
    products: int

    @property
    def m(self) -> float:
        return self.alpha_0 - self.center

    @property
    def composition(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("alpha_0", "alpha_tilde", "center")}


MODES = {
    "uncached": Mode(1.0, 1.0, 1.0, cached=False, products=3),
    # the base's statistics are known: its head is not needed at all
    "cached": Mode(1.0, 1.0, 1.0, cached=True, products=2),
    # both streams enter the policy; with the base's statistics known they share one product
    "merged": Mode(0.3, 1.0, 0.0, cached=True, products=2),
}


@dataclass(frozen=True)
class Problem:
    mode: Mode
    pairs: int
    base_hidden: Tensor
    q_hidden: Tensor  # the leaf whose gradient is wanted
    weight: Tensor
    actions: Tensor
    cu_seqlens: Tensor
    base_lse: Tensor | None = None
    base_logp: Tensor | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """All that q and value are functions of, by the names that this package has for them."""
        names = ("base_hidden", "q_hidden", "weight", "actions", "base_lse", "base_logp")
        return {name: getattr(self, name) for name in names} | self.mode.composition


def pair_loss(rewards: Tensor, pairs: int) -> Tensor:
    """The loss above, for 2 * pairs sequences of one length, the chosen ones first."""
    means = rewards.view(2 * pairs, -1).mean(1)
    return torch.nn.functional.softplus(BT_SCALE * (means[pairs:] - means[:pairs])).mean()


def make_problem(
    n: int, d: int, v: int, dtype: torch.dtype, device: str, mode: Mode, pairs: int
) -> Problem:
    """Hidden states that put the action anywhere between improbable and all but certain.

    The head's rows have norm 1 or so, and the logits a standard deviation of 2 (log-sum-exp near
    log V + 2). A half of the rows has p_a between 1e-4 and 0.9, a quarter each falls in the other
    two bands: this much of W[a] is added to the state.
    """
    generator = torch.Generator(device=device).manual_seed(n + d + v)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(n, device=device, generator=generator) * (high - low) + low

    weight = normal(v, d).div_(d**0.5).to(dtype)
    actions = torch.randint(0, v, (n,), device=device, generator=generator)
    odds = uniform(-9.2, 2.2)  # log p / (1 - p)
    part = torch.arange(n, device=device) % 4
    odds = torch.where(part == 2, uniform(2.2, 4.6), odds)
    odds = torch.where(part == 3, uniform(4.6, 11.5), odds)
    base = normal(n, d).mul_(2)
    of_action = weight[actions].float()
    # the action's part of the state makes the other logits a little wider: hence 2.2 and not 2
    wanted = torch.tensor(float(v)).log().item() + 2.2 + odds
    push = (wanted - (base * of_action).sum(-1)) / of_action.square().sum(-1)
    base.addcmul_(push[:, None], of_action)
    q = base + normal(n, d).mul_(0.1)
    size = 1.0 / (1.0 + mode.m)  # the policy's logits are z_q + m z_b
    ends = torch.arange(2 * pairs + 1, dtype=torch.int32, device=device)
    return Problem(
        mode=mode,
        pairs=pairs,
        base_hidden=(size * base).to(dtype),
        q_hidden=(size * q).to(dtype).requires_grad_(),
        weight=weight,
        actions=actions,
        cu_seqlens=ends * (n // (2 * pairs)),
    )


@dataclass(frozen=True)
class Truth:
    """Float64, from the same (rounded) inputs, without any merging."""

    rewards: Tensor
    value: Tensor
    base_lse: Tensor
    base_logp: Tensor
    p_action: Tensor
    grad: Tensor


def solve(problem: Problem, step: int = 128) -> Truth:
    """The specification in float64. As dr/dh needs one row only, rows are done in chunks."""
    weight = problem.weight.double()
    columns: list[tuple[Tensor, ...]] = []
    for start in range(0, len(problem.q_hidden), step):
        rows = slice(start, start + step)
        hidden = problem.q_hidden.detach()[rows].double().requires_grad_()
        base, actions = problem.base_hidden[rows].double(), problem.actions[rows]
        v = reference.linear_residual_values(
            base, hidden, weight, actions, **problem.mode.composition
        )
        reward = v.q - v.value
        (grad,) = torch.autograd.grad(reward.sum(), hidden)
        found = (reward, v.value, v.base_lse, v.base_logp, v.policy_logp.exp(), grad)
        columns.append(tuple(column.detach() for column in found))
    truth = Truth(*(torch.cat(column) for column in zip(*columns, strict=True)))
    rewards = truth.rewards.clone().requires_grad_()
    (of_loss,) = torch.autograd.grad(pair_loss(rewards, problem.pairs), rewards)
    return replace(truth, grad=truth.grad * of_loss[:, None])


def with_cache(problem: Problem, truth: Truth) -> Problem:
    if not problem.mode.cached:
        return problem
    return replace(problem, base_lse=truth.base_lse.float(), base_logp=truth.base_logp.float())


def _spread(errors: Tensor) -> dict[str, float]:
    return {"rms": errors.square().mean().sqrt().item(), "max": errors.abs().max().item()}


def errors(
    truth: Truth, grad: Tensor, rewards: Tensor | None = None, value: Tensor | None = None
) -> dict[str, Any]:
    """Of dh, relative per row, by bands of p_a; of r and value, per token and on sums of tokens."""
    relative = (grad.double() - truth.grad).norm(dim=-1) / truth.grad.norm(dim=-1)
    report: dict[str, Any] = {"dh": {}}
    for name, (low, high) in BANDS.items():
        band = relative[(truth.p_action >= low) & (truth.p_action < high)]
        if rows := band.numel():
            found = {"median": band.median().item(), "max": band.max().item()}
            report["dh"][name] = {"rows": rows, **found}
    for name, ours, right in (("reward", rewards, truth.rewards), ("value", value, truth.value)):
        if ours is not None:
            error = ours.detach().double() - right
            window = min(SUM_TOKENS, error.numel())
            # every run of so many tokens, so that a few rows give more than one or two sums
            sums = error.unfold(0, window, 1).sum(1)
            report[name] = {**_spread(error), f"sum of {window}": _spread(sums)}
    return report
