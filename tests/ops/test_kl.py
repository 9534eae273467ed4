"""KL to the base from moments is the sum over the vocabulary in float64, with its gradient, and
nothing at all where both streams are equal."""

import pytest
import torch

from qadapter import functional as QF
from qadapter import reference
from tests.ops.test_linear import case

COMPOSITIONS = [
    {"alpha_0": 1.0, "alpha_tilde": 1.0, "center": 1.0},
    {"alpha_0": 2.0, "alpha_tilde": 2.0, "center": 1.0},
    {"alpha_0": 0.5, "alpha_tilde": 0.5, "center": 1.0},
    {"alpha_0": 0.01, "alpha_tilde": 1.0, "center": 0.0},
    {"alpha_0": 0.7, "alpha_tilde": 1.3, "center": 0.4},
]
DEFAULT = COMPOSITIONS[0]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def no_actions(rows):
    return torch.full((len(rows),), -100, device=rows.device)


def streams(device, dtype, moved, rows=37, vocab=1003, dim=48, size=4.0):
    base, _, weight, _ = case(rows, vocab, dim, dtype, size=size)
    generator = torch.Generator().manual_seed(5)
    q = base + moved * torch.randn(rows, dim, generator=generator).to(dtype)
    return base.to(device), q.to(device), weight.to(device)


def biased(kind, vocab, device, dtype):
    if kind is None:
        return None
    bias = torch.randn(vocab, generator=torch.Generator().manual_seed(2))
    if kind == "masked":
        bias[::3] = -torch.inf
    return bias.to(device=device, dtype=dtype)


def ours(base, q, weight, bias, scale, composition):
    """KL and its gradient; the base's lse is known where it alone counts."""
    q = q.detach().requires_grad_()
    moments = QF.base_moments(base, weight, bias=bias, logit_scale=scale)
    known = {}
    if composition["alpha_0"] == composition["center"]:
        known = {"base_lse": moments.lse, "base_logp": torch.zeros_like(moments.lse)}
    values = QF.linear_residual_values(
        None if known else base,
        q, weight, no_actions(q), bias=bias, logit_scale=scale, **known, **composition,
    )  # fmt: skip
    kl = QF.kl_to_base(values.value, q, moments, **composition)
    (gradient,) = torch.autograd.grad(kl.sum(), q)
    return kl.detach().double(), gradient.double()


def exact(base, q, weight, bias, scale, composition):
    base, q, weight = (x.double() for x in (base, q, weight))
    bias = None if bias is None else bias.double()
    q = q.detach().requires_grad_()
    kl = reference.kl_to_base(base, q, weight, bias=bias, logit_scale=scale, **composition)
    (gradient,) = torch.autograd.grad(kl.sum(), q)
    return kl.detach(), gradient


@pytest.mark.parametrize("composition", COMPOSITIONS, ids=lambda c: "-".join(map(str, c.values())))
@pytest.mark.parametrize("kind", [None, "plain", "masked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_the_sum_over_the_vocabulary(device, dtype, kind, composition):
    for moved in (3e-3, 0.1, 1.0):
        base, q, weight = streams(device, dtype, moved)
        bias = biased(kind, len(weight), device, dtype)
        kl, gradient = ours(base, q, weight, bias, 0.8, composition)
        kl_exact, gradient_exact = exact(base, q, weight, bias, 0.8, composition)
        # float32 sums of logits up to about 15, divided by alpha_tilde
        tolerance = 1e-5 * max(1.0, 1.0 / composition["alpha_tilde"])
        torch.testing.assert_close(kl, kl_exact, rtol=2e-5, atol=tolerance)
        # Two vectors of the size of the head's rows, each rounded to the dtype, are subtracted.
        unit = torch.finfo(dtype).eps * weight.double().norm(dim=1).max()
        bound = max(4 * float(unit) / composition["alpha_tilde"], 1e-5)
        torch.testing.assert_close(gradient, gradient_exact, rtol=0, atol=bound)


@pytest.mark.parametrize(("moved", "low", "high"), [(3e-4, 1e-7, 1e-5), (3.0, 5.0, 50.0)])
def test_from_tiny_to_large(device, moved, low, high):
    base, q, weight = streams(device, torch.float32, moved, size=4.0)
    kl, _ = ours(base, q, weight, None, 1.0, DEFAULT)
    kl_exact, _ = exact(base, q, weight, None, 1.0, DEFAULT)
    assert low < kl_exact.mean() < high
    torch.testing.assert_close(kl, kl_exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [None, "masked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_where_the_streams_are_equal(device, dtype, kind):
    base, _, weight = streams(device, dtype, 0.0)
    bias = biased(kind, len(weight), device, dtype)
    kl, gradient = ours(base, base.clone(), weight, bias, 0.8, DEFAULT)
    assert (kl == 0).all()
    assert (gradient == 0).all()


@pytest.mark.parametrize("kind", [None, "masked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments_are_those_of_the_probabilities(device, dtype, kind):
    base, _, weight = streams(device, dtype, 0.0)
    bias = biased(kind, len(weight), device, dtype)
    moments = QF.base_moments(base, weight, bias=bias, logit_scale=0.8)
    definition = reference.base_moments(
        base.double(), weight.double(), bias=None if bias is None else bias.double(),
        logit_scale=0.8,
    )  # fmt: skip
    for name, made, wanted in zip(moments._fields, moments, definition, strict=True):
        assert made.dtype == torch.float32 and not made.requires_grad
        torch.testing.assert_close(made.double(), wanted, rtol=1e-5, atol=1e-5, msg=name)


def test_under_autocast_the_operands_are_those_of_the_operation():
    base, q, weight = streams("cpu", torch.float32, 0.1)
    rounded = [x.bfloat16() for x in (base, q, weight)]
    with torch.autocast("cpu", torch.bfloat16):
        kl, _ = ours(base, q, weight, None, 1.0, DEFAULT)
    kl_exact, _ = exact(*rounded, None, 1.0, DEFAULT)
    torch.testing.assert_close(kl, kl_exact, rtol=1e-5, atol=1e-5)


def test_float64():
    base, q, weight = (x.double() for x in streams("cpu", torch.float32, 0.1))
    for composition in COMPOSITIONS:
        made, wanted = (f(base, q, weight, None, 1.0, composition) for f in (ours, exact))
        torch.testing.assert_close(made[0], wanted[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(made[1], wanted[1], rtol=1e-9, atol=1e-12)


def test_some_states_of_many(device):
    base, q, weight = streams(device, torch.bfloat16, 0.1)
    moments = QF.base_moments(base, weight)
    some = torch.tensor([3, 0, 11], device=device)
    value = QF.linear_residual_values(base, q, weight, no_actions(q)).value
    whole = QF.kl_to_base(value, q, moments)
    torch.testing.assert_close(
        QF.kl_to_base(value[some], q[some], moments.rows(some)), whole[some], rtol=0, atol=0
    )
    lse, mean_logit, mean_row, mean_bias = moments
    plain = QF.kl_to_base(value, q, QF.BaseMoments(lse, mean_logit, mean_row, mean_bias))
    torch.testing.assert_close(plain, whole, rtol=0, atol=0)


def test_no_rows(device):
    weight = torch.randn(5, 6, device=device)
    q = torch.empty(0, 6, device=device).requires_grad_()
    moments = QF.base_moments(q.detach(), weight)
    kl = QF.kl_to_base(torch.empty(0, device=device), q, moments)
    kl.sum().backward()
    assert kl.shape == (0,) and q.grad.shape == (0, 6)


def test_bad_input():
    base, q, weight = streams("cpu", torch.float32, 0.1, rows=4)
    moments = QF.base_moments(base, weight)
    value = torch.zeros(4)
    with pytest.raises(ValueError, match="base_hidden: expected a 2-D"):
        QF.base_moments(base[0], weight)
    with pytest.raises(ValueError, match=r"weight: expected .*, to fit base_hidden"):
        QF.base_moments(base, weight[:, :3])
    with pytest.raises(ValueError, match="bias: expected"):
        QF.base_moments(base, weight, bias=torch.zeros(3))
    with pytest.raises(ValueError, match="value: expected 4 rows"):
        QF.kl_to_base(value[:3], q, moments)
    with pytest.raises(ValueError, match=r"moments: expected `BaseMoments`, .*, got tuple"):
        QF.kl_to_base(value, q, tuple(moments))
    with pytest.raises(ValueError, match=r"moments\.lse: expected 4 rows"):
        QF.kl_to_base(value, q, moments.rows(slice(3)))
    with pytest.raises(ValueError, match=r"moments\.mean_row: expected the shape"):
        QF.kl_to_base(value, q, moments._replace(mean_row=moments.mean_row[:, :5]))
    with pytest.raises(ValueError, match="alpha_tilde: expected a number above 0"):
        QF.kl_to_base(value, q, moments, alpha_tilde=0.0)
