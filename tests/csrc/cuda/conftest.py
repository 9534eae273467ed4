"""Where the CUDA kernels run: compiled for a host (`host_build`), and on a GPU if there is one."""

import pytest
import torch

from qadapter.ops import cuda
from tests.csrc.cuda import host_build
from tests.made_once import made_once

GPU, GPU_STATE = cuda.available()


@pytest.fixture(scope="session")
def host_operations(tmp_path_factory):
    if (reason := host_build.why_not()) is not None:
        pytest.skip(reason)
    return host_build.load(made_once(tmp_path_factory, "cuda_host.so", host_build.build))


@pytest.fixture
def host(monkeypatch, host_operations):
    monkeypatch.setattr(cuda, "extension", lambda: host_operations)
    return torch.device("cpu")


@pytest.fixture(params=["host", "cuda"] if GPU else ["host"])
def cuda_device(request):
    return torch.device("cuda") if request.param == "cuda" else request.getfixturevalue("host")
