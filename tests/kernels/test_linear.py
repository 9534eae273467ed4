"""The Triton kernels on hidden states give the float64 specification's results on whole logits.

Compiled where there is a GPU, otherwise in Triton's interpreter (interpreter.py).

Tolerance: twice the error that eager PyTorch in float32 makes on the same inputs, plus a few
float32 roundings of what is added up. For u also the roundings of p and of u itself to 16 bits;
Triton's interpreter truncates to bfloat16, which counts twice.
"""

import pytest
import torch

from tests.kernels.interpreter import DEVICE, INTERPRETED, ON_GPU, run_interpreted

pytest.importorskip("triton", reason="Triton is not installed")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("q", "value", "base_logp", "policy_logp", "base_lse", "p_action", "slope_action")
EPS = 2.0**-23

if not (INTERPRETED or ON_GPU):

    def test_in_the_interpreter():
        run_interpreted(__file__)

else:
    import triton
    import triton.language as tl

    from qadapter import reference
    from qadapter.kernels import linear_chunk
    from qadapter.kernels import linear_fwd as linear_module
    from qadapter.ops.triton import linear_fwd

    pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

    @triton.jit
    def soft_cap_kernel(s_ptr, z_ptr, slope_ptr, softcap, inverse, BLOCK: tl.constexpr):
        here = tl.arange(0, BLOCK)
        softcap = tl.cast(softcap, tl.float32)
        inverse = tl.cast(inverse, tl.float32)
        z, slope = linear_chunk.soft_cap(tl.load(s_ptr + here), softcap, inverse)
        tl.store(z_ptr + here, z)
        tl.store(slope_ptr + here, slope)


def make(num_rows, dim, vocab, dtype, *, weight_dtype=None, biased=False, seed=0):
    """(base_hidden, q_hidden, weight, actions, bias); the first of several rows has no action."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    base = normal(num_rows, dim)
    q = (base + 0.3 * normal(num_rows, dim)).to(dtype)
    weight = (normal(vocab, dim) * 3 / dim**0.5).to(weight_dtype or dtype)
    actions = torch.randint(0, vocab, (num_rows,), generator=generator)
    if num_rows > 1:
        actions[0] = -100
    bias = normal(vocab) if biased else None
    tensors = (base.to(dtype), q, weight, actions, bias)
    return [None if t is None else t.to(DEVICE) for t in tensors]


def specification(tensors, dtype, composition, head, base_lse, base_logp):
    """The eight results in `dtype`, u in float64 terms, and sum_j |p_j slope_j W_j|."""
    base, q, weight, actions, bias = tensors
    alpha_0, alpha_tilde, center = composition
    scale, cap = head
    m = alpha_0 - center
    options = {"logit_scale": scale, "logit_softcap": cap or None}
    wide_bias = None if bias is None else bias.to(dtype)

    def logits(hidden):
        return reference.head_logits(hidden.to(dtype), weight.to(dtype), bias=wide_bias, **options)

    zq, zb = logits(q), None if base is None else logits(base)
    cached = [None if t is None else t.to(dtype) for t in (base_lse, base_logp)]
    names = {"alpha_0": alpha_0, "alpha_tilde": alpha_tilde, "center": center}
    values = reference.residual_values(
        zb, zq, actions, **names, base_lse=cached[0], base_logp=cached[1]
    )
    c = reference.policy_logits(zb, zq, *composition)
    if m != 0 and base_lse is not None and not cap:
        # One product, of hidden states mixed in float32 and rounded once.
        mixed = q.float() + m * base.float()
        mixed = mixed.to(q.dtype if q.dtype == weight.dtype else torch.float32).to(dtype)
        wide = 0.0 if wide_bias is None else wide_bias * (1 + m)
        if bias is not None:
            wide = wide.masked_fill(bias == float("-inf"), float("-inf"))
        c = (mixed @ weight.to(dtype).t() + wide) * scale / alpha_tilde
        lse = torch.logsumexp(c, -1)
        policy_logp = c.gather(1, actions.clamp(min=0)[:, None])[:, 0] - lse
        policy_logp = torch.where(actions >= 0, policy_logp, 0)
        value = alpha_tilde * lse - alpha_0 * values.base_lse
        values = values._replace(value=value, policy_logp=policy_logp)
    slope = torch.full_like(zq, scale)
    if cap:
        slope = (1 - (zq / cap).square()) * scale
    p = torch.softmax(c, -1)
    has_action = actions >= 0
    at = actions.clamp(min=0)[:, None]
    p_action = torch.where(has_action, p.gather(1, at)[:, 0], 0)
    slope_action = torch.where(has_action, slope.gather(1, at)[:, 0], 0)
    rest = p.scatter(1, at, torch.where(has_action[:, None], 0, p.gather(1, at))) * slope
    wide = weight.to(dtype)
    return [*values, p_action, slope_action], rest @ wide, rest.abs() @ wide.abs()


def assert_near(got, exact, eager, what, terms):
    assert torch.equal(got.isnan(), exact.isnan()), f"{what}: NaN in other places"
    infinite = exact.isinf()
    assert torch.equal(got[infinite].double(), exact[infinite]), what
    finite = exact.isfinite()
    if finite.any():
        baseline = (eager.double() - exact)[finite].abs().nan_to_num(0.0).max().item()
        tolerance = 2 * baseline + 4 * EPS * terms
        error = (got.double() - exact)[finite].abs().max().item()
        assert error <= tolerance, f"{what}: error {error:.2e} > {tolerance:.2e}"


def run(tensors, composition, head=(1.0, 0.0), base_lse=None, base_logp=None, chunk=0, grad=True):
    base, q, weight, actions, bias = tensors
    return linear_fwd(
        base, q, weight, actions, bias, base_lse, base_logp, *composition, *head, chunk, grad
    )


def check(
    tensors, composition, head=(1.0, 0.0), base_lse=None, base_logp=None, *, chunk=0, grad=True
):
    results = run(tensors, composition, head, base_lse, base_logp, chunk, grad)
    base, q, weight, actions, _ = tensors
    assert len(results) == 8
    assert all(t.dtype == torch.float32 and t.shape == actions.shape for t in results[:7])
    assert results[7].dtype == q.dtype and results[7].is_contiguous()
    arguments = (composition, head, base_lse, base_logp)
    exact, exact_u, size = specification(tensors, torch.float64, *arguments)
    eager, eager_u, _ = specification(tensors, torch.float32, *arguments)
    hidden = [t for t in (base, q) if t is not None]
    reach = max((t.float().abs() @ weight.float().abs().t()).max().item() for t in hidden)
    terms = max(1.0, reach * abs(head[0]) * (1 + abs(composition[0] - composition[2])))
    for name, got, *pair in zip(NAMES, results, exact, eager, strict=False):
        scaled = terms / composition[1] if name in ("policy_logp", "p_action") else terms
        assert_near(got, *pair, name, scaled)
    if not grad:
        assert results[7].shape == (0, q.shape[1])
        return results
    assert results[7].shape == q.shape
    tolerance = 2 * (eager_u.double() - exact_u).abs().max() + 16 * EPS * terms * size.max()
    if weight.dtype != torch.float32:
        truncated = INTERPRETED and weight.dtype == torch.bfloat16
        tolerance = tolerance + torch.finfo(weight.dtype).eps * (1.0 if truncated else 0.5) * size
    if weight.dtype == torch.float16:  # p below the smallest normal number
        tolerance = tolerance + 2.0**-25 * weight.double().abs().sum(0)
    if q.dtype != torch.float32:
        tolerance = tolerance + torch.finfo(q.dtype).eps * 0.51 * exact_u.abs()
    assert ((results[7].double() - exact_u).abs() <= tolerance).all()
    return results


if INTERPRETED or ON_GPU:
    COMPOSITIONS = [(1.0, 1.0, 1.0), (0.01, 1.0, 0.0), (0.0, 0.3, 1.0), (0.0, 2.0, 0.0)]
    HEADS = [(1.0, 0.0), (0.5, 0.0), (1.0, 4.0), (1.5, 30.0)]

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("composition", COMPOSITIONS, ids=str)
    def test_against_float64(composition, dtype):
        for index, head in enumerate(HEADS):
            tensors = make(3, 20, 301, dtype, biased=index % 2 == 1, seed=index)
            check(tensors, composition, head)
            lse, _ = cached_statistics(tensors, head)
            check(tensors, composition, head, lse, chunk=2)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_shapes(dtype):
        """Any N, D and V; from no whole tile of columns to two and a rest."""
        for index, shape in enumerate([(1, 1, 1), (3, 7, 3), (4, 33, 256), (2, 9, 259)]):
            for chunk in (0, 1, 3, 100):
                composition = COMPOSITIONS[(index + chunk) % 3]
                check(make(*shape, dtype), composition, (1.0, 5.0 * (chunk == 1)), chunk=chunk)
        check(make(2, 16, 9001, dtype, biased=True), (1.0, 1.0, 1.0))
        check(make(1, 16, 8192, dtype), (0.5, 1.0, 0.0), (1.0, 3.0))

    def test_no_rows():
        for grad in (True, False):
            results = run(make(0, 7, 11, torch.bfloat16), (1.0, 1.0, 1.0), grad=grad)
            assert [t.shape for t in results] == [(0,)] * 7 + [(0, 7)]

    def test_mixed_dtypes():
        for hidden in DTYPES:
            for weight in DTYPES:
                if hidden != weight:
                    tensors = make(3, 12, 130, hidden, weight_dtype=weight)
                    check(tensors, (0.5, 1.0, 0.0))
                    check(tensors, (0.5, 1.0, 0.0), base_lse=cached_statistics(tensors)[0])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_cached_statistics(dtype):
        tensors = make(3, 24, 133, dtype, biased=True)
        lse, logp = cached_statistics(tensors)
        for composition in COMPOSITIONS:
            check(tensors, composition, base_logp=logp)
            results = check(tensors, composition, (1.0, 0.0), lse, logp)
            assert torch.equal(results[4], lse) and results[4].data_ptr() != lse.data_ptr()
            assert torch.equal(results[2][1:], logp[1:])
            check(tensors, composition, (1.0, 0.0), lse, grad=False)
            if composition[0] == composition[2]:
                check([None, *tensors[1:]], composition, (1.0, 0.0), lse, logp)
        with pytest.raises(ValueError, match="base_hidden"):
            run([None, *tensors[1:]], (0.5, 1.0, 0.0), base_lse=lse, base_logp=logp)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_without_gradient(dtype):
        """The same numbers, bit for bit, as with it."""
        for composition in COMPOSITIONS[1:3]:
            tensors = make(2, 12, 300, dtype)
            without = run(tensors, composition, (1.5, 9.0), grad=False)
            with_it = run(tensors, composition, (1.5, 9.0), grad=True)
            assert without[7].shape == (0, 12)
            assert all(torch.equal(a, b) for a, b in zip(without[:7], with_it[:7], strict=True))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_first_step_is_exactly_zero(dtype):
        for index, (shape, head) in enumerate(
            [((5, 33, 301), (1.0, 0.0)), ((2, 16, 9001), (0.7, 0.0)), ((3, 7, 50), (1.0, 5.0))]
        ):
            base, _, weight, actions, bias = make(*shape, dtype, biased=index == 1)
            tensors = [base, base.clone(), weight, actions, bias]
            for chunk, grad in ((0, True), (2, False)):
                first = run(tensors, (1.0, 1.0, 1.0), head, chunk=chunk, grad=grad)
                assert not first[0].any() and not first[1].any()
                assert torch.equal(first[2], first[3])
                again = run(tensors, (1.0, 1.0, 1.0), head, first[4], chunk=chunk)
                assert not again[0].any() and not again[1].any()

    def test_masked_tokens():
        """A bias of -inf, also under m < 0 and in the merged product; an action on such a token."""
        for dtype, composition in zip([*DTYPES, torch.float32], COMPOSITIONS, strict=True):
            tensors = make(6, 16, 200, dtype, biased=True)
            tensors[4][::3] = float("-inf")
            tensors[3][1:] = torch.tensor([1, 2, 4, 199, 100], device=DEVICE)
            check(tensors, composition)
            lse, _ = cached_statistics(tensors)
            check(tensors, composition, (1.0, 0.0), lse)
            tensors[3][2] = 3
            for given in (None, lse):
                results = run(tensors, composition, base_lse=given)
                assert results[3][2] == float("-inf") and results[5][2] == 0.0
                assert results[7].isfinite().all()
                assert results[0][2] == float("-inf")

    def test_masked_rows():
        for dtype, composition in zip(DTYPES, COMPOSITIONS, strict=False):
            tensors = make(3, 8, 40, dtype, biased=True)
            tensors[4][:] = float("-inf")
            results = run(tensors, composition)
            assert results[1].isnan().all() and results[4].isnan().all()
            assert results[0][1:].isnan().all() and results[3][1:].isnan().all()

    @pytest.mark.parametrize("poison", [float("nan"), float("inf")])
    def test_poison_stays_in_its_row(poison):
        for dtype, composition in zip(DTYPES, COMPOSITIONS, strict=False):
            for stream, given in ((0, False), (1, False), (1, True)):
                tensors = make(4, 16, 300, dtype)
                lse = cached_statistics(tensors)[0] if given else None
                tensors[stream][2, 5] = poison
                results = run(tensors, composition, base_lse=lse, chunk=3)
                for result in results[:4]:
                    assert result[[0, 1, 3]].isfinite().all()
                enters = stream == 1 or composition[0] != composition[2]
                assert results[3][2].isnan().item() == enters
                assert results[0][2].isfinite().item() != (enters or composition[2] != 0)
                assert results[1][2].isnan().item() == (enters or composition[0] != 0)
                assert results[7][[0, 1, 3]].isfinite().all()
                assert results[7][2].isnan().all().item() == enters

    def test_poisoned_weight():
        tensors = make(3, 8, 60, torch.float32)
        tensors[2][7, 3] = float("nan")
        results = run(tensors, (1.0, 1.0, 1.0))
        assert results[1].isnan().all() and results[7].isnan().all()

    @pytest.mark.parametrize("given", [False, True])
    def test_actions_outside(given):
        """Out of range is NaN and never a read; -100 has no q but a value, and all of u."""
        for dtype, composition in zip([*DTYPES, torch.float32], COMPOSITIONS, strict=True):
            tensors = make(6, 12, 100, dtype)
            tensors[3] = torch.tensor([-100, -1, 100, 2**40, -(2**40), 3], device=DEVICE)
            lse = cached_statistics(make(6, 12, 100, dtype))[0] if given else None
            results = run(tensors, composition, base_lse=lse)
            for index in (0, 1, 2, 3, 5):
                assert results[index].isnan().tolist() == [False, *[True] * 4, False], index
            for index in (0, 2, 3, 5, 6):
                assert results[index][0] == 0.0
            assert results[4].isfinite().all()
            kept = [0, 5]
            rows = [*(t[kept] for t in tensors[:2]), tensors[2], tensors[3][kept], None]
            check(rows, composition, (1.0, 0.0), None if lse is None else lse[kept])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_gradient_where_the_action_is_likely(dtype):
        """dh of a Bradley-Terry row (coef_a = -coef_p), by how likely its action is.

        Against eager PyTorch: softmax in float32, dz in 16 bits with the action's column, dz @ W.
        """
        _, q, weight, actions, _ = make(18, 64, 500, dtype)
        actions = torch.randint(0, 500, (18,), generator=torch.Generator().manual_seed(3))
        actions = actions.to(DEVICE)
        wide = weight.double()
        boost = torch.linspace(0, 1.4, 18, dtype=torch.float64, device=DEVICE)[:, None]
        q = (q.double() * 0.4 + boost * wide[actions]).to(dtype)
        results = run([q, q, weight, actions, None], (1.0, 1.0, 1.0))
        p_action, slope, u = (t.double() for t in results[5:])
        share = ((1 - p_action) * slope)[:, None]
        got = u - share * wide[actions]

        def gradient(wider):
            p = torch.softmax(q.to(wider) @ weight.to(wider).t(), -1)
            return p.scatter_add(1, actions[:, None], -torch.ones_like(p[:, :1]))

        exact = gradient(torch.float64) @ wide
        eager = (gradient(torch.float32).to(dtype).double() @ wide).to(dtype).double()
        # The interpreter truncates p to bfloat16, which counts twice.
        factor = 4.0 if INTERPRETED and dtype == torch.bfloat16 else 2.0
        for low, high in ((0.0, 0.9), (0.9, 0.99), (0.99, 1.0)):
            band = (p_action >= low) & (p_action < high)
            assert band.any(), (low, high)

            def error(dh, band=band):
                return ((dh - exact)[band].norm(dim=1) / exact[band].norm(dim=1)).max().item()

            assert error(got) <= factor * error(eager), (low, error(got), error(eager))

    def test_layouts():
        """Padded, shifted and expanded rows give the numbers of dense ones."""
        for dtype in DTYPES[:2]:
            tensors = make(4, 17, 133, dtype)
            expected = run(tensors, (0.5, 1.0, 0.0))

            def padded(rows, extra, start):
                storage = torch.full((rows.numel() + rows.shape[0] * extra + start,), float("nan"))
                storage = storage.to(rows)
                strides = (rows.shape[1] + extra, 1)
                return storage.as_strided(rows.shape, strides, start).copy_(rows)

            base, q, weight, actions, _ = tensors
            labels = torch.cat([actions[:1], actions])[1:]  # 8 bytes past a 16-byte boundary
            got = run(
                [padded(base, 3, 1), padded(q, 15, 0), padded(weight, 7, 2), labels, None],
                (0.5, 1.0, 0.0),
            )
            for left, right in zip(got, expected, strict=True):
                spacing = torch.finfo(left.dtype).eps
                torch.testing.assert_close(left, right, rtol=max(1e-5, spacing), atol=1e-5)
            one = [t[1:2].expand(3, -1) for t in (base, q)]
            check([*one, weight, actions[1:], None], (0.5, 1.0, 0.0))

    def test_soft_cap_accuracy():
        """Value and slope to a few units in the last place, from 1e-6 to far into saturation."""
        s = torch.cat([torch.logspace(-6, 2.5, 1000), torch.tensor([0.0, 7.5, 1e30])])
        s = torch.cat([s, -s, torch.full((2048 - 2 * s.numel(),), float("inf"))]).to(DEVICE)
        z, slope = torch.empty_like(s), torch.empty_like(s)
        soft_cap_kernel[(1,)](s, z, slope, 30.0, 1 / 30.0, BLOCK=2048)
        y = s.double() / 30
        t = torch.tanh(y)
        # 6 are what the approximate exp2 and the division of a GPU leave.
        assert ((z.double() - 30 * t).abs() <= 8 * EPS * 30 * t.abs()).all()
        exact = torch.cosh(y.clamp(-300, 300)) ** -2
        normal = exact > 1e-30
        assert ((slope - exact).abs() <= (8 + 2 * y.abs()) * EPS * exact)[normal].all()
        assert (slope[~normal] <= 2e-30).all()

    def test_chunks():
        """1 GiB of buffers by default, in multiples of 128 rows that share the work evenly."""
        rows = linear_module.rows_per_chunk
        assert rows(8192, 128256, 1, 0) == 2048
        assert rows(8192, 128256, 2, 0) == 1024
        assert rows(2100, 128256, 1, 0) == 1152
        assert rows(100, 128256, 1, 0) == 100
        assert rows(8192, 2**24, 1, 0) == 16
        assert rows(8192, 2**30, 2, 0) == 1
        assert rows(8192, 128256, 1, 5000) == 5000
        assert rows(3, 128256, 1, 5000) == 3

    def test_weights_never_land_on_columns_to_be_read():
        """The order of sweep 2: p's tile over float32 columns that have been read, or its own."""
        for vocab in (1, 31, 100, 4095, 4097, 9001, 32000, 50257, 128256, 262144):
            stride = triton.cdiv(vocab, linear_chunk.ROW_PADDING) * linear_chunk.ROW_PADDING
            tile = linear_chunk.chunk_tile(vocab)[0] * linear_chunk.VEC
            buffer = torch.empty(2, stride, device="meta")
            p = linear_module.weights_view(buffer, torch.bfloat16)
            assert p.shape == (2, stride) and p.stride() == (2 * stride, 1)
            for start in range(vocab // tile * tile, -1, -tile):
                first_byte = 2 * (p.storage_offset() + start)
                assert first_byte // 4 >= start
                assert 2 * (p.storage_offset() + min(start + tile, stride)) <= 4 * stride


def cached_statistics(tensors, head=(1.0, 0.0)):
    """(base_lse, base_logp) in float32."""
    base, _, weight, actions, bias = tensors
    wide = None if bias is None else bias.double()
    scale, cap = head
    z = reference.head_logits(
        base.double(), weight.double(), bias=wide, logit_scale=scale, logit_softcap=cap or None
    )
    logp = torch.log_softmax(z, -1).gather(1, actions.clamp(0, z.shape[1] - 1)[:, None])[:, 0]
    return torch.logsumexp(z, -1).float(), logp.float()
