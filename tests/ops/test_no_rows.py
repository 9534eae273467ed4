"""A batch without rows: empty results and an empty gradient, whatever the strides of the view."""

import pytest
import torch

import qadapter
from qadapter import functional as QF
from qadapter import reference

LIVE = [info for info in qadapter.backends() if info.available]
BACKENDS = [
    pytest.param((i.name, device), id=f"{i.name}-{device}") for i in LIVE for device in i.devices
]
WIDTH = 6
# A view without rows counts as contiguous, so that contiguous() leaves its strides as they are.
VIEWS = {
    "plain": lambda **k: torch.empty(0, WIDTH, **k),
    "every second column": lambda **k: torch.empty(4, 2 * WIDTH, **k)[:0, ::2],
    "transposed": lambda **k: torch.empty(WIDTH, 4, **k).t()[:0],
    "expanded": lambda **k: torch.empty(4, 1, **k).expand(4, WIDTH)[:0],
}


@pytest.fixture(params=BACKENDS)
def device(request):
    name, device = request.param
    if name == "triton" and device == "cpu":
        pytest.skip("the interpreter has test modules of its own")
    with qadapter.use_backend(name):
        yield torch.device(device)


@pytest.fixture(params=VIEWS)
def rows(request, device):
    """Of logits or hidden states, and as many actions: none."""
    make = VIEWS[request.param]
    actions = torch.empty(8, dtype=torch.int64, device=device)[::2][:0]
    return make(device=device), make(device=device).requires_grad_(), actions


def check_values(values, q):
    assert [tuple(value.shape) for value in values] == [(0,)] * 5
    sum(value.sum() for value in (values.q, values.value, values.policy_logp)).backward()
    assert q.grad.shape == q.shape


@pytest.mark.parametrize("alpha_0", [0.5, 1.0])
def test_values(rows, alpha_0):
    base, q, actions = rows
    check_values(QF.residual_values(base, q, actions, alpha_0=alpha_0), q)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("alpha_0", [0.5, 1.0])
def test_values_of_hidden_states(rows, alpha_0, known):
    base, q, actions = rows
    head = torch.randn(5, WIDTH, device=q.device)
    given = {"base_lse": torch.empty(0, device=q.device)} if known else {}
    check_values(QF.linear_residual_values(base, q, head, actions, alpha_0=alpha_0, **given), q)


@pytest.mark.parametrize("pairs", [0, 1, 2])
@pytest.mark.parametrize("linear", [False, True])
def test_losses(rows, pairs, linear):
    base, q, actions = rows
    cu_seqlens = torch.zeros(2 * pairs + 1, dtype=torch.int32, device=q.device)
    head = [torch.randn(5, WIDTH, device=q.device)] if linear else []
    function = QF.linear_qadapter_loss if linear else QF.qadapter_loss
    loss = function(base, q, *head, actions, cu_seqlens)
    loss.loss.backward()
    assert q.grad.shape == q.shape
    expected = reference.qadapter_loss(
        torch.empty(0, 5), torch.empty(0, 5), actions.cpu(), cu_seqlens.cpu()
    )
    # Pairs of empty responses have margin 0 and so log 2 each; no pairs have no loss.
    torch.testing.assert_close(loss.loss.detach().cpu(), expected.loss)
    assert loss.margins.tolist() == [0.0] * pairs


def test_values_to_the_loss(rows):
    base, q, actions = rows
    values = QF.residual_values(base, q, actions)
    cu_seqlens = torch.zeros(3, dtype=torch.int64, device=q.device)
    QF.preference_loss(values, actions, cu_seqlens).loss.backward()
    assert q.grad.shape == q.shape


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 2, "top_p": 0.5}])
def test_samples(rows, options):
    base, q, _ = rows
    drawn = QF.sample(base, q, seed=0, **options)
    assert drawn.tokens.shape == drawn.logprobs.shape == (0,)
    assert drawn.tokens.dtype == torch.int64


def test_a_view_with_rows_is_read_by_its_strides(device):
    """The other side of the same branch: every second column, with rows."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(2, 3, 2 * WIDTH, generator=generator).to(device)
    base, q = wide[0, :, ::2], wide[1, :, ::2]
    actions = torch.tensor([1, 4, 0], device=device)
    strided = QF.residual_values(base, q, actions)
    packed = QF.residual_values(base.contiguous(), q.contiguous(), actions)
    for ours, theirs in zip(strided, packed, strict=True):
        assert torch.equal(ours, theirs)
