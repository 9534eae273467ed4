"""Every backend gives the float64 reference's values, gradients and losses.

The tolerance is what eager PyTorch in the same dtype does. Also schemas, torch.compile, bad input.
"""

import itertools

import pytest
import torch
from torch.library import opcheck

import qadapter
from qadapter import QAdapterLinearLoss, QAdapterLoss, reference
from qadapter import functional as QF

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF = float("inf")


def case(rows, vocab, dtype, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, vocab, generator=generator) * scale
    adapter = base + torch.randn(rows, vocab, generator=generator)
    actions = torch.randint(0, vocab, (rows,), generator=generator)
    actions[rows // 2 : rows // 2 + 1] = -100
    bound = torch.finfo(dtype).max if dtype == torch.float16 else INF
    return base.clamp(-bound, bound).to(dtype), adapter.clamp(-bound, bound).to(dtype), actions


def upstream(rows, seed=1):
    return torch.randn(3, rows, generator=torch.Generator().manual_seed(seed))


def evaluate(function, base, adapter, actions, weights, **kwargs):
    """(q, value, base_logp, policy_logp, base_lse) and the gradient of a random combination."""
    adapter = adapter.detach().requires_grad_()
    values = function(base, adapter, actions, **kwargs)
    total = sum(
        (w * x).sum()
        for w, x in zip(weights, (values.q, values.value, values.policy_logp), strict=True)
    )
    (gradient,) = torch.autograd.grad(total, adapter)
    return [x.detach().double().cpu() for x in (*values, gradient)]


def agree(ours, exact, eager, dtype, *, factor=2.0):
    """At most ``factor`` times eager's error in the same dtype, plus rounding of the scale."""
    names = ("q", "value", "base_logp", "policy_logp", "base_lse", "gradient")
    for name, a, b, c in zip(names, ours, exact, eager, strict=True):
        finite = b.isfinite()
        assert torch.equal(a.isnan(), b.isnan()), name
        assert torch.equal(a[~finite & ~b.isnan()], b[~finite & ~b.isnan()]), name
        if not finite.any():
            continue
        size = b[finite].abs().max().item()
        rounding = torch.finfo(dtype if name == "gradient" else torch.float32).eps
        baseline = (c - b)[finite & c.isfinite()].abs().max().nan_to_num(0.0).item()
        error = (a - b)[finite].abs().max().item()
        assert error <= factor * baseline + 4 * rounding * size + 1e-7, (name, error, baseline)


def compare(device, base, adapter, actions, dtype, **kwargs):
    weights = upstream(len(actions))
    exact = evaluate(
        reference.residual_values,
        base.double(),
        adapter.double(),
        actions,
        weights.double(),
        **kwargs,
    )
    eager = evaluate(reference.residual_values, base, adapter, actions, weights, **kwargs)
    ours = evaluate(
        QF.residual_values,
        base.to(device),
        adapter.to(device),
        actions.to(device),
        weights.to(device),
        **kwargs,
    )
    agree(ours, exact, eager, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "vocab"), [(3, 1), (257, 7), (33, 1000), (3, 32000), (2, 128256), (5, 50257), (0, 7)]
)
def test_shapes(device, dtype, rows, vocab):
    base, adapter, actions = case(rows, vocab, dtype)
    if rows == 0:
        values = QF.residual_values(base.to(device), adapter.to(device), actions.to(device))
        assert all(x.shape == (0,) and x.dtype == torch.float32 for x in values)
        return
    compare(device, base, adapter, actions, dtype, alpha_0=0.5)


COMPOSITIONS = list(itertools.product([0.0, 0.01, 1.0], [0.1, 1.0, 10.0], [0.0, 1.0]))


@pytest.mark.parametrize("scale", [3.0, 1e4])
@pytest.mark.parametrize(("alpha_0", "alpha_tilde", "center"), COMPOSITIONS)
def test_compositions(device, alpha_0, alpha_tilde, center, scale):
    base, adapter, actions = case(9, 1003, torch.float32, scale / 3)
    kwargs = {"alpha_0": alpha_0, "alpha_tilde": alpha_tilde, "center": center}
    compare(device, base, adapter, actions, torch.float32, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("alpha_0", "alpha_tilde", "center"), COMPOSITIONS)
def test_masked_tokens(device, dtype, alpha_0, alpha_tilde, center):
    """-inf in both streams, in one of them, and with weight 0; never NaN, never probability."""
    base, adapter, actions = case(8, 517, dtype)
    base[:, 100:200] = -INF
    adapter[:, 150:250] = -INF
    actions = torch.tensor([0, 5, 99, 300, 400, 516, -100, 260])
    kwargs = {"alpha_0": alpha_0, "alpha_tilde": alpha_tilde, "center": center}
    compare(device, base, adapter, actions, dtype, **kwargs)
    q_logits = adapter.to(device).requires_grad_()
    values = QF.residual_values(base.to(device), q_logits, actions.to(device), **kwargs)
    (gradient,) = torch.autograd.grad(values.value.sum(), q_logits)
    masked = (adapter == -INF) | ((base == -INF) & (alpha_0 != center))
    assert (gradient.cpu()[masked] == 0).all()


def test_actions_on_masked_tokens(device):
    base, adapter, _ = case(3, 50, torch.float32)
    base[0, 7], adapter[0, 7] = -INF, -INF
    adapter[1, 7] = -INF
    actions = torch.tensor([7, 7, 7])
    values = QF.residual_values(base.to(device), adapter.to(device), actions.to(device))
    assert (values.q[:2] == -INF).all() and (values.policy_logp[:2] == -INF).all()
    assert values.q[2].isfinite()


def test_a_broken_row_poisons_itself_alone(device):
    base, adapter, actions = case(6, 1003, torch.float32)
    actions = torch.tensor([1, 2, 3, 4, 5, 6])
    adapter[1, 500] = float("nan")
    base[3, 1002] = float("nan")
    adapter[4] = -INF
    values = QF.residual_values(base.to(device), adapter.to(device), actions.to(device))
    assert values.value.isnan().tolist() == [False, True, False, True, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows(device, dtype):
    base, adapter, actions = case(12, 301, dtype)
    wide = torch.zeros(12, 407, dtype=dtype)
    wide[:, 5:306] = base
    tall = torch.zeros(24, 301, dtype=dtype)
    tall[::2] = adapter
    weights = upstream(12).to(device)
    arguments = (actions.to(device), weights)
    dense = evaluate(
        QF.residual_values, base.to(device), adapter.to(device), *arguments, alpha_0=0.3
    )
    strided = evaluate(
        QF.residual_values, wide.to(device)[:, 5:306], tall.to(device)[::2], *arguments, alpha_0=0.3
    )
    for a, b in zip(dense, strided, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    transposed = adapter.t().contiguous().t().to(device)
    values = QF.residual_values(base.to(device), transposed, actions.to(device), alpha_0=0.3)
    torch.testing.assert_close(values.value.double().cpu(), dense[1])


def test_rows_beyond_two_to_the_31(device):
    """Row offsets past int32: only the pages of three rows are ever touched."""
    vocab = 1000
    flat = torch.empty(2**31 + vocab, dtype=torch.bfloat16, device=device)
    rows = flat.as_strided((3, vocab), (2**30, 1))
    base, adapter, actions = case(3, vocab, torch.bfloat16)
    rows.copy_(adapter)
    far = QF.residual_values(base.to(device), rows, actions.to(device), alpha_0=0.5)
    near = QF.residual_values(base.to(device), adapter.to(device), actions.to(device), alpha_0=0.5)
    for a, b in zip(far, near, strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements(device):
    rows, vocab = 16_800, 128_256
    row = torch.randn(1, vocab, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    actions = torch.arange(rows, device=device)
    base = row * 0.5
    values = QF.residual_values(base.expand(rows, -1), row.expand(rows, -1), actions, alpha_0=0.3)
    one = QF.residual_values(base, row, actions[:1], alpha_0=0.3)
    assert rows * vocab > 2**31
    torch.testing.assert_close(values.value, one.value.expand(rows))
    torch.testing.assert_close(values.q, row[0, :rows].float() - base[0, :rows].float())


def test_cached_base(device):
    """base_lse and base_logp given: the same numbers, and no base logits needed where m = 0."""
    base, adapter, actions = (x.to(device) for x in case(9, 1003, torch.float32))
    full = QF.residual_values(base, adapter, actions)
    cached = {"base_lse": full.base_lse, "base_logp": full.base_logp}
    with_logits = QF.residual_values(base, adapter, actions, **cached)
    without = QF.residual_values(None, adapter, actions, **cached)
    mixed = QF.residual_values(base, adapter, actions, alpha_0=0.3, base_lse=full.base_lse)
    plain = QF.residual_values(base, adapter, actions, alpha_0=0.3)
    for a, b in [*zip(full, with_logits, strict=True), *zip(full, without, strict=True)]:
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(mixed, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [7, 1003, 49152])
def test_the_start_is_exactly_zero(device, dtype, vocab):
    """Equal streams, default composition: no reward, to the last bit, and a loss of log 2."""
    base, _, actions = case(8, vocab, dtype, scale=10.0)
    base = base.to(device)
    values = QF.residual_values(base, base.clone(), actions.to(device))
    assert (values.q == 0).all() and (values.value == 0).all()
    assert torch.equal(values.policy_logp, values.base_logp)
    cu_seqlens = torch.tensor([0, 3, 8], dtype=torch.int32, device=device)
    out = QF.qadapter_loss(base, base.clone(), actions.to(device), cu_seqlens)
    assert out.margins.item() == 0.0 and out.reg_loss.item() == 0.0
    torch.testing.assert_close(out.loss.cpu(), torch.tensor(2.0).log())


LOSSES = list(itertools.product(["next", "same"], ["response", "none"], [0.0, 1.0], [0.5, 20.0]))


@pytest.mark.parametrize(("value_at", "length_norm", "gamma", "bt_scale"), LOSSES)
def test_loss_and_its_gradient(device, value_at, length_norm, gamma, bt_scale):
    """The fused loss, and the loss on per-token values, against the reference's loop."""
    base, adapter, actions = case(20, 203, torch.float32)
    actions[11] = -100
    cu_seqlens = torch.tensor([0, 4, 4, 9, 12, 13, 20], dtype=torch.int32)  # one is empty
    kwargs = {
        "value_at": value_at,
        "length_norm": length_norm,
        "gamma": gamma,
        "bt_scale": bt_scale,
        "reg_coef": 0.3,
    }
    exact_logits = adapter.double().requires_grad_()
    exact = reference.qadapter_loss(base.double(), exact_logits, actions, cu_seqlens, **kwargs)
    exact.loss.backward()
    on = [x.to(device) for x in (base, adapter, actions, cu_seqlens)]
    for fused in (True, False):
        logits = on[1].clone().requires_grad_()
        if fused:
            ours = QF.qadapter_loss(on[0], logits, *on[2:], **kwargs)
        else:
            values = QF.residual_values(on[0], logits, on[2])
            ours = QF.preference_loss(values, *on[2:], **kwargs)
        ours.loss.backward()
        for name, a, b in zip(ours._fields, ours, exact, strict=True):
            assert a.dtype == torch.float32 and a.requires_grad == (name == "loss"), name
            torch.testing.assert_close(a.detach().double().cpu(), b.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            logits.grad.double().cpu(), exact_logits.grad, rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("lengths", [[0, 0], [1, 1], [0, 3], []])
def test_degenerate_batches(device, lengths):
    rows = sum(lengths)
    base, adapter, _ = case(rows, 11, torch.float32)
    actions = torch.full((rows,), 2)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int64, device=device)
    logits = adapter.to(device).requires_grad_()
    out = QF.qadapter_loss(base.to(device), logits, actions.to(device), cu_seqlens)
    out.loss.backward()
    exact = reference.qadapter_loss(base, adapter, actions, cu_seqlens.cpu())
    torch.testing.assert_close(out.loss.detach().cpu(), exact.loss)
    assert logits.grad.shape == (rows, 11) and logits.grad.isfinite().all()


def test_denominators_split_a_batch(device):
    """Two halves divided by the totals add up to the whole: gradient accumulation is exact."""
    base, adapter, actions = (x.to(device) for x in case(16, 50, torch.float32))
    whole_ends = torch.tensor([0, 2, 6, 9, 16], dtype=torch.int32, device=device)
    whole = QF.qadapter_loss(base, adapter, actions, whole_ends)
    totals = torch.tensor([2.0, float((actions != -100).sum())], device=device)
    parts = 0.0
    for chosen, rejected in ((slice(0, 2), slice(6, 9)), (slice(2, 6), slice(9, 16))):
        pick = torch.cat([torch.arange(16)[chosen], torch.arange(16)[rejected]]).to(device)
        split = chosen.stop - chosen.start
        ends = torch.tensor([0, split, len(pick)], dtype=torch.int32, device=device)
        parts = (
            parts
            + QF.qadapter_loss(
                base[pick], adapter[pick], actions[pick], ends, denominators=totals
            ).loss
        )
    torch.testing.assert_close(parts, whole.loss)


def test_schemas_fakes_and_autograd(device):
    base, adapter, actions = (x.to(device) for x in case(6, 37, torch.float32))
    adapter.requires_grad_()
    ends = torch.tensor([0, 2, 6], dtype=torch.int32, device=device)
    ops = torch.ops.qadapter
    composition, preference = (0.5, 1.0, 1.0), (1.0, 0.1, 1.0, True, True)
    opcheck(ops.residual_fwd.default, (base, adapter, actions, None, None, *composition))
    opcheck(
        ops.loss_fwd.default,
        (base, adapter, actions, ends, None, None, None, *composition, *preference),
    )
    rows = torch.rand(6, device=device)
    values = [torch.rand(6, device=device, requires_grad=True) for _ in range(2)]
    opcheck(ops.preference_fwd.default, (*values, actions, ends, None, *preference))
    frozen = adapter.detach()
    opcheck(ops.residual_bwd.default, (base, frozen, actions, *[rows] * 4, *composition))


@pytest.mark.parametrize(
    ("dtype", "dynamic"), [(torch.float32, None), (torch.bfloat16, None), (torch.float32, True)]
)
def test_compiles_without_graph_breaks(device, dtype, dynamic):
    base, adapter, actions = (x.to(device) for x in case(8, 65, dtype))
    ends = torch.tensor([0, 3, 8], dtype=torch.int32, device=device)
    for name, value in (("alpha_tilde", 0.0), ("reg_coef", "a"), ("value_at", "here")):
        for kind in (QAdapterLoss, QAdapterLinearLoss):
            with pytest.raises(ValueError, match=f"{name}: expected"):
                kind(**{name: value})
    with pytest.raises(ValueError, match="chunk_size: expected"):
        QAdapterLinearLoss(chunk_size=-1)
    module = QAdapterLoss(alpha_0=0.7, bt_scale=3.0)

    def step(logits):
        return module(base, logits * 1.5, actions, ends).loss

    eager_logits, compiled_logits = (adapter.clone().requires_grad_() for _ in range(2))
    eager = step(eager_logits)
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)(compiled_logits)
    eager.backward()
    compiled.backward()
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(compiled_logits.grad, eager_logits.grad)


def test_gradients_in_float64():
    """On the torch backend the whole chain is float64, so autograd can be checked numerically."""
    base, adapter, actions = case(5, 7, torch.float32)
    ends = torch.tensor([0, 2, 5], dtype=torch.int32)
    adapter = adapter.double().requires_grad_()

    def loss(logits):
        return QF.qadapter_loss(
            base.double(), logits, actions, ends, alpha_0=0.4, bt_scale=2.0
        ).loss

    assert torch.autograd.gradcheck(loss, (adapter,))
    (gradient,) = torch.autograd.grad(loss(adapter), adapter, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        gradient.sum().backward()


def test_the_base_gets_no_gradient(device):
    base, adapter, actions = (x.to(device) for x in case(4, 9, torch.float32))
    base.requires_grad_()
    adapter.requires_grad_()
    values = QF.residual_values(base, adapter, actions, alpha_0=0.5)
    assert not values.base_logp.requires_grad and not values.base_lse.requires_grad
    (values.q + values.value).sum().backward()
    assert base.grad is None and adapter.grad is not None


BASE, ADAPTER, ACTIONS = case(4, 9, torch.float32)
ENDS = torch.tensor([0, 2, 4], dtype=torch.int32)
BAD_ARGUMENTS = {
    "q_logits is 3-D": ((BASE, ADAPTER[None], ACTIONS, ENDS), {}, "q_logits: expected a 2-D"),
    "base is wider": ((BASE[:, :8], ADAPTER, ACTIONS, ENDS), {}, "base_logits: expected the shape"),
    "dtypes differ": ((BASE.half(), ADAPTER, ACTIONS, ENDS), {}, "base_logits: expected the dtype"),
    "int logits": ((BASE, ADAPTER.int(), ACTIONS, ENDS), {}, "q_logits: expected a 2-D float32"),
    "actions int32": ((BASE, ADAPTER, ACTIONS.int(), ENDS), {}, "actions: expected a 1-D int64"),
    "too few actions": ((BASE, ADAPTER, ACTIONS[:3], ENDS), {}, "actions: expected 4 rows"),
    "action too large": (
        (BASE, ADAPTER, torch.tensor([0, 1, 9, 3]), ENDS), {}, r"actions\[2\] = 9"
    ),
    "action negative": (
        (BASE, ADAPTER, torch.tensor([0, -1, 2, 3]), ENDS), {}, r"actions\[1\] = -1"
    ),
    "base missing": ((None, ADAPTER, ACTIONS, ENDS), {}, "base_logits: may only be None"),
    "odd sequences": (
        (BASE, ADAPTER, ACTIONS, torch.tensor([0, 1, 2, 4])), {}, "3 sequences"
    ),
    "no entries": (
        (BASE, ADAPTER, ACTIONS, torch.tensor([], dtype=torch.int32)), {}, "2P.1 entries"
    ),
    "ends early": ((BASE, ADAPTER, ACTIONS, torch.tensor([0, 2, 3])), {}, "from 0 to 3, expected"),
    "starts late": ((BASE, ADAPTER, ACTIONS, torch.tensor([1, 2, 4])), {}, "from 1 to 4, expected"),
    "decreases": ((BASE, ADAPTER, ACTIONS, torch.tensor([0, 5, 4])), {}, "cu_seqlens decreases"),
    "float ends": ((BASE, ADAPTER, ACTIONS, ENDS.float()), {}, "cu_seqlens: expected a 1-D int32"),
    "alpha_tilde 0": ((BASE, ADAPTER, ACTIONS, ENDS), {"alpha_tilde": 0.0}, "alpha_tilde"),
    "alpha_0 nan": ((BASE, ADAPTER, ACTIONS, ENDS), {"alpha_0": float("nan")}, "alpha_0"),
    "value_at": ((BASE, ADAPTER, ACTIONS, ENDS), {"value_at": "now"}, "value_at: expected one of"),
    "length_norm": ((BASE, ADAPTER, ACTIONS, ENDS), {"length_norm": None}, "length_norm: expected"),
    "base_lse shape": ((BASE, ADAPTER, ACTIONS, ENDS), {"base_lse": torch.zeros(3)}, "base_lse"),
    "base_logp dtype": (
        (BASE, ADAPTER, ACTIONS, ENDS), {"base_logp": torch.zeros(4).half()}, "base_logp"
    ),
    "denominators": (
        (BASE, ADAPTER, ACTIONS, ENDS), {"denominators": torch.ones(3)}, "denominators"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_input_names_the_argument(device, name):
    arguments, kwargs, message = BAD_ARGUMENTS[name]
    if device.type != "cpu" and (
        "action " in name or name in ("ends early", "starts late", "decreases")
    ):
        pytest.skip("values are not read on a GPU: NaN instead, tested elsewhere")
    arguments = tuple(a if a is None else a.to(device) for a in arguments)
    kwargs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    with pytest.raises(ValueError, match=message):
        QF.qadapter_loss(*arguments, **kwargs)


def test_backends_by_name(monkeypatch):
    with pytest.raises(ValueError, match="unknown backend 'numpy'"), qadapter.use_backend("numpy"):
        pass
    monkeypatch.setenv("QADAPTER_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="QADAPTER_BACKEND: unknown backend 'nonsense'"):
        QF.residual_values(BASE, ADAPTER, ACTIONS)
    monkeypatch.setenv("QADAPTER_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run"):
        QF.residual_values(BASE, ADAPTER, ACTIONS)
    with qadapter.use_backend("torch"):  # the innermost choice wins
        QF.residual_values(BASE, ADAPTER, ACTIONS)
    names = [info.name for info in qadapter.backends()]
    assert names == ["torch", "cpp", "triton", "cuda", "quack"]
    assert all(info.reason for info in qadapter.backends())


def test_named_backend_that_cannot_serve_is_an_error():
    with qadapter.use_backend("cpp"), pytest.raises(RuntimeError, match="cpp"):
        QF.residual_values(BASE.double(), ADAPTER.double(), ACTIONS)
