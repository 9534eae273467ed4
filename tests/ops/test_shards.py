"""A head in shards over 2 and 4 processes gives what the whole one gives."""

import itertools

import pytest
import torch
from torch import distributed as dist

from qadapter import functional as QF
from qadapter import shards

N, D, V = 37, 24, 101  # no multiples of anything
CU_SEQLENS = torch.tensor([0, 9, 20, 29, 37], dtype=torch.int32)
COMPOSITIONS = ((1.0, 1.0, 1.0), (0.7, 1.3, 1.0), (0.5, 2.0, 0.0))
NAMES = ("alpha_0", "alpha_tilde", "center")


def inputs(dtype, masked, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight, base = normal(V, D) * 0.8, normal(N, D)
    q = base + 0.5 * normal(N, D)
    actions = torch.randint(0, V - 30, (N,), generator=generator)
    actions[[4, 19, 28]] = -100
    bias = None
    if masked:  # the padding of a vocabulary: the last of four shards has nothing else
        bias = normal(V).float()
        bias[-30:] = -torch.inf
    return weight.to(dtype), base.to(dtype), q.to(dtype), bias, actions


def shard_of(rank, world):
    lengths = [len(part) for part in torch.arange(V).chunk(world)]  # as DTensor's Shard(0)
    offset = sum(lengths[:rank])
    return offset, slice(offset, offset + lengths[rank])


def measured(values, hidden):
    """Values, a loss of all that is differentiable, and its gradient."""
    actions = inputs(torch.float32, False)[4]
    loss = QF.preference_loss(values, actions, CU_SEQLENS, length_norm="none", bt_scale=0.1).loss
    loss = loss + 0.01 * values.policy_logp.sum()
    loss.backward()
    return [loss.detach(), *(value.detach() for value in values), hidden.grad]


def differences(ones, others):
    return [
        float((a.double() - b.double()).abs().max() / (a.double().abs().max() + 1e-30))
        for a, b in zip(ones, others, strict=True)
    ]


def check_case(group, dtype, composition, known, masked):
    weight, base, q, bias, actions = inputs(dtype, masked)
    offset, part = shard_of(dist.get_rank(group), dist.get_world_size(group))
    options = dict(zip(NAMES, composition, strict=True))

    def whole(dtype):
        parts = (t.to(dtype) for t in (base, q, weight))
        base_rows, hidden, head = parts
        hidden = hidden.clone().requires_grad_()
        values = QF.linear_residual_values(
            base_rows, hidden, head, actions, bias=bias, **options, **stats(base_rows, head)
        )
        return measured(values, hidden)

    def stats(base_rows, head):
        if not known:
            return {}
        made = QF.linear_residual_values(base_rows, base_rows, head, actions, bias=bias)
        return {"base_lse": made.base_lse, "base_logp": made.base_logp}

    hidden = q.clone().requires_grad_()
    values = QF.linear_residual_values(
        base,
        hidden,
        weight[part],
        actions,
        bias=None if bias is None else bias[part],
        group=group,
        vocab_offset=offset,
        **options,
        **stats(base, weight),
    )
    got, alone = measured(values, hidden), whole(dtype)
    errors = differences(alone, got)
    where = f"{dtype} {composition} known={known} masked={masked}: {errors}"
    limit = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-6}[dtype]
    assert max(errors[:6]) < limit, where
    if dtype == torch.bfloat16:
        # Each shard rounds its part of the gradient, as the whole one is rounded.
        limit = 3 * differences(whole(torch.float64), alone)[6]
    assert errors[6] < limit, where


def check_collectives(group):
    """One gather forward, one sum backward, of the sizes that are promised."""
    weight, base, q, _, actions = inputs(torch.float32, False)
    offset, part = shard_of(dist.get_rank(group), dist.get_world_size(group))
    called = []
    plain = dist.all_gather, dist.all_reduce
    dist.all_gather = lambda out, one, **k: called.append(one.shape) or plain[0](out, one, **k)
    dist.all_reduce = lambda one, **k: called.append(one.shape) or plain[1](one, **k)
    try:
        hidden = q.clone().requires_grad_()
        values = QF.linear_residual_values(
            base, hidden, weight[part], actions, group=group, vocab_offset=offset
        )
        assert called == [(6, N)]
        (values.value.sum() + values.q.sum() + values.policy_logp.sum()).backward()
        assert called == [(6, N), (N, D)]
    finally:
        dist.all_gather, dist.all_reduce = plain


def check_edges(group):
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    weight, base, q, _, actions = inputs(torch.float32, False)
    offset, part = shard_of(rank, world)
    options = {"group": group, "vocab_offset": offset}
    far = actions.clone()
    far[3] = V  # in no shard
    values = QF.linear_residual_values(base, q, weight[part], far, **options)
    assert values.q[3].isnan() and values.policy_logp[3].isnan() and values.base_logp[3].isnan()
    assert values.value.isfinite().all() and int(values.q.isnan().sum()) == 1
    fresh = QF.linear_residual_values(base, base, weight[part], actions, **options)
    assert (fresh.value == 0).all() and (fresh.q == 0).all()
    none = QF.linear_residual_values(base[:0], q[:0], weight[part], actions[:0], **options)
    assert all(len(value) == 0 for value in none)


FILTERS = (
    {},
    {"temperature": 0.7, "min_p": 0.05},
    {"temperature": 0},
    {"top_k": 1},
    {"top_k": 20},
    {"top_k": 60, "top_p": 0.8},  # more than some shards have
    {"top_k": 20, "temperature": 0},
    {"top_k": 500, "min_p": 0.01},
    {"top_p": 0.9},
)


def check_sampling(group):
    """The whole rows' draws: with ties over the borders of shards, masks, and rows that are
    broken."""
    weight, base, q, _, _ = inputs(torch.float32, False)
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    offset, part = shard_of(rank, world)
    logits = [(rows @ weight.T).repeat(8, 1) for rows in (base, q)]
    logits[1][:60] = (logits[1][:60] * 2).round() / 2
    logits[0][:60] = logits[0][:60].round()
    logits[1][:, -30:] = -torch.inf
    logits[1][7, 50], logits[0][9, 3], logits[1][11] = torch.nan, torch.inf, -torch.inf
    gathered = [shards.whole_logits(one[:, part], group) for one in logits]
    assert all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(logits, gathered, strict=True)
    )
    for filters in FILTERS:
        how = {"alpha_0": 0.5, "center": 0.0, "seed": 3, "position": 5, **filters}
        one = QF.sample(*logits, **how)
        other = QF.sample(*(x[:, part] for x in logits), group=group, vocab_offset=offset, **how)
        assert torch.equal(one.tokens, other.tokens), filters
        assert other.tokens.dtype == torch.int64 and int((one.tokens == -1).sum()) == 3
        torch.testing.assert_close(one.logprobs, other.logprobs, equal_nan=True, msg=str(filters))
    seeds = torch.arange(len(q) * 8)
    how = {"alpha_tilde": torch.linspace(0.5, 2, len(seeds)), "seed": seeds, "position": seeds}
    one = QF.sample(None, logits[1], **how)
    part_of = {"group": group, "vocab_offset": offset}
    other = QF.sample(None, logits[1][:, part], **how, **part_of)
    assert torch.equal(one.tokens, other.tokens)


def process(rank, world, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{path}", rank=rank, world_size=world)
    pair = dist.new_group([0, 1])
    groups = [dist.group.WORLD, *([pair] if rank < 2 else [])]
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    for group in groups:
        for case in itertools.product(dtypes, COMPOSITIONS, (False, True), (False, True)):
            check_case(group, *case)
        check_collectives(group)
        check_edges(group)
        check_sampling(group)
    dist.destroy_process_group()


def test_shards_give_what_the_whole_head_gives(tmp_path):
    torch.multiprocessing.spawn(process, (4, tmp_path / "store"), nprocs=4)


def test_what_is_no_shard():
    logits = torch.zeros(2, 5)
    with pytest.raises(ValueError, match="group, vocab_offset: expected both"):
        QF.sample(logits, logits, seed=1, vocab_offset=0)
    with pytest.raises(ValueError, match="seed: expected an int"):
        QF.sample(logits, logits, group=object(), vocab_offset=0)
    weight, base, q, _, actions = inputs(torch.float32, False)
    for options in ({"vocab_offset": 0}, {"group": object()}):
        with pytest.raises(ValueError, match="group, vocab_offset: expected both"):
            QF.linear_residual_values(base, q, weight, actions, **options)
    with pytest.raises(ValueError, match="vocab_offset: expected 0 or more, got -1"):
        QF.linear_residual_values(base, q, weight, actions, group=object(), vocab_offset=-1)
