"""The backends that run here, each on its devices."""

import pytest
import torch

import qadapter

LIVE = [info for info in qadapter.backends() if info.available]
BACKENDS = [
    pytest.param((info.name, device), id=f"{info.name}-{device}")
    for info in LIVE
    for device in info.devices
    if (info.name, device) != ("triton", "cpu")  # the interpreter: tests/kernels
]


@pytest.fixture(params=BACKENDS)
def device(request):
    name, device = request.param
    with qadapter.use_backend(name):
        yield torch.device(device)
