"""The CUDA kernels' residual values and gradients are float64's, on a host and on a GPU.

On a host, where every GPU thread is a fiber (emulator.h): this runs everywhere and
checks all but the hardware. And on a GPU, where there is one.

Tolerance: twice the error that the torch backend makes in float32 on the same inputs, plus a few
float32 roundings of the largest result; for gradients one rounding to their dtype.
"""

import itertools

import pytest
import torch

from qadapter.ops import cuda, residual_torch

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COMPOSITIONS = list(itertools.product([0.0, 0.01, 1.0], [0.1, 10.0], [0.0, 1.0]))
NAMES = ("q", "value", "base_logp", "policy_logp", "base_lse", "shift", "log_sum")


def make(rows, vocab, dtype, *, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, vocab, generator=generator) * scale
    q = base + torch.randn(rows, vocab, generator=generator)
    actions = torch.randint(0, vocab, (rows,), generator=generator)
    if rows > 1:
        actions[rows // 2] = -100
    return base.to(dtype), q.to(dtype), actions


def placed(logits, cuda_device, offset=0, gap=0):
    """A copy of the rows, `offset` elements behind a boundary, with NaN all around them."""
    rows, vocab = logits.shape
    buffer = torch.full((offset + rows * (vocab + gap) + 16,), NAN, dtype=logits.dtype)
    view = buffer.to(cuda_device)[offset:].as_strided((rows, vocab), (vocab + gap, 1), offset)
    view.copy_(logits)
    return view


def agree(ours, exact, eager, dtype=torch.float32):
    for name, a, b, c in zip(NAMES, ours, exact, eager, strict=False):
        a = a.double().cpu()
        if name == "shift":  # of a poisoned row it means nothing
            whole = ~exact[6].isnan()
            a, b, c = a[whole], b[whole], c[whole]
        assert torch.equal(a.isnan(), b.isnan()), name
        infinite = b.isinf()
        assert torch.equal(a[infinite], b[infinite]), name
        finite = b.isfinite()
        if finite.any():
            size = b[finite].abs().max().item()
            baseline = (c.double() - b)[finite].abs().max().nan_to_num(0.0).item()
            error = (a - b)[finite].abs().max().item()
            assert error <= 2 * baseline + 4 * torch.finfo(dtype).eps * size + 1e-7, (name, error)


def check(cuda_device, base, q, actions, composition, *, cached=False, splits=0, layout=(0, 0, 0)):
    """Forward and backward, with the statistics that the forward itself has found."""
    rows, dtype = len(actions), q.dtype
    offset, base_offset, gap = layout
    wide = [None if t is None else t.double() for t in (base, q)]
    lse = logp = None
    if cached:
        lse = wide[0].logsumexp(-1).float()
        logp = (wide[0].gather(1, actions.clamp(min=0)[:, None])[:, 0] - lse).float()
    exact = residual_torch.residual_fwd(
        *wide, actions, *(None if t is None else t.double() for t in (lse, logp)), *composition
    )
    eager = residual_torch.residual_fwd(base, q, actions, lse, logp, *composition)
    ours_base = None if base is None else placed(base, cuda_device, base_offset, gap)
    ours_q = placed(q, cuda_device, offset, gap)
    known = [None if t is None else t.to(cuda_device) for t in (lse, logp)]
    here = actions.to(cuda_device)
    ours = cuda.residual_fwd(ours_base, ours_q, here, *known, *composition, splits=splits)
    agree(ours, exact, eager)

    coefs = torch.randn(2, rows, generator=torch.Generator().manual_seed(7))
    coefs[0, -1] = 0.0
    sums = [t.cpu() for t in ours[5:]]
    on_rows = (*sums, *coefs)
    want = residual_torch.residual_bwd(*wide, actions, *(t.double() for t in on_rows), *composition)
    plain = residual_torch.residual_bwd(base, q, actions, *on_rows, *composition)
    got = cuda.residual_bwd(
        ours_base, ours_q, here, *(t.to(cuda_device) for t in on_rows), *composition
    )
    assert got.dtype == dtype and got.is_contiguous()
    agree([got], [want], [plain], dtype)
    return ours, got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 1), (4, 7), (5, 130), (3, 1000), (2, 4099), (1, 50257)])
def test_small_shapes(cuda_device, shape, dtype):
    check(cuda_device, *make(*shape, dtype), (0.5, 0.7, 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cached", [False, True], ids=["", "cached"])
@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_small_compositions(cuda_device, composition, cached, dtype):
    check(cuda_device, *make(4, 517, dtype), composition, cached=cached)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [(1, 1, 0), (3, 3, 5), (0, 1, 3), (5, 0, 8), (0, 0, 16)])
def test_small_layouts(cuda_device, layout, dtype):
    """Rows off 16-byte boundaries, together and against each other; gaps between the rows."""
    check(cuda_device, *make(5, 1031, dtype), (0.5, 1.0, 1.0), layout=layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 2, 3, 40])
def test_small_splits(cuda_device, splits, dtype):
    for layout in ((0, 0, 0), (1, 1, 3), (0, 1, 0)):
        check(cuda_device, *make(2, 17001, dtype), (0.5, 1.0, 1.0), splits=splits, layout=layout)


def test_large_logits_keep_their_digits(cuda_device):
    check(cuda_device, *make(4, 1003, torch.float32, scale=1e4), (0.5, 0.1, 1.0))


def test_rows_without_base_logits(cuda_device):
    base, q, actions = make(5, 300, torch.bfloat16)
    lse = base.double().logsumexp(-1).float()
    logp = (base.double().gather(1, actions.clamp(min=0)[:, None])[:, 0] - lse).float()
    composition = (1.0, 0.7, 1.0)
    known = (actions, lse, logp)
    want = residual_torch.residual_fwd(
        None, q.double(), actions, lse.double(), logp.double(), *composition
    )
    eager = residual_torch.residual_fwd(None, q, *known, *composition)
    ours = cuda.residual_fwd(
        None, q.to(cuda_device), *(t.to(cuda_device) for t in known), *composition
    )
    agree(ours, want, eager)
    with pytest.raises(RuntimeError, match="base_logits may be missing only"):
        cuda.residual_fwd(
            None, q.to(cuda_device), *(t.to(cuda_device) for t in known), 0.5, 0.7, 1.0
        )


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_streams_cancel_exactly(cuda_device, dtype, splits):
    base, _, actions = make(3, 12345, dtype)
    for layout in ((0, 0), (1, 1), (0, 1)):
        streams = [placed(base, cuda_device, offset) for offset in layout]
        ours = cuda.residual_fwd(
            *streams, actions.to(cuda_device), None, None, 1.0, 1.0, 1.0, splits=splits
        )
        assert (ours[0] == 0).all() and (ours[1] == 0).all(), layout


@pytest.mark.parametrize("composition", [(1.0, 1.0, 1.0), (0.5, 1.0, 1.0), (1.0, 0.5, 0.0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_tokens_and_poison(cuda_device, dtype, composition):
    base, q, actions = make(9, 700, dtype)
    base[:, 100:200] = -INF
    q[:, 150:250] = -INF
    actions = torch.tensor([0, 160, 120, 220, 699, -100, 3, 5, 7])
    q[4], q[5, 650], q[6, 1] = -INF, NAN, INF
    base[7, 3] = NAN
    check(cuda_device, base, q, actions, composition)
    actions[8], actions[0] = 700, -3
    ours = cuda.residual_fwd(
        base.to(cuda_device), q.to(cuda_device), actions.to(cuda_device), None, None, *composition
    )
    for row in (0, 8):
        assert all(ours[i][row].isnan() for i in range(4)), "an action out of range"
    assert ours[4][0].isfinite()


def test_no_rows(cuda_device):
    base, q, actions = (t[:0].to(cuda_device) for t in make(2, 9, torch.float32))
    ours = cuda.residual_fwd(base, q, actions, None, None, 1.0, 1.0, 1.0)
    assert all(t.shape == (0,) for t in ours)
    grad = cuda.residual_bwd(base, q, actions, *ours[:4], 1.0, 1.0, 1.0)
    assert grad.shape == (0, 9)


def test_the_order_of_threads_does_not_matter(host, monkeypatch):
    """A missing barrier would show; on a GPU this is compute-sanitizer's task."""
    found = []
    for order in ("0", "1", "5", "6"):
        monkeypatch.setenv("QADAPTER_EMULATOR_ORDER", order)
        found.append(check(host, *make(3, 5003, torch.bfloat16), (0.5, 1.0, 1.0), splits=2))
    for ours, grad in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ours, found[0][0], strict=True))
        assert torch.equal(grad, found[0][1])


def test_wrong_arguments_are_refused(cuda_device):
    base, q, actions = (t.to(cuda_device) for t in make(3, 40, torch.float32))
    for wrong in (base[:2], base[:, :39], base.half(), base.t().contiguous().t()):
        with pytest.raises(RuntimeError, match="qadapter: expected"):
            cuda.residual_fwd(wrong, q, actions, None, None, 1.0, 1.0, 1.0)
    with pytest.raises(RuntimeError, match="qadapter: expected"):
        cuda.residual_fwd(base, q, actions.int(), None, None, 1.0, 1.0, 1.0)
