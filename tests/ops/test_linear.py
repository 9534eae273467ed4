"""Every backend's operations on hidden states give what float64 gives on the whole logits.

Tolerances are what eager PyTorch in the same dtype does.
"""

import itertools

import pytest
import torch
from torch.library import opcheck

from qadapter import QAdapterLinearLoss, reference
from qadapter import functional as QF

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF = float("inf")
NAMES = ("q", "value", "base_logp", "policy_logp", "base_lse", "gradient")


def case(rows, vocab, dim, dtype=torch.float32, seed=0, size=3.0):
    """base_hidden, q_hidden, weight, actions; logits are of the given size."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, dim, generator=generator)
    adapter = base + 0.3 * torch.randn(rows, dim, generator=generator)
    weight = torch.randn(vocab, dim, generator=generator) * (size / dim**0.5)
    actions = torch.randint(0, vocab, (rows,), generator=generator)
    actions[rows // 2 : rows // 2 + 1] = -100
    return base.to(dtype), adapter.to(dtype), weight.to(dtype), actions


def to(device, arguments):
    return [x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments]


def evaluate(function, base, adapter, weight, actions, upstream, **kwargs):
    """The five results and the gradient of a fixed combination of the differentiable ones."""
    adapter = adapter.detach().requires_grad_()
    values = function(base, adapter, weight, actions, **kwargs)
    total = sum(
        (w * x).sum()
        for w, x in zip(upstream, (values.q, values.value, values.policy_logp), strict=True)
    )
    (gradient,) = torch.autograd.grad(total, adapter)
    return [x.detach().double().cpu() for x in (*values, gradient)]


def cast(kwargs, dtype=None, device=None):
    return {
        k: v.to(device=device, dtype=dtype if k == "bias" or dtype == torch.float64 else None)
        if isinstance(v, torch.Tensor)
        else v
        for k, v in kwargs.items()
    }


def compare(device, arguments, *, only_ours=(), factor=2.0, **kwargs):
    """At most ``factor`` times eager's error in the same dtype, plus rounding of the scale."""
    base, adapter, weight, actions = arguments
    upstream = torch.randn(3, len(actions), generator=torch.Generator().manual_seed(1))
    wide = [x if x is None else x.double() for x in (base, adapter, weight)]
    exact = evaluate(
        reference.linear_residual_values, *wide, actions, upstream.double(),
        **cast(kwargs, torch.float64),
    )  # fmt: skip
    same = torch.promote_types(adapter.dtype, weight.dtype)
    eager_inputs = [x if x is None else x.to(same) for x in (base, adapter, weight)]
    eager = evaluate(
        reference.linear_residual_values, *eager_inputs, actions, upstream, **cast(kwargs, same)
    )
    ours = evaluate(
        QF.linear_residual_values, *to(device, arguments), upstream.to(device),
        **cast(kwargs, None, device), **dict(only_ours),
    )  # fmt: skip
    for name, a, b, c in zip(NAMES, ours, exact, eager, strict=True):
        finite = b.isfinite()
        assert torch.equal(a.isnan(), b.isnan()), name
        assert torch.equal(a[~finite & ~b.isnan()], b[~finite & ~b.isnan()]), name
        if not finite.any():
            continue
        size = b[finite].abs().max().item()
        rounding = torch.finfo(adapter.dtype if name == "gradient" else torch.float32).eps
        baseline = (c - b)[finite & c.isfinite()].abs().max().nan_to_num(0.0).item()
        error = (a - b)[finite].abs().max().item()
        assert error <= factor * baseline + 4 * rounding * size + 1e-6, (name, error, baseline)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "vocab", "dim"),
    [(3, 1, 5), (1, 7, 1), (37, 5, 16), (33, 1000, 17), (5, 4099, 64), (130, 515, 96), (0, 7, 3)],
)
def test_shapes(device, dtype, rows, vocab, dim):
    arguments = case(rows, vocab, dim, dtype)
    if rows == 0:
        values = QF.linear_residual_values(*to(device, arguments))
        assert all(x.shape == (0,) and x.dtype == torch.float32 for x in values)
        return
    compare(device, arguments, alpha_0=0.5)


@pytest.mark.parametrize("given", [(), ("base_lse",), ("base_lse", "base_logp"), ("base_logp",)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("alpha_0", "alpha_tilde", "center"),
    list(itertools.product([0.0, 0.01, 1.0], [0.5, 2.0], [0.0, 1.0])),
)
def test_compositions_and_known_base(device, alpha_0, alpha_tilde, center, dtype, given):
    arguments = case(9, 203, 24, dtype)
    known = reference.linear_residual_values(
        *(x.double() for x in arguments[:3]), arguments[3], alpha_0=1.0
    )
    kwargs = {"alpha_0": alpha_0, "alpha_tilde": alpha_tilde, "center": center}
    kwargs |= {name: getattr(known, name).float() for name in given}
    compare(device, arguments, **kwargs)
    if alpha_0 == center and len(given) == 2:
        compare(device, [None, *arguments[1:]], **kwargs)


@pytest.mark.parametrize("chunk", [{"chunk_size": 1}, {"chunk_size": 5}, {"chunk_size": 1000},
                                   {"memory_mib": 0.01}, {"memory_mib": 64}])  # fmt: skip
@pytest.mark.parametrize("alpha_0", [1.0, 0.3])
def test_chunks(device, chunk, alpha_0):
    compare(device, case(23, 301, 32), only_ours=chunk, alpha_0=alpha_0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize(
    "head",
    [
        {"logit_scale": 0.25},
        {"logit_softcap": 5.0},
        {"logit_softcap": 2.0, "logit_scale": 3.0},  # far above the cap
        {"bias": True},
        {"bias": True, "logit_scale": 0.5, "logit_softcap": 4.0},
    ],
)
def test_heads(device, dtype, head, with_lse):
    arguments = case(12, 211, 40, dtype)
    kwargs = {"alpha_0": 0.4, **head}
    if "bias" in head:
        kwargs["bias"] = torch.randn(211, generator=torch.Generator().manual_seed(2)).to(dtype)
    if with_lse:
        kwargs["base_lse"] = reference.linear_residual_values(
            *(x.double() for x in arguments[:3]), arguments[3], **cast(kwargs, torch.float64)
        ).base_lse.float()
    compare(device, arguments, **kwargs)


@pytest.mark.parametrize("alpha_0", [1.0, 0.3, 2.5, -1.0])
@pytest.mark.parametrize("with_lse", [False, True])
def test_masked_tokens(device, alpha_0, with_lse):
    """A bias of -inf: no probability, no NaN, and the action there has log-probability -inf."""
    arguments = case(8, 70, 16)
    arguments[3][:2] = torch.tensor([3, 10])
    bias = torch.zeros(70)
    bias[5:20] = -INF
    kwargs = {"alpha_0": alpha_0, "bias": bias}
    if with_lse:
        kwargs["base_lse"] = reference.linear_residual_values(*arguments, **kwargs).base_lse
    weights = to(device, arguments)
    values = QF.linear_residual_values(*weights, **cast(kwargs, None, device))
    exact = reference.linear_residual_values(
        *(x.double() for x in arguments[:3]), arguments[3], **cast(kwargs, torch.float64)
    )
    for name in ("value", "policy_logp", "q"):
        ours, wanted = getattr(values, name).double().cpu(), getattr(exact, name)
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("hidden", DTYPES)
@pytest.mark.parametrize("weight", DTYPES)
def test_hidden_states_in_another_dtype_than_the_head(device, hidden, weight):
    base, adapter, head, actions = case(14, 133, 48)
    arguments = (base.to(hidden), adapter.to(hidden), head.to(weight), actions)
    compare(device, arguments, alpha_0=0.5)


def test_strides(device):
    base, adapter, weight, actions = case(11, 65, 24)
    wide = torch.full((11, 50), 7.0)
    wide[:, :24] = adapter
    plain = QF.linear_residual_values(*to(device, (base, adapter, weight, actions)))
    for other_adapter, other_weight in (
        (wide.to(device)[:, :24], weight.to(device)),
        (adapter.to(device).t().contiguous().t(), weight.to(device).t().contiguous().t()),
        (adapter.to(device), torch.cat([weight, weight], 1).to(device)[:, :24]),
        (adapter.to(device), weight.repeat_interleave(2, 0).to(device)[::2]),
    ):
        strided = QF.linear_residual_values(
            base.to(device), other_adapter, other_weight, actions.to(device)
        )
        for ours, wanted in zip(strided, plain, strict=True):
            torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("kwargs", [{}, {"alpha_0": 0.3}, {"alpha_0": 0.3, "lse": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_broken_row_poisons_itself_alone(device, kwargs, dtype):
    arguments = to(device, case(9, 150, 32, dtype))
    kwargs = dict(kwargs)
    if kwargs.pop("lse", False):
        kwargs["base_lse"] = QF.linear_residual_values(*arguments).base_lse
    good = evaluate(QF.linear_residual_values, *arguments, torch.ones(3, 9).to(device), **kwargs)
    arguments[1] = arguments[1].clone()
    arguments[1][3, 7] = float("nan")
    bad = evaluate(QF.linear_residual_values, *arguments, torch.ones(3, 9).to(device), **kwargs)
    others = [i for i in range(9) if i != 3]
    for name, a, b in zip(NAMES, good, bad, strict=True):
        assert torch.equal(a[others], b[others]), name
    for name in (0, 1, 3):
        assert bad[name][3].isnan(), NAMES[name]
    assert bad[5][3].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [5, 513, 4097])
def test_the_start_is_exactly_zero(device, dtype, vocab):
    _, hidden, weight, actions = to(device, case(40, vocab, 64, dtype))
    values = QF.linear_residual_values(hidden, hidden, weight, actions)
    assert (values.q == 0).all() and (values.value == 0).all()
    known = {"base_lse": values.base_lse}
    again = QF.linear_residual_values(hidden, hidden, weight, actions, **known)
    assert (again.q == 0).all() and (again.value == 0).all()


def _bands(weight, hidden, confidence):
    """Actions that have the wanted probability, by a push of the hidden state towards W[a]."""
    actions = torch.arange(hidden.shape[0]) * 7 % weight.shape[0]
    for _ in range(200):
        p = torch.softmax(hidden @ weight.T, -1).gather(1, actions[:, None])
        hidden = hidden + 0.1 * (p < confidence) * weight[actions]
    return hidden, actions


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.9), (0.9, 0.99), (0.99, 1.0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_confident_rows(device, low, high, dtype):
    """d(V - q), where the action's column cancels: never worse than eager in the same dtype."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(3000, 64, generator=generator) * 0.3
    hidden, actions = _bands(weight, torch.randn(96, 64, generator=generator), (low + high) / 2)
    hidden, weight = hidden.to(dtype), weight.to(dtype)

    def gradient(function, hidden, weight):
        hidden = hidden.detach().requires_grad_()
        lse = torch.zeros(len(hidden), device=hidden.device)
        lse = lse.double() if hidden.dtype == torch.float64 else lse
        where = actions.to(hidden.device)
        values = function(
            None, hidden, weight, where, alpha_0=0.0, center=0.0,
            base_lse=lse, base_logp=torch.zeros_like(lse),
        )  # fmt: skip
        (grad,) = torch.autograd.grad((values.value - values.q).sum(), hidden)
        return grad.double().cpu(), values.policy_logp.exp().detach().double().cpu()

    exact, p = gradient(reference.linear_residual_values, hidden.double(), weight.double())
    eager, _ = gradient(reference.linear_residual_values, hidden, weight)
    ours, _ = gradient(QF.linear_residual_values, hidden.to(device), weight.to(device))
    chosen = (p >= low) & (p < high)
    assert chosen.sum() > 5

    def errors(grad):
        return ((grad - exact).norm(dim=1) / exact.norm(dim=1))[chosen]

    assert errors(ours).median() <= errors(eager).median()
    assert errors(ours).max() <= errors(eager).max()


@pytest.mark.parametrize("value_at", ["next", "same"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_equals_the_loss_on_logits(device, value_at, dtype):
    base, adapter, weight, actions = to(device, case(13, 97, 24, dtype))
    ends = torch.tensor([0, 2, 6, 9, 13], dtype=torch.int32, device=device)
    kwargs = {"alpha_0": 0.6, "bt_scale": 3.0, "gamma": 0.9, "value_at": value_at}
    adapter.requires_grad_()
    linear = QF.linear_qadapter_loss(base, adapter, weight, actions, ends, **kwargs)
    (ours,) = torch.autograd.grad(linear.loss * 2.0, adapter)
    logits = QF.qadapter_loss(
        base.float() @ weight.float().T, adapter.float() @ weight.float().T, actions, ends, **kwargs
    )
    (wanted,) = torch.autograd.grad(logits.loss * 2.0, adapter)
    for name, a, b in zip(linear._fields, linear, logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=name)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(ours, wanted, rtol=tolerance, atol=tolerance * wanted.abs().max())


def test_schemas_fakes_and_autograd(device):
    base, adapter, weight, actions = to(device, case(6, 37, 8))
    adapter.requires_grad_()
    ends = torch.tensor([0, 2, 6], dtype=torch.int32, device=device)
    ops = torch.ops.qadapter
    head, preference = (1.0, 0.0, 0, 0.0, True), (1.0, 0.1, 1.0, True, True)
    inputs = (base, adapter, weight, actions, None, None, None)
    opcheck(ops.linear_fwd.default, (*inputs, 0.5, 1.0, 1.0, *head))
    opcheck(ops.linear_fwd.default, (*inputs, 0.5, 1.0, 1.0, *head[:4], False),
            test_utils=("test_schema", "test_faketensor"))  # fmt: skip
    opcheck(ops.linear_loss_fwd.default, (*inputs, ends, None, 0.5, 1.0, 1.0, *head, *preference))
    rows = torch.rand(6, device=device)
    opcheck(ops.linear_bwd.default, (base, weight, actions, *[rows] * 4))


@pytest.mark.parametrize(
    ("dtype", "dynamic"), [(torch.float32, None), (torch.bfloat16, None), (torch.float32, True)]
)
def test_compiles_without_graph_breaks(device, dtype, dynamic):
    base, adapter, weight, actions = to(device, case(8, 65, 16, dtype))
    ends = torch.tensor([0, 3, 8], dtype=torch.int32, device=device)
    module = QAdapterLinearLoss(alpha_0=0.7, logit_softcap=9.0)

    def step(hidden):
        return module(base, hidden * 1.5, weight, actions, ends).loss

    eager_hidden, compiled_hidden = (adapter.clone().requires_grad_() for _ in range(2))
    eager = step(eager_hidden)
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)(compiled_hidden)
    eager.backward()
    compiled.backward()
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(compiled_hidden.grad, eager_hidden.grad)


def test_autocast_and_checkpointing(device):
    base, adapter, weight, actions = to(device, case(8, 65, 16))
    adapter.requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        mixed = QF.linear_residual_values(base, adapter, weight, actions)
    narrow = QF.linear_residual_values(
        base.bfloat16(), adapter.bfloat16(), weight.bfloat16(), actions
    )
    torch.testing.assert_close(mixed.value, narrow.value)
    (gradient,) = torch.autograd.grad(mixed.value.sum(), adapter)
    assert gradient.dtype == torch.float32

    def value(hidden):
        return QF.linear_residual_values(base, hidden, weight, actions).value.sum()

    (plain,) = torch.autograd.grad(value(adapter), adapter)
    for reentrant in (True, False):
        again = torch.utils.checkpoint.checkpoint(value, adapter, use_reentrant=reentrant)
        adapter.grad = None
        again.backward()
        torch.testing.assert_close(adapter.grad, plain)


def test_gradients_in_float64():
    base, adapter, weight, actions = case(5, 7, 3)
    ends = torch.tensor([0, 2, 5], dtype=torch.int32)
    adapter = adapter.double().requires_grad_()

    def loss(hidden):
        return QF.linear_qadapter_loss(
            base.double(), hidden, weight.double(), actions, ends, alpha_0=0.4, bt_scale=2.0,
            logit_softcap=4.0,
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, (adapter,))
    (gradient,) = torch.autograd.grad(loss(adapter), adapter, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        gradient.sum().backward()


def test_no_gradient_for_base_or_head(device):
    base, adapter, weight, actions = to(device, case(4, 9, 3))
    base.requires_grad_()
    adapter.requires_grad_()
    values = QF.linear_residual_values(base, adapter, weight, actions, alpha_0=0.5)
    assert not values.base_logp.requires_grad and not values.base_lse.requires_grad
    (values.q + values.value).sum().backward()
    assert base.grad is None and adapter.grad is not None
    weight.requires_grad_()
    with pytest.raises(ValueError, match=r"weight: requires a gradient.*weight.detach\(\)"):
        QF.linear_residual_values(base, adapter, weight, actions)
    with torch.no_grad():
        QF.linear_residual_values(base, adapter, weight, actions)


BASE, ADAPTER, WEIGHT, ACTIONS = case(4, 9, 3)
ENDS = torch.tensor([0, 2, 4], dtype=torch.int32)
GOOD = (BASE, ADAPTER, WEIGHT, ACTIONS, ENDS)
BAD_ARGUMENTS = {
    "q_hidden is 3-D": ({1: ADAPTER[None]}, {}, "q_hidden: expected a 2-D"),
    "base is wider": ({0: torch.zeros(4, 5)}, {}, "base_hidden: expected the shape"),
    "base in another dtype": ({0: BASE.half()}, {}, "base_hidden: expected the dtype"),
    "weight is transposed": ({2: WEIGHT.T}, {}, r"weight: expected \[V, 3\]"),
    "weight is empty": ({2: WEIGHT[:0]}, {}, "weight: expected"),
    "int weight": ({2: WEIGHT.int()}, {}, "weight: expected a 2-D float32"),
    "bias too short": ({}, {"bias": torch.zeros(8)}, "bias: expected 9 rows"),
    "bias trains": ({}, {"bias": torch.zeros(9, requires_grad=True)}, "bias: requires a gradient"),
    "too few actions": ({3: ACTIONS[:3]}, {}, "actions: expected 4 rows"),
    "action too large": ({3: torch.tensor([0, 1, 9, 3])}, {}, r"actions\[2\] = 9"),
    "base missing": ({0: None}, {}, "base_hidden: may only be None"),
    "base missing, m != 0": (
        {0: None}, {"base_lse": torch.zeros(4), "base_logp": torch.zeros(4), "alpha_0": 0.5},
        "alpha_0 - center = -0.5",
    ),
    "base_lse too short": ({}, {"base_lse": torch.zeros(3)}, "base_lse: expected 4 rows"),
    "base_lse of another base": ({}, {"base_lse": torch.full((4,), -50.0)}, "from another base"),
    "base_logp dtype": ({}, {"base_logp": torch.zeros(4).half()}, "base_logp"),
    "ends early": ({4: torch.tensor([0, 2, 3])}, {}, "from 0 to 3, expected"),
    "odd sequences": ({4: torch.tensor([0, 1, 2, 4])}, {}, "3 sequences"),
    "alpha_tilde 0": ({}, {"alpha_tilde": 0.0}, "alpha_tilde"),
    "softcap 0": ({}, {"logit_softcap": 0.0}, "logit_softcap: expected a number above 0"),
    "scale inf": ({}, {"logit_scale": INF}, "logit_scale: expected a finite"),
    "chunk 0": ({}, {"chunk_size": 0}, "chunk_size: expected a positive int"),
    "chunk is a float": ({}, {"chunk_size": 2.0}, "chunk_size: expected a positive int"),
    "no memory": ({}, {"memory_mib": 0}, "memory_mib: expected a number above 0"),
    "both": ({}, {"memory_mib": 1, "chunk_size": 1}, "chunk_size and memory_mib"),
    "value_at": ({}, {"value_at": "now"}, "value_at: expected one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_input_names_the_argument(device, name):
    replaced, kwargs, message = BAD_ARGUMENTS[name]
    if device.type != "cpu" and name in (
        "action too large",
        "ends early",
        "base_lse of another base",
    ):
        pytest.skip("values are not read on a GPU")
    arguments = to(device, [replaced.get(i, x) for i, x in enumerate(GOOD)])
    with pytest.raises(ValueError, match=message):
        QF.linear_qadapter_loss(*arguments, **cast(kwargs, None, device))
