"""The Triton kernels of residual_values give the float64 specification's values and gradients.

Compiled where there is a GPU, otherwise in Triton's interpreter (interpreter.py).

Tolerance: twice the error that eager PyTorch in float32 makes on the same inputs against float64,
plus a few float32 roundings of the largest result. Gradients: half a unit in the last place of
their dtype more, one rounding; a whole one in bfloat16 in the interpreter, which truncates.
"""

import pytest
import torch

from tests.kernels.interpreter import DEVICE, INTERPRETED, ON_GPU, run_interpreted
from tests.kernels.nearness import assert_near

pytest.importorskip("triton", reason="Triton is not installed")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COMPOSITIONS = [
    (1.0, 1.0, 1.0),
    (0.01, 1.0, 0.0),
    (0.0, 0.1, 1.0),
    (1.0, 10.0, 0.0),
    (0.0, 1.0, 0.0),
]

if not (INTERPRETED or ON_GPU):

    def test_in_the_interpreter():
        run_interpreted(__file__)

else:
    from qadapter import reference
    from qadapter.kernels import residual_fwd as forward_module
    from qadapter.kernels.residual_bwd import residual_bwd
    from qadapter.kernels.residual_fwd import residual_fwd

    pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def make_rows(num_rows, vocab, dtype, *, scale=3.0, seed=0):
    """Correlated streams, like a base and its adapter, and actions; the first row has none."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(num_rows, vocab, generator=generator) * scale
    q = base + torch.randn(num_rows, vocab, generator=generator) * min(scale, 1.0)
    actions = torch.randint(0, vocab, (num_rows,), generator=generator)
    if num_rows > 1:
        actions[0] = -100
    return base.to(dtype).to(DEVICE), q.to(dtype).to(DEVICE), actions.to(DEVICE)


def specification(base, q, actions, composition, dtype, *, base_lse=None, base_logp=None):
    """The reference in `dtype`: the five results, and lse(x / alpha_tilde)."""
    alpha_0, alpha_tilde, center = composition
    cast = [None if t is None else t.to(dtype) for t in (base, q, base_lse, base_logp)]
    values = reference.residual_values(
        *cast[:2],
        actions,
        alpha_0=alpha_0,
        alpha_tilde=alpha_tilde,
        center=center,
        base_lse=cast[2],
        base_logp=cast[3],
    )
    return [*values, torch.logsumexp(reference.policy_logits(*cast[:2], *composition), -1)]


def check_forward(base, q, actions, composition, *, splits=None, base_lse=None, base_logp=None):
    results = forward_module.launch(base, q, actions, base_lse, base_logp, *composition, splits)
    assert len(results) == 7
    assert all(t.dtype == torch.float32 and t.shape == actions.shape for t in results)
    given = {"base_lse": base_lse, "base_logp": base_logp}
    exact = specification(base, q, actions, composition, torch.float64, **given)
    eager = specification(base, q, actions, composition, torch.float32, **given)
    got_q, value, got_logp, policy_logp, got_lse, shift, log_sum = results
    got = [got_q, value, got_logp, policy_logp, got_lse, shift.double() / composition[1] + log_sum]
    finite = exact[5][exact[5].isfinite()].abs() * composition[1]
    terms = max([1.0, *finite.tolist(), *exact[4][exact[4].isfinite()].abs().tolist()])
    for name, *triple in zip(
        ("q", "value", "base_logp", "policy_logp", "base_lse", "lse"),
        got,
        exact,
        eager,
        strict=True,
    ):
        assert_near(*triple, name, 1.0 if "logp" in name else terms)
    return results


def check_backward(base, q, actions, composition, results):
    """Against autograd through the float64 reference of a random linear function of q, V, logp."""
    weights = torch.randn(3, q.shape[0], generator=torch.Generator().manual_seed(1)).to(DEVICE)
    weights[:, actions < 0] *= torch.tensor([0.0, 1.0, 0.0], device=DEVICE)[:, None]

    def autograd(dtype):
        leaf = q.detach().to(dtype).requires_grad_()
        out = specification(base, leaf, actions, composition, dtype)
        chosen = zip(weights.to(dtype), (out[0], out[1], out[3]), strict=True)
        total = sum((w * t).sum() for w, t in chosen)
        return torch.autograd.grad(total, leaf)[0]

    scaled = weights[2] / composition[1]
    grad = residual_bwd(
        base, q, actions, *results[5:], weights[1] - scaled, weights[0] + scaled, *composition
    )
    assert grad.dtype == q.dtype
    assert grad.shape == q.shape
    assert grad.is_contiguous()
    exact, eager = autograd(torch.float64), autograd(torch.float32)
    baseline = (eager.double() - exact).abs().max()
    truncated = INTERPRETED and q.dtype == torch.bfloat16
    last_place = torch.finfo(q.dtype).eps * (1.0 if truncated else 0.5) * exact.abs()
    smallest = torch.finfo(q.dtype).smallest_normal * torch.finfo(q.dtype).eps
    tolerance = last_place + 2 * baseline + 2.0**-20 * weights.abs().max() + smallest
    assert ((grad.double() - exact).abs() <= tolerance).all()
    return grad


def check_all(base, q, actions, composition, **options):
    results = check_forward(base, q, actions, composition, **options)
    return results, check_backward(base, q, actions, composition, results)


if INTERPRETED or ON_GPU:

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        ("num_rows", "vocab"), [(1, 1), (1, 1000), (3, 1), (3, 7), (3, 1000), (33, 7), (33, 1000)]
    )
    def test_small_vocabularies(num_rows, vocab, dtype):
        for composition in COMPOSITIONS[: 3 if num_rows == 3 else 1]:
            check_all(*make_rows(num_rows, vocab, dtype), composition)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("num_rows", "vocab"), [(3, 32000), (3, 50257), (1, 128256)])
    def test_real_vocabularies(num_rows, vocab, dtype):
        index = DTYPES.index(dtype)
        check_all(*make_rows(num_rows, vocab, dtype), COMPOSITIONS[index])
        if num_rows > 1:
            check_all(*make_rows(2, vocab, dtype), COMPOSITIONS[index + 1])

    @pytest.mark.parametrize("center", [0.0, 1.0])
    @pytest.mark.parametrize("alpha_tilde", [0.1, 1.0, 10.0])
    @pytest.mark.parametrize("alpha_0", [0.0, 0.01, 1.0])
    def test_compositions(alpha_0, alpha_tilde, center):
        for dtype in DTYPES:
            check_all(*make_rows(2, 203, dtype), (alpha_0, alpha_tilde, center))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_no_rows(dtype):
        base, q, actions = make_rows(0, 11, dtype)
        results = residual_fwd(base, q, actions, None, None, 1.0, 1.0, 1.0)
        assert [t.shape for t in results] == [(0,)] * 7
        empty = torch.empty(0, device=DEVICE)
        grad = residual_bwd(base, q, actions, empty, empty, empty, empty, 1.0, 1.0, 1.0)
        assert grad.shape == (0, 11)
        assert grad.dtype == dtype

    @pytest.mark.parametrize("splits", [1, 2, 5])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_first_step_is_exactly_zero(dtype, splits):
        for vocab in (7, 1000, 20011):
            base, _, actions = make_rows(2, vocab, dtype, scale=5.0)
            composition = (1.0, 1.0, 1.0)
            q, value, base_logp, policy_logp, *_ = forward_module.launch(
                base, base.clone(), actions, None, None, *composition, splits
            )
            assert torch.equal(value, torch.zeros_like(value))
            assert torch.equal(q, torch.zeros_like(q))
            assert torch.equal(base_logp, policy_logp)

    @pytest.mark.parametrize("vocab", [33000, 20011])
    def test_split_rows(vocab):
        for dtype in DTYPES:
            splits = {torch.float32: 2, torch.bfloat16: 3, torch.float16: 64}[dtype]
            check_forward(*make_rows(2, vocab, dtype), (0.5, 0.7, 1.0), splits=splits)
        assert forward_module.choose_splits(8192, 16032, 512, 132) == 1
        assert forward_module.choose_splits(8, 16032, 512, 132) == 32
        assert forward_module.choose_splits(1, 0, 512, 132) == 1

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_large_logits(dtype):
        """Differences stay exact at 1e4: with m = 0 a small alpha_tilde costs no digits."""
        base, q, actions = make_rows(4, 500, dtype)
        base[:, ::3], q[:, ::3] = 1e4, 1e4
        base[1:3, 1::3], q[1:3, 1::3] = -1e4, -1e4
        for composition in COMPOSITIONS:
            check_all(base, q, actions, composition)
        shifted = (torch.arange(500, device=DEVICE) % 7 * 8 + 1e4).to(dtype).repeat(4, 1)
        actions = torch.tensor([0, 1, 6, 7], device=DEVICE)
        policy_logp = residual_fwd(shifted, shifted, actions, None, None, 1.0, 0.1, 1.0)[3]
        exact = specification(shifted, shifted, actions, (1.0, 0.1, 1.0), torch.float64)[3]
        assert ((policy_logp - exact).abs() <= 2.0**-21 * exact.abs().clamp(min=1.0)).all()

    @pytest.mark.parametrize("composition", [*COMPOSITIONS, (0.3, 0.3, 1.0)])
    def test_masked_tokens(composition):
        """-inf in either stream or both, also under m < 0 and alpha_0 = 0."""
        for dtype in DTYPES:
            base, q, actions = make_rows(6, 300, dtype)
            q[1:, ::5] = float("-inf")
            base[2:, 1::5] = float("-inf")
            base[3:, ::5] = float("-inf")
            actions[1:] = torch.tensor([4, 0, 1, 5, 2], device=DEVICE)
            if composition[0] == composition[2]:
                base[:, actions[actions >= 0]] = 0.0  # q of a masked base token is +inf: not here
            results = check_forward(base, q, actions, composition)
            check_backward(base, q, actions.clamp(max=-1), composition, results)

    def test_masked_rows():
        """A row without any token left is NaN, forward and backward, and its neighbours are not."""
        for composition in COMPOSITIONS:
            base, q, actions = make_rows(4, 1003, torch.bfloat16)
            actions[0] = 5
            q[1] = float("-inf")
            results = residual_fwd(base, q, actions, None, None, *composition)
            for index in (0, 1, 3, 6):
                assert results[index].isnan().tolist() == [False, True, False, False]
            ones = torch.ones(4, device=DEVICE)
            grad = residual_bwd(base, q, actions, *results[5:], ones, ones, *composition)
            assert grad[1].isnan().all()
            assert grad[[0, 2, 3]].isfinite().all()

    @pytest.mark.parametrize("poison", [float("nan"), float("inf")])
    @pytest.mark.parametrize("stream", ["base", "q"])
    def test_poison_stays_in_its_row(stream, poison):
        for dtype, column in ((torch.float32, 0), (torch.bfloat16, 700), (torch.float16, 1002)):
            for composition in ((1.0, 1.0, 1.0), (0.5, 1.0, 1.0), (1.0, 1.0, 0.5)):
                base, q, actions = make_rows(3, 1003, dtype)
                (base if stream == "base" else q)[1, column] = poison
                results = residual_fwd(base, q, actions, None, None, *composition)
                assert results[1].isnan().tolist() == [False, True, False]
                weight = torch.ones(3, device=DEVICE)
                grad = residual_bwd(base, q, actions, *results[5:], weight, weight, *composition)
                enters = stream == "q" or composition[0] != composition[2]
                assert grad[1].isnan().any() == enters
                assert grad[[0, 2]].isfinite().all()

    def test_actions_outside():
        """Out of range is NaN and never a read; -100 has no q but a value."""
        base, q, _ = make_rows(6, 100, torch.float32)
        actions = torch.tensor([-100, -1, 100, 2**40, -(2**40), 3], device=DEVICE)
        results = residual_fwd(base, q, actions, None, None, 0.5, 1.0, 1.0)
        bad = [False, True, True, True, True, False]
        for result in results[:4]:
            assert result.isnan().tolist() == bad
        for result in (results[0], results[2], results[3]):
            assert result[0] == 0.0
        assert results[4].isfinite().all()
        ones = torch.ones(6, device=DEVICE)
        grad = residual_bwd(base, q, actions, *results[5:], ones, ones, 0.5, 1.0, 1.0)
        expected = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 2.0], device=DEVICE)
        torch.testing.assert_close(grad.sum(1), expected)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_cached_base_statistics(dtype):
        base, q, actions = make_rows(5, 409, dtype)
        lse = torch.logsumexp(base.double(), -1)
        token_logp = torch.log_softmax(base.double(), -1)
        logp = token_logp.gather(1, actions.clamp(min=0)[:, None])[:, 0].float()
        lse = lse.float()
        for composition in ((1.0, 1.0, 1.0), (0.5, 2.0, 1.0), (0.0, 1.0, 1.0), (0.0, 1.0, 0.0)):
            check_forward(base, q, actions, composition, base_lse=lse)
            check_forward(base, q, actions, composition, base_logp=logp)
            check_forward(base, q, actions, composition, base_lse=lse, base_logp=logp)
            if composition[0] == composition[2]:
                results = check_forward(None, q, actions, composition, base_lse=lse, base_logp=logp)
                check_backward_without_base(base, q, actions, composition, results)
        with pytest.raises(ValueError, match="base_logits"):
            residual_fwd(None, q, actions, lse, logp, 0.5, 1.0, 1.0)
        with pytest.raises(ValueError, match="base_logits"):
            residual_fwd(None, q, actions, lse, None, 1.0, 1.0, 1.0)
        poisoned = base.clone()
        poisoned[:, 0] = float("nan")  # with m = 0 and base_lse only the action's column is read
        results = residual_fwd(poisoned, q, actions.clamp(min=1), lse, None, 1.0, 1.0, 1.0)
        assert all(t.isfinite().all() for t in results)

    def check_backward_without_base(base, q, actions, composition, results):
        weight = torch.linspace(-1, 1, q.shape[0], device=DEVICE)
        arguments = (q, actions, *results[5:], weight, -weight, *composition)
        assert torch.equal(residual_bwd(None, *arguments), residual_bwd(base, *arguments))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("vocab", [37, 1024, 5003])
    def test_row_layouts(vocab, dtype):
        """Padded, shifted, expanded and differently strided rows give the numbers of dense ones."""
        base, q, actions = make_rows(3, vocab, dtype)
        composition = (0.5, 1.0, 1.0)
        ones = torch.linspace(0.5, 1, 3, device=DEVICE)

        def run(base, q, actions):
            results = residual_fwd(base, q, actions, None, None, *composition)
            grad = residual_bwd(base, q, actions, *results[5:], ones, ones, *composition)
            return [*results, grad]

        def same(got, expected):
            # Only the order of a sum may differ; a gradient may round the other way for it.
            for left, right in zip(got, expected, strict=True):
                spacing = torch.finfo(left.dtype).eps
                torch.testing.assert_close(left, right, rtol=max(1e-5, spacing), atol=1e-6)

        def view(rows, stride, start):
            storage = torch.full((rows.shape[0] * stride + start,), float("nan")).to(rows)
            strided = storage.as_strided(rows.shape, (stride, 1), start)
            return strided.copy_(rows)

        expected = run(base, q, actions)
        for base_layout, q_layout in (
            ((vocab + 8, 0), (vocab + 8, 0)),
            ((vocab + 16 - vocab % 16, 0), (vocab + 32 - vocab % 16, 0)),
            ((vocab + 3, 5), (vocab + 3, 5)),
            ((vocab, 1), (vocab + 1, 0)),
        ):
            got = run(view(base, *base_layout), view(q, *q_layout), actions)
            same(got, expected)
        labels = torch.cat([actions[:1], actions])[1:]  # 8 bytes past a 16-byte boundary
        assert labels.data_ptr() % 16 == 8
        expanded = run(base[1:2].expand(3, -1), q[1:2].expand(3, -1), labels.clamp(min=0))
        dense = run(base[1:2].repeat(3, 1), q[1:2].repeat(3, 1), actions.clamp(min=0))
        same(expanded, dense)

    def test_offsets_beyond_32_bits():
        """Rows 2^30 elements apart, in storage of which only the rows' own pages are touched."""
        vocab = 1000
        base, q, actions = make_rows(3, vocab, torch.bfloat16)
        actions[0] = 17
        far = torch.empty(2**31 + vocab, dtype=torch.bfloat16, device=DEVICE)
        rows = far.as_strided((3, vocab), (2**30, 1))
        rows.copy_(q)
        check_all(base, rows, actions, (0.5, 1.0, 1.0))
        rows.copy_(base)
        check_all(rows, q, actions, (0.5, 1.0, 1.0))

    @pytest.mark.skipif(not ON_GPU, reason="2^31 gradient elements take a GPU")
    def test_gradient_beyond_32_bits():
        vocab = 128256
        num_rows = 2**31 // vocab + 2
        _, q, _ = make_rows(1, vocab, torch.bfloat16)
        q = q.expand(num_rows, -1)
        actions = torch.zeros(num_rows, dtype=torch.long, device=DEVICE)
        results = residual_fwd(q, q, actions, None, None, 1.0, 1.0, 1.0)
        ones = torch.ones(num_rows, device=DEVICE)
        grad = residual_bwd(q, q, actions, *results[5:], ones, ones, 1.0, 1.0, 1.0)
        assert torch.equal(grad[-1], grad[0])
        assert torch.equal(grad[num_rows // 2], grad[0])
