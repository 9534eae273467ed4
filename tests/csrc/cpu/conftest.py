"""The instruction sets that the C++ kernels are compiled for."""

import pytest


@pytest.fixture(params=["avx512", "avx2", "plain"])
def isa(request, monkeypatch):
    """The C++ kernels' vector code; skips what this CPU does not have."""
    from qadapter.ops import cpp

    monkeypatch.setenv("QADAPTER_CPU_CAPABILITY", request.param)
    if cpp.capability() != request.param:
        pytest.skip(f"this CPU has no {request.param}")
    return request.param
