"""The instruction sets that the C++ kernels are compiled for, as far as this CPU has them."""

import pytest

from qadapter.ops import cpp

# QADAPTER_CPU_CAPABILITY in the environment of the tests keeps them to it and what is below.
HAS_CPP = cpp.available()[0]
SETS = cpp.CAPABILITIES[cpp.isa() :: -1] if HAS_CPP else ()
# What kernels without products differ in.
VECTOR_CODE = tuple(name for name in SETS if name in cpp.CAPABILITIES[:3])


@pytest.fixture(params=VECTOR_CODE)
def isa(request, monkeypatch):
    """The vector code that the C++ kernels take."""
    monkeypatch.setenv("QADAPTER_CPU_CAPABILITY", request.param)
    return request.param


@pytest.fixture(params=SETS)
def product_isa(request, monkeypatch):
    """As `isa`, for matrix products, which bfloat16 has instructions of its own for."""
    monkeypatch.setenv("QADAPTER_CPU_CAPABILITY", request.param)
    return request.param
