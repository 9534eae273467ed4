"""The method's identities hold exactly, whatever the kernels, down to an enumerated world."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from qadapter import functional as QF
from qadapter import reference

LN2 = math.log(2.0)


def pairs_batch(vocab=11, lengths=(3, 1, 4, 2, 5, 1), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = sum(lengths)
    base = torch.randn(rows, vocab, generator=generator, dtype=dtype) * 3
    adapter = base + torch.randn(rows, vocab, generator=generator, dtype=dtype)
    actions = torch.randint(0, vocab, (rows,), generator=generator)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return base, adapter, actions, cu_seqlens


@pytest.mark.parametrize(
    ("alpha_0", "alpha_tilde", "center"),
    [(1.0, 1.0, 1.0), (0.01, 1.0, 0.0), (0.5, 0.1, 1.0), (2.0, 3.0, 0.3)],
)
def test_gamma_one_reward_is_a_log_ratio(alpha_0, alpha_tilde, center):
    """r_t = Q - V(s_t) = alpha_tilde log pi(a) - alpha_0 log pi_base(a)."""
    base, adapter, actions, _ = pairs_batch()
    values = QF.residual_values(
        base, adapter, actions, alpha_0=alpha_0, alpha_tilde=alpha_tilde, center=center
    )
    expected = alpha_tilde * values.policy_logp - alpha_0 * values.base_logp
    torch.testing.assert_close(values.q - values.value, expected)


@pytest.mark.parametrize("center", [0.0, 1.0])
@pytest.mark.parametrize("beta", [0.1, 1.0, 7.0])
def test_dpo_is_a_special_case(center, beta):
    base, adapter, actions, cu_seqlens = pairs_batch()
    ours = QF.qadapter_loss(
        base,
        adapter,
        actions,
        cu_seqlens,
        center=center,
        reg_coef=0.0,
        bt_scale=beta,
        length_norm="none",
        value_at="same",
    )
    policy = F.log_softmax(adapter + (1.0 - center) * base, -1)
    ratio = (policy - F.log_softmax(base, -1)).gather(1, actions[:, None])[:, 0]
    sums = torch.stack([part.sum() for part in ratio.split(cu_seqlens.diff().tolist())])
    dpo = -F.logsigmoid(beta * (sums[:3] - sums[3:])).mean()
    torch.testing.assert_close(ours.loss, dpo)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_both_alignments_give_one_margin(gamma):
    """Summed over responses that share their prompt and end, V telescopes: next and same agree."""
    base, adapter, actions, cu_seqlens = pairs_batch()
    first = cu_seqlens[:-1].long()
    for chosen, rejected in zip(first[:3], first[3:], strict=True):  # one prompt, one first state
        base[rejected], adapter[rejected] = base[chosen], adapter[chosen]
    margins = [
        QF.qadapter_loss(
            base, adapter, actions, cu_seqlens, gamma=gamma, value_at=at, length_norm="none",
            alpha_0=0.3, alpha_tilde=0.8,
        ).margins
        for at in ("next", "same")
    ]  # fmt: skip
    torch.testing.assert_close(*margins)
    assert margins[0].abs().min() > 1e-3


def test_truncated_response_uses_its_last_value():
    """The extra row of a cut response changes its reward by exactly gamma * V(s_T)."""
    base, adapter, actions, _ = pairs_batch(lengths=(4, 2))
    actions[3] = -100
    cut = torch.tensor([0, 4, 6], dtype=torch.int32)
    kwargs = {"length_norm": "none", "gamma": 0.9}
    with_value = QF.qadapter_loss(base, adapter, actions, cut, **kwargs)
    keep = torch.tensor([0, 1, 2, 4, 5])
    ended = QF.qadapter_loss(
        base[keep], adapter[keep], actions[keep], torch.tensor([0, 3, 5]), **kwargs
    )
    last = QF.residual_values(base, adapter, actions).value[3]
    torch.testing.assert_close(with_value.chosen_rewards, ended.chosen_rewards - 0.9 * last)


def test_released_loss_by_hand():
    """Two sequences of different length in a padded batch, every term written out with math.exp."""
    generator = torch.Generator().manual_seed(5)
    vocab, width = 3, 4
    base = torch.randn(2, width, vocab, generator=generator, dtype=torch.float64)
    adapter = torch.randn(2, width, vocab, generator=generator, dtype=torch.float64)
    input_ids = torch.tensor([[0, 2, 1, 2], [0, 1, 2, 2]])
    attention_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    labels = torch.tensor([[-100, 2, 1, 2], [-100, 1, 2, 2]])
    alpha_0, alpha_tilde, gamma, beta = 0.3, 0.7, 0.9, 0.2

    def reward(seq, t):
        z_b, z_q = base[seq, t].tolist(), adapter[seq, t].tolist()
        log_z = math.log(sum(math.exp(z) for z in z_b))
        mixed = [(q + alpha_0 * (b - log_z)) / alpha_tilde for q, b in zip(z_q, z_b, strict=True)]
        value = alpha_tilde * math.log(sum(math.exp(c) for c in mixed))
        return z_q[int(input_ids[seq, t + 1])] - gamma * value

    # The mask of index t is that of token t: index 0 (first response token) is dropped in both, and
    # index 2 of the shorter sequence, whose next token is padding, is scored.
    chosen = [reward(0, 1), reward(0, 2)]
    rejected = [reward(1, 1), reward(1, 2)]
    margin = (sum(chosen) - sum(rejected)) / (width - 1)
    squares = sum(r * r for r in chosen + rejected) / 4
    expected = math.log(1 + math.exp(-margin)) + beta * squares
    got = reference.released_loss(
        base, adapter, input_ids, attention_mask, labels,
        alpha_0=alpha_0, alpha_tilde=alpha_tilde, gamma=gamma, beta=beta,
    )  # fmt: skip
    assert got.item() == pytest.approx(expected, rel=1e-12)


class World:
    """Two letters and an end token, at most three steps: 15 sequences, 7 states.

    The base is the soft-optimal policy of some r_1 with entropy weight 1; r_2 has returns k ln 2,
    so that every Bradley-Terry probability is a fraction and 30 copies of each pair are the
    population.
    """

    END, HORIZON = 2, 3

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.states = [s for n in range(self.HORIZON) for s in itertools.product((0, 1), repeat=n)]
        self.index = {s: i for i, s in enumerate(self.states)}
        self.sequences = [
            (*s, a)
            for s in self.states
            for a in range(3)
            if a == self.END or len(s) == self.HORIZON - 1
        ]
        assert len(self.sequences) == 15 and len(self.states) == 7
        returns_1 = torch.randn(15, generator=generator, dtype=torch.float64) * 1.5
        self.base_policy = self.token_policy(torch.softmax(returns_1, 0))
        # r_2 prefers the letter 1 first and ending on a letter.
        self.k = [int(y[0] == 1) + int(y[-1] != self.END) for y in self.sequences]

    def token_policy(self, sequence_probs):
        """pi(a | s) of a distribution over whole sequences, [7, 3]."""
        mass = torch.zeros(7, 3, dtype=torch.float64)
        for probability, y in zip(sequence_probs, self.sequences, strict=True):
            for t, a in enumerate(y):
                mass[self.index[y[:t]], a] += probability
        return mass / mass.sum(1, keepdim=True)

    def sequence_logp(self, token_logp):
        return torch.stack(
            [sum(token_logp[self.index[y[:t]], a] for t, a in enumerate(y)) for y in self.sequences]
        )

    def population(self):
        """State and action of every row, cu_seqlens; each pair in both orders."""
        chosen, rejected = [], []
        for i, j in itertools.combinations(range(15), 2):
            ratio = 2.0 ** (self.k[i] - self.k[j])
            wins = round(30 * ratio / (1 + ratio))
            assert abs(wins / 30 - ratio / (1 + ratio)) < 1e-12
            chosen += [i] * wins + [j] * (30 - wins)
            rejected += [j] * wins + [i] * (30 - wins)
        rows, actions, ends = [], [], [0]
        for s in chosen + rejected:
            y = self.sequences[s]
            rows += [self.index[y[:t]] for t in range(len(y))]
            actions += y
            ends.append(len(rows))
        return torch.tensor(rows), torch.tensor(actions), torch.tensor(ends)


@pytest.mark.parametrize("value_at", ["next", "same"])
@pytest.mark.parametrize(
    ("alpha_0", "alpha_tilde", "center"), [(1.0, 1.0, 1.0), (0.5, 0.8, 0.0), (2.0, 1.5, 1.0)]
)
def test_population_loss_recovers_the_customised_policy(value_at, alpha_0, alpha_tilde, center):
    """lambda r_1 + r_2 is maximised without ever seeing r_1 (alpha_0 = lambda * alpha_1)."""
    world = World()
    base_logits = world.base_policy.log()
    returns_2 = torch.tensor(world.k, dtype=torch.float64) * LN2
    tilted = (returns_2 + alpha_0 * world.sequence_logp(base_logits)) / alpha_tilde
    optimal = world.token_policy(torch.softmax(tilted, 0))

    rows, actions, cu_seqlens = world.population()
    table = (center * base_logits).clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [table], max_iter=300, line_search_fn="strong_wolfe", tolerance_change=1e-14
    )

    def closure():
        optimiser.zero_grad()
        loss = QF.qadapter_loss(
            base_logits[rows], table[rows], actions, cu_seqlens,
            alpha_0=alpha_0, alpha_tilde=alpha_tilde, center=center,
            reg_coef=0.0, length_norm="none", value_at=value_at,
        ).loss  # fmt: skip
        loss.backward()
        return loss

    optimiser.step(closure)
    learned = reference.policy_logits(
        base_logits, table.detach(), alpha_0, alpha_tilde, center
    ).log_softmax(-1)
    kl = (optimal * (optimal.log() - learned)).sum(-1).max()
    start = (optimal * (optimal.log() - base_logits)).sum(-1).max()
    assert start > 0.03  # the base is far from the optimum
    assert kl < 1e-4
