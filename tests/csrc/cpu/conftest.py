"""The instruction sets that the C++ kernels are compiled for, as far as this CPU has them."""

import pytest

from qadapter.ops import cpp

# QADAPTER_CPU_CAPABILITY in the environment of the tests keeps them to it and what is below.
HAS_CPP = cpp.available()[0]
VECTOR_CODE = cpp.CAPABILITIES[cpp.isa() :: -1] if HAS_CPP else ()


@pytest.fixture(params=VECTOR_CODE)
def isa(request, monkeypatch):
    """The vector code that the C++ kernels take."""
    monkeypatch.setenv("QADAPTER_CPU_CAPABILITY", request.param)
    return request.param


# What runs where nothing is forced: products take dot products of bfloat16, where there are any.
BEST = ("best",) if HAS_CPP and cpp.product_isa() < 0 else ()


@pytest.fixture(params=BEST + VECTOR_CODE)
def product_isa(request, monkeypatch):
    """As `isa`, for matrix products."""
    if request.param == "best":
        monkeypatch.delenv("QADAPTER_CPU_CAPABILITY", raising=False)
    else:
        monkeypatch.setenv("QADAPTER_CPU_CAPABILITY", request.param)
    return request.param
