"""The Triton sampler draws from the specified distribution, token for token as the torch backend.

Compiled where there is a GPU, otherwise in Triton's interpreter (interpreter.py), where a row takes
a tenth of a second. A million draws per distribution are therefore drawn one by one on a GPU only.
In the interpreter the token is a step function of the row's uniform number: it is evaluated right
below and right above every step, which settles all of the million but the few within 5e-7 of one.

Tokens are compared exactly; uniform numbers of these seeds keep clear of the steps. Log-
probabilities: a few float32 roundings of the largest term, |c - max c| + |ln total|.
"""

import math

import pytest
import torch

from tests.kernels.interpreter import DEVICE, INTERPRETED, ON_GPU, run_interpreted

pytest.importorskip("triton", reason="Triton is not installed")

INF, NAN = math.inf, math.nan
DRAWS = 1_000_000
TOKENS = 40 if ON_GPU else 20  # each is two rows to draw in the interpreter
PLAIN = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}

if not (INTERPRETED or ON_GPU):

    def test_in_the_interpreter():
        run_interpreted(__file__)

else:
    import triton
    import triton.language as tl

    import qadapter
    from qadapter import functional as QF
    from qadapter import reference
    from qadapter.kernels.sample_common import row_uniform
    from qadapter.ops import sample_torch
    from qadapter.ops import triton as triton_backend
    from qadapter.ops.philox import row_keys, uniform

    pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

    @triton.jit
    def uniform_kernel(seed_ptr, position_ptr, out, SHARED: tl.constexpr, BLOCK: tl.constexpr):
        rows = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        tl.store(out + rows, row_uniform(rows, seed_ptr, position_ptr, 1, SHARED))


def rows64(*values):
    return torch.tensor(values, dtype=torch.float64, device=DEVICE)


def streams(batch, vocab, dtype=torch.float32, *, spread=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(batch, vocab, generator=generator) * spread
    q = base + torch.randn(batch, vocab, generator=generator)
    return base.to(DEVICE, dtype), q.to(DEVICE, dtype)


def draw(backend, base, q, *, scale=None, weight=None, seed=None, position=None, greedy=False, **f):
    """One call of a backend; by default weight 0.7, and a seed and a position of every row."""
    batch = torch.arange(q.shape[0], device=DEVICE)
    return backend.sample(
        base,
        q,
        rows64(1.0) if scale is None else scale,
        rows64(0.7) if weight is None else weight,
        batch * 7919 - 5 if seed is None else seed,
        batch % 3 if position is None else position,
        greedy,
        *(PLAIN | f).values(),
    )


def exact_logprobs(base, q, scale=1.0, weight=0.7, **filters):
    """The specification in float64, [B, V]."""
    base = torch.zeros_like(q) if base is None else base
    return reference.filtered_logprobs(
        base.double(), q.double(), alpha_0=weight, alpha_tilde=1 / scale, center=0.0, **filters
    )


def check(base, q, *, scale=1.0, weight=0.7, greedy=False, **filters):
    """Tokens as the torch backend draws them, log-probabilities as specified."""
    given = {"scale": rows64(scale), "weight": rows64(weight), "greedy": greedy, **filters}
    tokens, logprobs = draw(triton_backend, base, q, **given)
    assert tokens.dtype == torch.int64 and logprobs.dtype == torch.float32
    assert torch.equal(tokens, draw(sample_torch, base, q, **given)[0])
    exact = exact_logprobs(base, q, scale, weight, **filters).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), exact, rtol=2e-6, atol=3e-6)
    return tokens, logprobs


FILTERS = [
    {},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"top_k": 20, "top_p": 0.9},
    {"top_k": 20, "min_p": 0.05},
    {"top_p": 0.95, "min_p": 0.05},
    {"top_k": 40, "top_p": 0.95, "min_p": 0.02},
    {"top_k": 1},
    {"top_p": 1e-9},
    {"min_p": 1.0},
    {"top_k": 10_000},
]


if INTERPRETED or ON_GPU:

    @pytest.mark.parametrize("shared", [False, True])
    def test_uniform_numbers_are_the_other_backends(shared):
        rows, block = 1 << 18, 1 << 14
        generator = torch.Generator().manual_seed(0)
        keys = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator)
        position = torch.randint(-(2**40), 2**40, (rows,), generator=generator)
        seed = keys[:1] if shared else keys
        expected = uniform(row_keys(seed, rows) if shared else keys, position)
        got = torch.empty(rows, dtype=torch.float64, device=DEVICE)
        uniform_kernel[(rows // block,)](
            seed.to(DEVICE), position.to(DEVICE), got, SHARED=shared, BLOCK=block
        )
        assert torch.equal(got.cpu(), expected)

    @pytest.mark.parametrize("filters", FILTERS, ids=str)
    def test_filters(filters):
        index = FILTERS.index(filters)
        dtype = (torch.float32, torch.bfloat16, torch.float16)[index % 3]
        for vocab, batch in ((257, 2), ((33, 96, 1024)[index // 3 % 3], 2)):
            check(*streams(batch, vocab, dtype, seed=vocab), **filters)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_dtypes_without_a_base(dtype):
        _base, q = streams(2, 100, dtype)
        check(None, q, weight=0.0)
        check(None, q, weight=0.0, top_k=9, top_p=0.9)

    SHAPES = {"peaked": 3.0, "flat": 0.1, "tied": 1.0, "masked": 1.0}

    def distribution(shape):
        base, q = streams(1, TOKENS, spread=SHAPES[shape], seed=5)
        if shape == "flat":
            q = base * 0.5
        elif shape == "tied":
            base, q = base.round(), base.round() * 0.5
        elif shape == "masked":
            q[:, ::3], base[:, 1::7] = -INF, -INF
        return base, q

    @pytest.mark.parametrize(
        ("shape", "filters"),
        [(shape, {}) for shape in SHAPES]
        + [
            ("peaked", {"top_k": 7}),
            ("flat", {"top_p": 0.3}),
            ("tied", {"top_k": 9, "top_p": 0.9}),
            ("masked", {"min_p": 0.2}),
            ("tied", {"top_k": 12, "top_p": 0.95, "min_p": 0.1}),
        ],
        ids=str,
    )
    def test_a_million_draws(shape, filters):
        base, q = distribution(shape)
        probabilities = exact_logprobs(base, q, **filters)[0].exp().cpu()
        cumulative = probabilities.cumsum(0)
        cumulative /= cumulative[-1].clone()
        seeds = torch.arange(DRAWS)
        zeros = torch.zeros(1, dtype=torch.int64)
        u = uniform(seeds, zeros.expand(DRAWS))
        expected = torch.searchsorted(cumulative, u, right=True)
        if ON_GPU:
            chosen = seeds
        else:
            ordered, order = u.sort()
            steps = cumulative[probabilities > 0][:-1]
            below = torch.searchsorted(ordered, steps - 5e-7) - 1
            above = torch.searchsorted(ordered, steps + 5e-7)
            ends = torch.tensor([0, DRAWS - 1])
            chosen = order[torch.cat([below, above, ends]).clamp(0, DRAWS - 1).unique()]
        far = (u[chosen][:, None] - cumulative).abs().amin(1) > 4e-7
        tokens, logprobs = draw(
            triton_backend,
            base.expand(len(chosen), -1),
            q.expand(len(chosen), -1),
            seed=chosen.to(DEVICE),
            position=zeros.to(DEVICE),
            **filters,
        )
        tokens = tokens.cpu()
        assert torch.equal(tokens[far], expected[chosen][far])
        assert (probabilities[tokens] > 0).all()
        exact = probabilities[tokens].log()
        torch.testing.assert_close(logprobs.cpu().double(), exact, rtol=2e-6, atol=3e-6)
        if ON_GPU:
            expected = tokens
        # So this is what the kernel draws.
        counts = torch.bincount(expected, minlength=TOKENS).double()
        kept = probabilities > 0
        degrees = int(kept.sum()) - 1
        wanted = probabilities[kept] * DRAWS
        statistic = float(((counts[kept] - wanted).square() / wanted).sum())
        # Below the 1e-6 quantile of a correct sampler (Laurent and Massart's bound).
        assert statistic <= degrees + 2 * (degrees * 13.8) ** 0.5 + 2 * 13.8
        assert float((counts / DRAWS - probabilities).abs().sum() / 2) < (TOKENS / DRAWS) ** 0.5

    @pytest.mark.parametrize("filters", [{}, {"top_k": 4}, {"top_p": 0.61, "min_p": 0.3}])
    def test_greedy(filters):
        base, q = streams(2, 100, torch.bfloat16)
        check(base, q, greedy=True, **filters)
        ties = torch.zeros(2, 70, device=DEVICE)
        ties[0, [40, 3, 69]] = 2.0
        ties[1, 2] = -0.0
        tokens, _ = check(None, ties, weight=0.0, greedy=True, **filters)
        assert tokens.tolist() == [3, 0]

    @pytest.mark.parametrize(
        ("filters", "kept"),
        [({"top_k": 70}, 70), ({"top_p": 0.5}, 100), ({"top_k": 80, "top_p": 0.1}, 8)],
        ids=str,
    )
    def test_ties_keep_the_lowest_ids(filters, kept):
        """200 equal tokens: the draw with the largest uniform number is the last one kept."""
        equal = torch.zeros(2, 200, device=DEVICE)
        equal[:, ::2] *= -1.0  # -0 is 0
        seeds = torch.arange(DRAWS)
        u = uniform(seeds, torch.zeros_like(seeds))
        seeds = torch.stack([u.argmax(), u.argmin()]).to(DEVICE)
        position = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        tokens, logprobs = draw(
            triton_backend, equal, equal, seed=seeds, position=position, **filters
        )
        assert tokens.tolist() == [kept - 1, 0]
        torch.testing.assert_close(logprobs.cpu(), torch.full((2,), -math.log(kept)))

    @pytest.mark.parametrize("filters", [{}, {"top_k": 30, "top_p": 0.9}], ids=str)
    def test_rows_that_cannot_be_sampled(filters):
        base, q = streams(9, 64)
        scale, weight = rows64(*[1.0] * 9), rows64(*[-0.7] * 9)
        base[1], base[2, 5] = -INF, NAN
        q[3, 63] = INF
        q[4] = -INF
        weight[5], scale[6] = INF, 0.0
        base[7], weight[7] = NAN, 0.0  # without weight the base is not looked at
        base[8, :60] = -INF  # masked, also under a negative weight
        tokens, logprobs = draw(triton_backend, base, q, scale=scale, weight=weight, **filters)
        assert tokens[1:7].tolist() == [-1] * 6 and logprobs[1:7].isnan().all()
        fine = [0, 7, 8]
        expected = draw(sample_torch, base, q, scale=scale, weight=weight, **filters)
        assert torch.equal(tokens, expected[0])
        torch.testing.assert_close(logprobs[fine], expected[1][fine], rtol=2e-6, atol=3e-6)
        assert tokens[8] >= 60

    @pytest.mark.parametrize("filters", [{}, {"top_k": 30, "top_p": 0.9, "min_p": 0.01}], ids=str)
    @pytest.mark.parametrize("vocab", [99, 96])
    def test_a_row_does_not_depend_on_its_batch(vocab, filters):
        """Bit for bit, with values of its own in every row; odd V moves rows off boundaries."""
        base, q = streams(4, vocab, torch.bfloat16)
        seed = torch.tensor([3, 3, -9, 2**62], device=DEVICE)
        own = {
            "scale": rows64(0.2, 1.0, 3.0, 0.7),
            "weight": rows64(0.0, -1.0, 0.3, 2.0),
            "seed": seed,
            "position": torch.tensor([0, 5, 2**33, 7], device=DEVICE),
        }
        tokens, logprobs = draw(triton_backend, base, q, **own, **filters)
        assert torch.equal(tokens, draw(sample_torch, base, q, **own, **filters)[0])
        for row in (1, 3):
            alone = {name: value[row : row + 1] for name, value in own.items()}
            for copy in (lambda t: t, torch.clone):
                part = slice(row, row + 1)
                token, logprob = draw(
                    triton_backend, copy(base[part]), copy(q[part]), **alone, **filters
                )
                assert torch.equal(token, tokens[part]) and torch.equal(logprob, logprobs[part])

    def test_one_seed_for_all_rows():
        base, q = (t.expand(6, -1) for t in streams(1, 64))
        seed, position = (torch.tensor([n], device=DEVICE) for n in (11, 4))
        given = {"scale": rows64(0.1), "position": position}
        shared = draw(triton_backend, base, q, seed=seed, **given)
        own = draw(triton_backend, base, q, seed=row_keys(seed, 6), **given)
        assert torch.equal(shared[0], own[0]) and torch.equal(shared[1], own[1])
        assert shared[0].unique().numel() > 1

    def test_rows_anywhere():
        base, q = streams(3, 128, torch.bfloat16)
        wide = torch.full((3, 2, 140), NAN, dtype=torch.bfloat16, device=DEVICE)
        for start in (0, 3):
            wide[:, 0, start : start + 128] = q
            view = wide[:, 0, start : start + 128]
            for filters in ({}, {"top_k": 9}):
                expected = draw(triton_backend, base, q, **filters)
                got = draw(triton_backend, base, view, **filters)
                assert torch.equal(got[0], expected[0])
                torch.testing.assert_close(got[1], expected[1], rtol=1e-6, atol=1e-6)
            wide.fill_(NAN)

    @pytest.mark.parametrize("scale", [1e-40, 1e-4, 3e4, 3e38])
    def test_extreme_temperatures(scale):
        base, q = streams(2, 64, spread=1e3 if scale < 1 else 1.0)
        for filters in ({}, {"top_k": 9, "top_p": 0.5}, {"min_p": 0.5}):
            check(base, q, scale=scale, weight=0.5, **filters)

    @pytest.mark.parametrize(
        "filters",
        [{"top_p": 0.9}, {"top_k": 4000, "top_p": 0.9}, {"min_p": 0.3}],
        ids=str,
    )
    def test_flat_rows(filters):
        """More candidates than the registers hold: the search goes over the row several times."""
        base, q = streams(1, 12_000)
        check(base, q, scale=0.05, **filters)

    def test_more_equal_tokens_than_the_buffer_holds():
        q = torch.ones(1, 12_000, device=DEVICE)
        q[0, 100:200] = 2.0
        q[0, 11_000:] = -3.0
        for filters in ({"top_k": 5000}, {"top_p": 0.4}):
            check(None, q, weight=0.0, **filters)

    def test_function_and_empty_batch():
        base, q = streams(2, 64)
        given = {"alpha_0": 0.5, "alpha_tilde": 0.8, "center": 0.0, "top_k": 8, "seed": 3}
        with qadapter.use_backend("torch"):
            expected = QF.sample(base, q, **given)
        with qadapter.use_backend("triton"):
            got = QF.sample(base, q, **given)
            assert QF.sample(base[:0], q[:0], **given).tokens.shape == (0,)
        assert torch.equal(got.tokens, expected.tokens)
        torch.testing.assert_close(got.logprobs, expected.logprobs, rtol=2e-6, atol=3e-6)

    @pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
    def test_in_a_cuda_graph():
        base, q = streams(4, 50_000, torch.bfloat16)
        position = torch.zeros(4, dtype=torch.int64, device=DEVICE)
        # Made here: a capture takes no copies from ordinary memory of the host.
        given = {"scale": rows64(1.0), "weight": rows64(0.7), "seed": position + 7919}
        given |= {"position": position, "top_k": 50, "top_p": 0.9}
        draw(triton_backend, base, q, **given)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            tokens, _logprobs = draw(triton_backend, base, q, **given)
        for step in range(3):
            position.fill_(step)
            graph.replay()
            assert torch.equal(tokens, draw(sample_torch, base, q, **given)[0])
