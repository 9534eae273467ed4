"""The CUDA operation on hidden states is float64's on the logits, on a host and on a GPU.

Tolerance: twice the error of the torch backend on the same inputs, plus a few float32 roundings of
what is added up; for u the roundings of p and of u itself to their dtypes.
"""

import pytest
import torch

from qadapter.ops import cuda, linear_torch

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("q", "value", "base_logp", "policy_logp", "base_lse", "p_action", "slope_action")
CLUSTERS = [0, 1, 2, 8]


def make(rows, dim, vocab, dtype, *, biased=False, seed=0):
    """(base_hidden, q_hidden, weight, actions, bias); the first of several rows has no action."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, dim, generator=generator)
    q = base + 0.3 * torch.randn(rows, dim, generator=generator)
    weight = torch.randn(vocab, dim, generator=generator) * 3 / dim**0.5
    actions = torch.randint(0, vocab, (rows,), generator=generator)
    if rows > 1:
        actions[0] = -100
    bias = torch.randn(vocab, generator=generator) if biased else None
    return base.to(dtype), q.to(dtype), weight.to(dtype), actions, bias


def widened(t):
    return t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t


def check(device, tensors, composition, *, head=(1.0, 0.0), cached=False, chunk=0, cluster=-1):
    base, q, weight, actions, bias = tensors
    lse = logp = None
    if cached:
        z = base.double() @ weight.double().t() * head[0]
        z = z if bias is None else z + bias.double() * head[0]
        z = z if head[1] == 0 else head[1] * torch.tanh(z / head[1])
        lse = z.logsumexp(-1).float()
        logp = (z.gather(1, actions.clamp(min=0)[:, None])[:, 0] - lse).float()
    args = (base, q, weight, actions, bias, lse, logp, *composition, *head, chunk, True)
    exact = linear_torch.linear_fwd(*map(widened, args))
    plain = linear_torch.linear_fwd(*args)
    here = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
    ours = cuda.linear_fwd(*here, cluster=cluster)
    for name, a, b, c in zip(NAMES, ours, exact, plain, strict=False):
        a = a.double().cpu()
        assert torch.equal(a.isnan(), b.isnan()), name
        finite = b.isfinite()
        assert torch.equal(a[b.isinf()], b[b.isinf()]), name
        if finite.any():
            size = max([1.0, *exact[4][exact[4].isfinite()].abs().tolist()])
            error = (a - b)[finite].abs().max().item()
            baseline = (c.double() - b)[finite].abs().max().nan_to_num(0.0).item()
            assert error <= 2 * baseline + 8 * 2.0**-23 * size, (name, error, baseline)
    u, want = ours[7].double().cpu(), exact[7]
    assert ours[7].dtype == q.dtype and torch.equal(u.isnan(), want.isnan())
    whole = ~want.isnan().any(-1)
    eps = torch.finfo(q.dtype).eps
    # sum_j p_j |W_j| is at most the largest weight of a column; tiny p are subnormal in float16
    largest = weight.double().abs().amax(0) * abs(head[0])
    tiny = torch.finfo(q.dtype).smallest_normal * eps * weight.shape[0]
    bound = (eps + 2e-6) * largest + eps * want.abs() + tiny * largest + 2 * (plain[7] - want).abs()
    assert ((u - want).abs() <= bound)[whole].all()
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("shape", [(3, 8, 1), (5, 16, 37), (4, 16, 1000), (3, 8, 9001)])
def test_small_shapes(cuda_device, shape, cluster, dtype):
    check(cuda_device, make(*shape, dtype), (1.0, 0.7, 1.0), cluster=cluster)


@pytest.mark.parametrize("cluster", [0, 4])
@pytest.mark.parametrize("head", [(1.0, 0.0), (0.5, 5.0)], ids=["plain", "capped"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
@pytest.mark.parametrize("cached", [False, True], ids=["", "cached"])
@pytest.mark.parametrize("composition", [(1.0, 0.7, 1.0), (0.5, 1.0, 1.0), (0.3, 2.0, 0.0)])
def test_small_cases(cuda_device, composition, cached, biased, head, cluster):
    for dtype in (torch.float32, torch.bfloat16):
        tensors = make(5, 16, 523, dtype, biased=biased)
        check(cuda_device, tensors, composition, head=head, cached=cached, cluster=cluster)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_vocabulary_chooses_its_cluster(cuda_device, dtype):
    check(cuda_device, make(2, 8, 128256, dtype), (1.0, 1.0, 1.0))
    check(cuda_device, make(2, 8, 50257, dtype), (0.5, 1.0, 1.0), head=(1.0, 30.0))


def test_small_chunks_give_what_one_gives(cuda_device):
    tensors = make(7, 16, 300, torch.bfloat16)
    whole = check(cuda_device, tensors, (0.5, 1.0, 1.0))
    for chunk in (1, 3):
        parts = check(cuda_device, tensors, (0.5, 1.0, 1.0), chunk=chunk)
        for a, b in zip(parts[:7], whole[:7], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("cluster", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_streams_cancel_exactly(cuda_device, dtype, cluster):
    base, _, weight, actions, _ = (
        None if t is None else t.to(cuda_device) for t in make(4, 16, 1234, dtype)
    )
    args = (base, base, weight, actions, None, None, None, 1.0, 1.0, 1.0, 1.0, 0.0, 0, True)
    ours = cuda.linear_fwd(*args, cluster=cluster)
    assert (ours[0] == 0).all() and (ours[1] == 0).all()


@pytest.mark.parametrize("cluster", [0, 4])
def test_small_masks_and_poison(cuda_device, cluster):
    base, q, weight, actions, bias = make(6, 16, 200, torch.float32, biased=True)
    bias[50:90] = -INF
    q[2], base[4] = NAN, NAN
    actions[1], actions[3], actions[5] = 60, 200, 199
    for composition in ((1.0, 1.0, 1.0), (0.5, 1.0, 1.0)):
        tensors = (base, q, weight, actions, bias)
        ours = check(cuda_device, tensors, composition, cluster=cluster)
        assert ours[7][2].isnan().all() and ours[0][1] == -INF
    bias[:] = -INF
    ours = check(cuda_device, (base, q, weight, actions, bias), (1.0, 1.0, 1.0), cluster=cluster)
    assert ours[1].isnan().all()


def test_p_without_its_action_lies_over_the_chunk(cuda_device):
    """The kernel alone: statistics and p of a chunk with a stride above V, and nothing else."""
    for cluster, (dtype, half) in [
        (cluster, kind)
        for cluster in CLUSTERS
        for kind in ((torch.bfloat16, 1), (torch.float16, 1), (torch.float32, 0))
    ]:
        rows, vocab, stride = 3, 1001, 1024
        z = torch.randn(rows + 1, stride, generator=torch.Generator().manual_seed(3)) * 3
        z[:, vocab:] = NAN
        chunk = z.clone().to(cuda_device)
        p = chunk.view(dtype)[:, -stride:]
        actions = torch.tensor([5, -100, 1000])
        statistics = torch.full((5, rows), NAN, device=cuda_device)
        here = (actions.to(cuda_device), statistics)
        numbers = (vocab, 0.0, 1.4426950408889634 / 0.8, 1.0, 0.0, True, cluster, 0)
        cuda.extension().linear_chunk(chunk, None, p, None, *here, *numbers)
        x = z[:rows, :vocab].double() / 0.8
        want = x.softmax(-1)
        want[0, 5] = want[2, 1000] = 0
        got = p[:rows, :vocab].double().cpu()
        assert ((got - want).abs() <= want * (torch.finfo(dtype).eps / 2 + 1e-5) + 1e-7).all()
        assert got[0, 5] == 0 and got[2, 1000] == 0
        found = statistics.double().cpu()
        assert torch.equal(found[0], z[:rows, :vocab].max(-1).values.double())
        lse = (x - x.max(-1, keepdim=True).values).logsumexp(-1)
        torch.testing.assert_close(found[1], lse, rtol=0, atol=2e-6)
        assert found[3, 0] == z[0, 5] and found[3, 2] == z[2, 1000] and (found[4] == 1).all()
        untouched = chunk[rows].cpu()
        assert torch.equal(untouched[:vocab], z[rows, :vocab]), "a row beyond the chunk"
        if not half:
            continue
        # the lower half of a row still holds logits
        assert torch.equal(chunk[:rows, : stride // 2].cpu(), z[:rows, : stride // 2])


def test_the_order_of_threads_does_not_matter(host, monkeypatch):
    """p lands where other threads and blocks read: a missing barrier would show."""
    for cluster in (0, 4):
        found = []
        for order in ("0", "1", "5", "6"):
            monkeypatch.setenv("QADAPTER_EMULATOR_ORDER", order)
            tensors = make(2, 8, 9001, torch.bfloat16)
            found.append(check(host, tensors, (0.5, 1.0, 1.0), cluster=cluster))
        assert all(torch.equal(a, b) for x in found for a, b in zip(x, found[0], strict=True))


def test_wrong_chunks_are_refused(cuda_device):
    z = torch.zeros(2, 64, device=cuda_device)
    actions, statistics = (torch.zeros(n, device=cuda_device) for n in (2, 10))
    numbers = (50, 0.0, 1.0, 1.0, 0.0, True, 1, 0)
    kernel = cuda.extension().linear_chunk
    fitting = (actions.long(), statistics.view(5, 2))
    for chunk, p, rest in (
        (z[:, :63], None, fitting),
        (z[:1], None, fitting),
        (z.half(), None, fitting),
        (z, z.clone(), fitting),
        (z, z.view(torch.bfloat16)[:, :64], fitting),
        (z, None, (actions, statistics.view(5, 2))),
        (z, None, (actions.long(), statistics.view(2, 5))),
    ):
        with pytest.raises(RuntimeError, match="qadapter: expected"):
            kernel(chunk, None, p, None, *rest, *numbers)
