"""The gradient kernel of the linear operation gives float64's numbers, in one launch.

Compiled where there is a GPU, otherwise in Triton's interpreter (interpreter.py).
"""

import pytest
import torch

from tests.kernels.interpreter import DEVICE, INTERPRETED, ON_GPU, run_interpreted

pytest.importorskip("triton", reason="Triton is not installed")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 2.0**-23

if not (INTERPRETED or ON_GPU):

    def test_in_the_interpreter():
        run_interpreted(__file__)

else:
    import qadapter
    from qadapter import functional as QF
    from qadapter.kernels import linear_bwd as linear_bwd_module
    from qadapter.ops import linear_torch
    from qadapter.ops.triton import linear_bwd

    pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def make(num_rows, dim, vocab, dtype, weight_dtype=None):
    """The arguments; the first of several rows has no action."""
    generator = torch.Generator().manual_seed(num_rows + dim)
    u, weight = (torch.randn(n, dim, generator=generator) for n in (num_rows, vocab))
    actions = torch.randint(0, vocab, (num_rows,), generator=generator)
    if num_rows > 1:
        actions[0] = -100
    rows = torch.randn(4, num_rows, generator=generator)
    arguments = [u.to(dtype), weight.to(weight_dtype or dtype), actions, *rows]
    return [x.to(DEVICE) for x in arguments]


def exact(arguments):
    u, weight, actions, p, slope, coef_p, coef_a = arguments
    u, weight, p, slope, coef_p, coef_a = (
        x.double() for x in (u, weight, p, slope, coef_p, coef_a)
    )
    of_action = torch.where(actions == -100, 0, (coef_p * p + coef_a) * slope)
    terms = coef_p[:, None] * u, of_action[:, None] * weight[actions.clamp(min=0)]
    return sum(terms), terms[0].abs() + terms[1].abs()


def check(arguments):
    grad = linear_bwd(*arguments)
    want, size = exact(arguments)
    u = arguments[0]
    assert grad.dtype == u.dtype and grad.shape == u.shape and grad.is_contiguous()
    # The interpreter truncates to bfloat16.
    half = 1.01 if INTERPRETED and u.dtype == torch.bfloat16 else 0.51
    tolerance = 8 * EPS * size + half * torch.finfo(u.dtype).eps * want.abs()
    tolerance += torch.finfo(u.dtype).smallest_normal * torch.finfo(u.dtype).eps
    assert ((grad.double() - want).abs() <= tolerance).all()
    return grad


if INTERPRETED or ON_GPU:

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_against_float64(dtype):
        for shape in ((1, 1, 1), (3, 7, 3), (4, 33, 50), (5, 1024, 9), (2, 2500, 4)):
            check(make(*shape, dtype))
        for weight_dtype in DTYPES:
            check(make(3, 40, 9, dtype, weight_dtype))
        assert linear_bwd(*make(0, 5, 3, dtype)).shape == (0, 5)

    def test_rows_anywhere():
        arguments = make(4, 17, 9, torch.float32)
        want = linear_bwd(*arguments)
        for index in (0, 1):
            wide = torch.full((len(arguments[index]), 25), float("nan"), device=DEVICE)
            wide[:, 3:20] = arguments[index]
            arguments[index] = wide[:, 3:20]
        arguments[2] = torch.cat([arguments[2][:1], arguments[2]])[1:]  # 8 bytes off a boundary
        assert torch.equal(linear_bwd(*arguments), want)

    def test_no_action_reads_no_row_and_a_wrong_one_stays_inside():
        arguments = make(5, 12, 6, torch.float32)
        arguments[1][0] = float("nan")
        arguments[2][:] = torch.tensor([-100, 1, 2**40, -7, 5], device=DEVICE)
        arguments[3][2:4] = float("nan")  # what the forward leaves for such actions
        grad = linear_bwd(*arguments)
        assert grad.isnan().any(1).tolist() == [False, False, True, True, False]
        assert grad.isnan().all(1).tolist() == [False, False, True, True, False]

    def test_one_launch(monkeypatch):
        launches = []
        kernel = linear_bwd_module.linear_bwd_kernel

        class Counting:
            def __getitem__(self, grid):
                launches.append(grid)
                return kernel[grid]

        monkeypatch.setattr(linear_bwd_module, "linear_bwd_kernel", Counting())
        check(make(37, 20, 50, torch.bfloat16))
        assert launches == [(37,)]

    def test_the_gradient_of_the_operation():
        """By autograd, on Triton and on torch, in whichever backend the backward runs."""
        base, q, weight = (torch.randn(n, 24, device=DEVICE) for n in (6, 6, 70))
        actions = torch.tensor([1, 5, -100, 69, 0, 7], device=DEVICE)
        gradients = []
        for name in ("torch", "triton"):
            leaf = q.clone().requires_grad_()
            with qadapter.use_backend(name):
                values = QF.linear_residual_values(base, leaf, weight, actions, alpha_0=0.4)
                (values.q + 0.3 * values.value - 0.2 * values.policy_logp).sum().backward()
            gradients.append(leaf.grad)
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)

    def test_torch_needs_few_launches_too_where_launches_count():
        """N = 8192, D = 4096, on a device that computes nothing."""
        from torch.utils._python_dispatch import TorchDispatchMode

        class Count(TorchDispatchMode):
            calls = 0

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                views = ("slice", "unsqueeze", "empty_like", "select", "alias")
                self.calls += func.overloadpacket.__name__ not in views
                return func(*args, **(kwargs or {}))

        row = torch.empty(8192, device="meta")
        u = torch.empty(8192, 4096, dtype=torch.bfloat16, device="meta")
        weight = torch.empty(32, 4096, dtype=torch.bfloat16, device="meta")
        actions = torch.empty(8192, dtype=torch.int64, device="meta")
        with Count() as count:
            linear_torch.linear_bwd(u, weight, actions, *[row] * 4)
        assert count.calls <= 24
