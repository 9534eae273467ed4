"""The Triton loss over sequences gives the float64 specification's values and gradients.

Compiled where there is a GPU, otherwise in Triton's interpreter (interpreter.py).
"""

import pytest
import torch

from tests.kernels.interpreter import DEVICE, INTERPRETED, ON_GPU, run_interpreted
from tests.kernels.nearness import assert_near

pytest.importorskip("triton", reason="Triton is not installed")

if not (INTERPRETED or ON_GPU):

    def test_in_the_interpreter():
        run_interpreted(__file__)

else:
    from qadapter import reference
    from qadapter.kernels import preference as preference_module
    from qadapter.kernels.preference import preference_fwd

    pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def make_sequences(lengths, seed=0):
    """q, value, actions (a fifth of them -100) and cu_seqlens for these lengths."""
    generator = torch.Generator().manual_seed(seed)
    num_rows = sum(lengths)
    q, value = torch.randn(2, num_rows, generator=generator).to(DEVICE)
    actions = torch.randint(0, 9, (num_rows,), generator=generator)
    actions[torch.rand(num_rows, generator=generator) < 0.2] = -100
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    return q, value, actions.to(DEVICE), cu.to(DEVICE)


def specified_preference(q, value, actions, cu, dtype, denominators, options):
    gamma, reg_coef, bt_scale, value_next, length_mean = options
    q, value = (t.to(dtype).requires_grad_() for t in (q, value))
    out = reference.preference_loss(
        reference.ResidualValues(q, value, q, q, q),
        actions,
        cu,
        gamma=gamma,
        reg_coef=reg_coef,
        bt_scale=bt_scale,
        value_at="next" if value_next else "same",
        length_norm="response" if length_mean else "none",
        denominators=denominators,
    )
    if not out.loss.requires_grad:
        return [*out, torch.zeros_like(q), torch.zeros_like(value)]
    gradients = torch.autograd.grad(out.loss, (q, value), allow_unused=True)
    return [
        out.loss.detach(),
        *out[1:],
        *(torch.zeros_like(q) if g is None else g for g in gradients),
    ]


if INTERPRETED or ON_GPU:

    @pytest.mark.parametrize("length_mean", [True, False])
    @pytest.mark.parametrize("value_next", [True, False])
    @pytest.mark.parametrize(
        "lengths",
        [[], [1, 1], [3, 0, 2, 7], [0, 0], [40, 64, 300, 65], [2, 3] * 15],
        ids=["none", "one", "empty", "nothing", "long", "many"],
    )
    def test_preference(lengths, value_next, length_mean, monkeypatch):
        if len(lengths) == 30:  # more pairs than a block has; the others fit one
            monkeypatch.setattr(preference_module, "BLOCK", 8)
        elif sum(lengths) > 64:
            monkeypatch.setattr(preference_module, "BLOCK", 64)
        q, value, actions, cu = make_sequences(lengths)
        given = torch.tensor([7.0, 0.5], device=DEVICE)
        for denominators, scale, cu_dtype in ((None, 1.0, torch.int32), (given, 6.0, torch.int64)):
            options = (0.9, 0.3, scale, value_next, length_mean)
            got = preference_fwd(q, value, actions, cu.to(cu_dtype), denominators, *options)
            arguments = (q, value, actions, cu)
            exact = specified_preference(*arguments, torch.float64, denominators, options)
            eager = specified_preference(*arguments, torch.float32, denominators, options)
            assert all(t.dtype == torch.float32 for t in got)
            assert [t.shape for t in got] == [t.shape for t in exact]
            for index, triple in enumerate(zip(got, exact, eager, strict=True)):
                assert_near(*triple, f"output {index}")
            again = preference_fwd(q, value, actions, cu.to(cu_dtype), denominators, *options)
            assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))

    def test_preference_without_actions_and_far_margins():
        q, value, actions, cu = make_sequences([4, 4, 4, 4])
        options = (1.0, 0.1, 1.0, True, True)
        none = preference_fwd(q, value, torch.full_like(actions, -100), cu, None, *options)
        torch.testing.assert_close(none[0].item(), 0.6931472)
        assert not none[7].any()
        assert not none[8].any()
        q[:4] += 500.0
        q[4:8] -= 500.0
        options = (0.0, 0.0, 1.0, True, False)
        got = preference_fwd(q, value, actions, cu, None, *options)
        assert_near(
            got[0],
            specified_preference(q, value, actions, cu, torch.float64, None, options)[0],
            specified_preference(q, value, actions, cu, torch.float32, None, options)[0],
            "loss",
        )

    @pytest.mark.parametrize(
        "cu",
        [
            [0],
            [1, 3, 5],
            [0, 4, 3],
            [0, 3, 4],
            [0, 3, 6],
            [0, -5, 5],
            [-3, 2, 5],
            [0, 2**31 - 1, 5],
        ],
        ids=str,
    )
    def test_invalid_cu_seqlens_poison_everything(cu):
        q, value, actions, _ = make_sequences([5])
        for dtype in (torch.int32, torch.int64):
            bounds = torch.tensor(cu, dtype=dtype, device=DEVICE)
            for result in preference_fwd(
                q, value, actions, bounds, None, 1.0, 0.1, 1.0, True, True
            ):
                assert result.isnan().all()

    def test_poisoned_sequence_leaves_other_pairs_alone():
        q, value, actions, cu = make_sequences([3, 3, 3, 3])
        actions[:] = 1
        q[4] = float("nan")  # the second pair's chosen
        out = preference_fwd(q, value, actions, cu, None, 1.0, 0.1, 1.0, True, True)
        assert out[0].isnan()
        assert out[5].isnan().tolist() == [False, True]
        assert out[7][:3].isfinite().all()
        assert out[7][3:6].isnan().all()
