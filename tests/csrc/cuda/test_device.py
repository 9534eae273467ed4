"""A GPU that is there runs the CUDA kernels; without one a skip says that only a host ran them."""

import pytest
import torch

import qadapter
from qadapter import functional as QF
from tests.csrc.cuda.conftest import GPU, GPU_STATE


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason=f"the CUDA kernels ran on a host only: {GPU_STATE}")
def test_the_backend_runs_on_the_gpu():
    base, q = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))
    actions = torch.tensor([4, -100, 49])
    want = QF.residual_values(base.double(), q.double(), actions)
    with qadapter.use_backend("cuda"):
        got = QF.residual_values(base.cuda(), q.cuda(), actions.cuda())
    for ours, exact in zip(got, want, strict=True):
        assert ours.is_cuda
        torch.testing.assert_close(ours.cpu(), exact.float(), rtol=1e-5, atol=1e-5)
