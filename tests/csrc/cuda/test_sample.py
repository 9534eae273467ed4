"""The CUDA sampler draws the torch backend's tokens, on a host and on a GPU.

Rows are drawn in shapes that its filters find hard: flat, sorted, one cluster, ties everywhere.
"""

import math

import pytest
import torch

from qadapter import reference
from qadapter.ops import cuda, sample_torch

INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ("flat", "peaked", "sorted", "reversed", "cluster", "ties", "equal", "masked")
FILTERS = [  # top_k, top_p, min_p
    (0, 1.0, 0.0),
    (1, 1.0, 0.0),
    (50, 1.0, 0.0),
    (600, 1.0, 0.0),
    (0, 0.9, 0.0),
    (0, 0.3, 0.0),
    (0, 0.9999, 0.0),
    (0, 1e-9, 0.0),
    (0, 1.0, 0.03),
    (50, 0.9, 0.0),
    (900, 0.8, 0.02),
    (3, 0.999, 0.9),
    (0, 0.9, 0.3),
]


def logits(shape, rows, vocab, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, vocab, generator=generator)
    if shape == "peaked":
        some = torch.randperm(vocab, generator=generator)[:9]
        z[:, some] += torch.arange(4.0, 4.0 + len(some))
    elif shape in ("sorted", "reversed"):
        z = (z * 3).sort(-1, descending=shape == "reversed").values
    elif shape == "cluster":
        z[:, vocab // 3 : vocab // 3 + vocab // 7 + 1] += 9
    elif shape == "ties":
        z = (z * 2).round()
    elif shape == "equal":
        z = torch.zeros(rows, vocab)
    elif shape == "masked":
        z[:, torch.rand(vocab, generator=generator) < 0.9] = -INF
        z[:, vocab // 2] = 0.0
    return z


def arguments(base, q, filters, *, weight=0.5, scale=1.25, greedy=False, seed=None):
    rows = q.shape[0]
    return [
        base,
        q,
        torch.full((1,), scale, dtype=torch.float64),
        torch.full((rows,), weight, dtype=torch.float64),
        torch.arange(rows) * 3 + 11 if seed is None else seed,
        torch.full((1,), 7),
        greedy,
        *filters,
    ]


def moved(args, device, numbers=()):
    """On the device, but for ``numbers``: one for all rows may lie on the host."""
    return [
        a.to(device) if isinstance(a, torch.Tensor) and i not in numbers else a
        for i, a in enumerate(args)
    ]


def both(device, base, q, filters=(0, 1.0, 0.0), **kwargs):
    """The CUDA result, after it was found equal to torch's."""
    args = arguments(base, q, filters, **kwargs)
    numbers = (2, 5)  # scale and position
    tokens, logprobs = (t.cpu() for t in cuda.sample(*moved(args, device, numbers)))
    expected_tokens, expected = sample_torch.sample(*args)
    assert tokens.dtype == torch.int64 and logprobs.dtype == torch.float32
    assert tokens.tolist() == expected_tokens.tolist()
    # Masses are float32 here: a token that ends within 1e-7 of top_p may fall on either side.
    tolerance = 2e-6 if filters[1] == 1.0 else 2e-5
    torch.testing.assert_close(logprobs, expected, rtol=2e-6, atol=tolerance, equal_nan=True)
    return tokens, logprobs


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_small_rows_of_every_shape(cuda_device, shape, filters):
    for vocab in (1, 7, 256, 1500):
        base, q = logits(shape, 3, vocab, seed=1), logits(shape, 3, vocab, seed=2)
        both(cuda_device, base, q, filters)
        both(cuda_device, None, q, filters, greedy=True)


@pytest.mark.parametrize("filters", [(8, 1.0, 0.0), (8, 0.99, 0.0), (0, 0.9, 0.0), (0, 0.3, 0.1)])
def test_fewer_groups_with_a_token_than_are_kept(cuda_device, filters):
    """Eight groups, of which two have tokens: the smaller of their maxima is no bound."""
    q = torch.full((2, 2000), -INF)
    q[:, 300:310] = torch.arange(10.0) / 8
    q[:, 800:806] = 6.0 + torch.arange(6.0) / 8
    q[1] = logits("flat", 1, 2000) / 50  # the maxima of all groups hold little of the mass
    both(cuda_device, None, q, filters)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("filters", [(0, 1.0, 0.0), (40, 0.9, 0.01), (0, 0.95, 0.0)])
def test_a_large_vocabulary(cuda_device, filters, dtype):
    base, q = (logits("peaked", 2, 131073, seed).to(dtype) for seed in (1, 2))
    both(cuda_device, base, q, filters)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", [0.0, 0.5, -0.5])
def test_small_weights_and_masks(cuda_device, weight, dtype):
    base, q = (logits("flat", 4, 700, seed).to(dtype) for seed in (1, 2))
    base[:, 10:300], q[:, 200:400] = -INF, -INF
    base[1, 3] = NAN  # counts only where the base has weight
    base[2, 3] = INF
    q[3] = -INF
    for filters in ((0, 1.0, 0.0), (30, 0.9, 0.01)):
        tokens, _ = both(cuda_device, base, q, filters, weight=weight)
        assert tokens[3] == -1
        assert (tokens[1] == -1) == (tokens[2] == -1) == (weight != 0)
    for poison in (NAN, INF):
        q[0, 650] = poison
        assert both(cuda_device, base, q, weight=weight)[0][0] == -1


@pytest.mark.parametrize("filters", [(0, 1.0, 0.0), (30, 0.9, 0.01), (0, 0.9, 0.0)])
def test_small_scales_from_greedy_to_flat(cuda_device, filters):
    q = logits("flat", 3, 900) * 5
    for scale in (1e-300, 1e-6, 1.0, 1e6, 1e38, 3e38):
        tokens, _ = both(cuda_device, None, q, filters, scale=scale)
        if scale > 1e30:
            assert tokens.tolist() == q.argmax(-1).tolist()
    for scale in (0.0, -1.0, NAN, INF):
        args = arguments(None, q, filters, scale=scale)
        tokens, logprobs = cuda.sample(*moved(args, cuda_device))
        assert (tokens == -1).all() and logprobs.isnan().all()


@pytest.mark.parametrize("filters", [(0, 1.0, 0.0), (50, 0.9, 0.0), (0, 0.7, 0.0)])
def test_small_batches_do_not_change_a_row(cuda_device, filters):
    """Not its neighbours, nor where in memory it lies."""
    base, q = (logits("flat", 5, 1003, seed).half() for seed in (1, 2))
    args = moved(arguments(base, q, filters), cuda_device)
    together = cuda.sample(*args)
    for row in range(5):
        for offset in (0, 3):
            one = list(args)
            for i in (0, 1):
                buffer = torch.full((1003 + offset,), NAN, dtype=q.dtype, device=cuda_device)
                buffer[offset:] = args[i][row]
                one[i] = buffer[offset:][None]
            one[3], one[4] = args[3][row : row + 1], args[4][row : row + 1]
            alone = cuda.sample(*one)
            assert all(
                torch.equal(a[row : row + 1], b) for a, b in zip(together, alone, strict=True)
            )


def test_small_seeds(cuda_device):
    q = logits("flat", 6, 300)
    shared = torch.full((1,), 2**62 + 5)
    assert len(set(both(cuda_device, None, q, seed=shared)[0].tolist())) > 3
    args = arguments(None, q, (0, 1.0, 0.0))
    draws = []
    for position in (0, 1, 2**40):
        args[5] = torch.full((6,), position)
        draws.append(cuda.sample(*moved(args, cuda_device))[0].tolist())
        assert draws[-1] == sample_torch.sample(*args)[0].tolist()
    assert draws[0] != draws[1] != draws[2]


@pytest.mark.parametrize("filters", [(0, 1.0, 0.0), (5, 1.0, 0.0), (7, 0.8, 0.02)])
def test_the_distribution(cuda_device, filters):
    """Chi-square of 20000 draws against the specification, at 1e-6.

    On a host, which takes milliseconds a row, the draws are the torch backend's, and every 80th of
    them is made by the kernels, too.
    """
    count, step = 20_000, 1 if cuda_device.type == "cuda" else 80
    q = torch.tensor([[0.0, 1.0, -1.0, 2.0, 1.0, -3.0, 0.5, -INF, 1.5, 0.2]])
    named = dict(zip(("top_k", "top_p", "min_p"), filters, strict=True))
    expected = reference.filtered_logprobs(None, q.double() * 1.25, **named)[0].exp()
    args = arguments(None, q.expand(count, -1), filters)
    tokens = sample_torch.sample(*args)[0]
    some = [a[::step].contiguous() if len(a) == count else a for a in args[1:6]]
    drawn = cuda.sample(*moved([None, *some, *args[6:]], cuda_device))[0].cpu()
    if step == 1:
        tokens = drawn
    else:
        assert torch.equal(drawn, tokens[::step])
    seen = torch.bincount(tokens, minlength=10).double()
    assert (seen[expected == 0] == 0).all()
    kept = expected > 0
    chi2 = ((seen - count * expected)[kept].square() / (count * expected[kept])).sum().item()
    freedom = int(kept.sum()) - 1
    bound = freedom * (1 - 2 / (9 * freedom) + 4.75 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi2 < bound  # Wilson and Hilferty's approximation of the quantile


def test_the_order_of_threads_does_not_matter(host, monkeypatch):
    """A missing barrier would show; on a GPU this is compute-sanitizer's task."""
    base, q = (logits("ties", 2, 1500, seed) for seed in (1, 2))
    for filters in ((0, 1.0, 0.0), (40, 0.9, 0.01), (0, 0.9, 0.0)):
        found = []
        for order in ("0", "1", "5"):
            monkeypatch.setenv("QADAPTER_EMULATOR_ORDER", order)
            found.append(both(host, base, q, filters))
        assert all(torch.equal(a, b) for x in found for a, b in zip(x, found[0], strict=True))


def test_no_rows(cuda_device):
    args = moved(arguments(None, torch.zeros(0, 5), (0, 1.0, 0.0)), cuda_device)
    tokens, logprobs = cuda.sample(*args)
    assert tokens.shape == logprobs.shape == (0,)
