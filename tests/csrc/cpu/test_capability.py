"""Each instruction set is taken when it is asked for; the skips say which were not tested here."""

import pytest

from qadapter.ops import cpp
from tests.csrc.cpu.conftest import BEST, VECTOR_CODE

if not cpp.available()[0]:
    pytest.skip(cpp.available()[1], allow_module_level=True)


@pytest.mark.parametrize("name", cpp.CAPABILITIES)
def test_vector_code(name, monkeypatch):
    monkeypatch.setenv("QADAPTER_CPU_CAPABILITY", name)
    if name not in VECTOR_CODE:
        pytest.skip(f"this CPU has no {name}, or the environment forbids it: not tested here")
    assert cpp.capability() == name and cpp.available() == (True, f"vector code: {name}")
    assert cpp.product_isa() == cpp.isa() == cpp.CAPABILITIES.index(name)


def test_bfloat16_dot_products(monkeypatch):
    if not (BEST and cpp.extension().has_bf16_dot()):
        pytest.skip("this CPU has no AVX512_BF16, or the environment forbids it: not tested here")
    monkeypatch.delenv("QADAPTER_CPU_CAPABILITY", raising=False)
    assert cpp.product_isa() == -1 and cpp.capability() == "avx512"


def test_the_best_is_taken_and_never_more_than_there_is(monkeypatch):
    monkeypatch.delenv("QADAPTER_CPU_CAPABILITY", raising=False)
    assert cpp.isa() == cpp.extension().best_isa()
    for best in range(len(cpp.CAPABILITIES)):
        monkeypatch.setattr(cpp, "_best", lambda best=best: best)
        monkeypatch.setenv("QADAPTER_CPU_CAPABILITY", "avx512")
        assert cpp.capability() == cpp.CAPABILITIES[best]
    monkeypatch.setenv("QADAPTER_CPU_CAPABILITY", "sse9")
    with pytest.raises(ValueError, match="expected one of plain, avx2, avx512, got 'sse9'"):
        cpp.isa()
