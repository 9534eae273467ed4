"""A micro-step puts nothing on the device from ordinary memory of the host: that would wait for it.

The meta device stands in for a GPU: it computes nothing, but what is copied to it is seen.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from qadapter.outputs import AnchoredValues, PreferenceLoss, ResidualValues
from qadapter.training import metrics, processes
from qadapter.training.trainer import QAdapterTrainer

META = torch.device("meta")


class _Copies(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            assert source.device == result.device, f"{name}: from {source.device}"
        return result


class _Numbers(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor):
            assert result.device.type == "cpu", f"{func.__name__}: from the host's numbers"
        return result


@contextlib.contextmanager
def no_copies():
    """An error for numbers and tensors of the host's that go to another device."""
    with _Copies(), _Numbers():
        yield


def test_the_stand_in_sees_copies():
    for copy in (lambda: torch.tensor(1.0, device=META), lambda: torch.arange(3).to(META)):
        with pytest.raises(AssertionError, match="from"), no_copies():
            copy()
    with no_copies():
        torch.full((), 1.0, device=META)


@pytest.mark.parametrize("totals", [False, True])
def test_metrics_of_a_batch(totals):
    rows, pairs = 20, 3
    row, pair = torch.empty(rows, device=META), torch.empty(pairs, device=META)
    values = ResidualValues(*[row] * len(ResidualValues._fields))
    outputs = PreferenceLoss(*[pair] * len(PreferenceLoss._fields))
    inputs = {
        "actions": torch.empty(rows, dtype=torch.int64, device=META),
        "cu_seqlens": torch.empty(2 * pairs + 1, dtype=torch.int32, device=META),
    }
    if totals:
        inputs["denominators"] = torch.empty(2, dtype=torch.int64, device=META)
    with no_copies():
        sums = metrics.batch_sums(inputs, values, outputs, row[:5])
        chosen = metrics.spread(rows, 5, META)
    assert chosen.device == META and chosen.shape == (5,)
    assert all(count.device == META for _, count in sums.values())


def test_the_loss_of_anchors():
    recorded = {}
    trainer = SimpleNamespace(
        anchor_control=SimpleNamespace(coef=0.5), _record=lambda _, sums: recorded.update(sums)
    )
    made = AnchoredValues(*[None] * len(AnchoredValues._fields))
    made = made._replace(anchor_kl=torch.empty(7, device=META))
    inputs = {"anchors": {"total": torch.empty((), dtype=torch.int64, device=META)}}
    with no_copies():
        loss = QAdapterTrainer._anchor_loss(trainer, made, inputs)
    assert loss.device == META and recorded


def test_rows_are_spread_from_the_first_to_the_last():
    cpu = torch.device("cpu")
    assert metrics.spread(3, 5, cpu).tolist() == metrics.spread(3, None, cpu).tolist() == [0, 1, 2]
    rows = metrics.spread(1001, 32, cpu).tolist()
    assert len(rows) == 32 and rows[0] == 0 and rows[-1] == 1000 and rows == sorted(set(rows))


def test_totals_arrive_as_they_are():
    counts = torch.tensor([3, 70, 0])
    assert torch.equal(processes.without_waiting(counts, torch.device("cpu")), counts)
