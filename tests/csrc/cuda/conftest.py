"""Where the CUDA kernels run: on a host, and on a GPU where there is one."""

import pytest
import torch

from qadapter.ops import cuda
from tests.csrc.cuda import host_build


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def cuda_device(request, monkeypatch):
    """Where the CUDA C++ kernels run: compiled for a host (`host_build`), and on a GPU."""
    if request.param == "cuda":
        usable, reason = cuda.available()
        if not usable:
            pytest.skip(reason)
        return torch.device("cuda")
    if (reason := host_build.why_not()) is not None:
        pytest.skip(reason)
    monkeypatch.setattr(cuda, "extension", host_build.load)
    return torch.device("cpu")
