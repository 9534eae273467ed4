"""Each instruction set is taken when it is asked for; the skips say which were not tested here."""

import pytest

from qadapter.ops import cpp
from tests.csrc.cpu.conftest import SETS

if not cpp.available()[0]:
    pytest.skip(cpp.available()[1], allow_module_level=True)


@pytest.mark.parametrize("name", cpp.CAPABILITIES)
def test_each_set_can_be_forced(name, monkeypatch):
    monkeypatch.setenv("QADAPTER_CPU_CAPABILITY", name)
    if name not in SETS:
        pytest.skip(f"this CPU has no {name}, or the environment forbids it: not tested here")
    assert cpp.capability() == name and cpp.available() == (True, f"vector code: {name}")
    assert cpp.isa() == cpp.CAPABILITIES.index(name)


def test_the_best_is_taken_and_never_more_than_there_is(monkeypatch):
    monkeypatch.delenv("QADAPTER_CPU_CAPABILITY", raising=False)
    assert cpp.isa() == cpp.extension().best_isa()
    for best in range(len(cpp.CAPABILITIES)):
        monkeypatch.setattr(cpp, "_best", lambda best=best: best)
        monkeypatch.setenv("QADAPTER_CPU_CAPABILITY", cpp.CAPABILITIES[-1])
        assert cpp.capability() == cpp.CAPABILITIES[best]
    monkeypatch.setenv("QADAPTER_CPU_CAPABILITY", "sse9")
    with pytest.raises(ValueError, match=r"expected one of \w+, avx2, .*amx, got 'sse9'"):
        cpp.isa()
