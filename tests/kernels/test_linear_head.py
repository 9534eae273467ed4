"""The head's products as a GPU would be asked for them, and the memory of a chunk; no GPU needed.

Fake tensors stand in for CUDA's: nothing is computed, but every operation is seen.
"""

import contextlib
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from qadapter.kernels import linear_head
from qadapter.ops import linear_torch

META = torch.device("meta")
# The products come before; copying between fake CUDA tensors takes a CUDA build of torch.
CANNOT_COPY = contextlib.suppress(RuntimeError)


class Products(TorchDispatchMode):
    """(type of the operands, type of the result) of every matrix product."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if "mm" in func.overloadpacket.__name__:
            self.seen.append((args[-2 if len(args) == 2 else 0].dtype, result.dtype))
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_of_16_bits_end_in_float32(dtype):
    with FakeTensorMode(), Products() as products:
        weight = torch.empty(500, 64, dtype=dtype, device="cuda")
        hidden = torch.empty(8, 64, dtype=dtype, device="cuda")
        p = torch.empty(8, 500, dtype=dtype, device="cuda")
        z = torch.empty(8, 500, dtype=torch.float32, device="cuda")
        head = linear_head.Head(weight, None, 1.0, 0.0)
        head.product(hidden, z)
        with CANNOT_COPY:
            head.pull_back(p, hidden)
        in_torch = linear_torch.Head(weight, None, 1.0, 0.0, torch.float32)
        in_torch.logits(hidden, z)
        with CANNOT_COPY:
            in_torch.pull_back(z, hidden)
    assert products.seen == [(dtype, torch.float32)] * 4


def test_other_types_are_said_once():
    linear_head.warn_of_mixed_dtypes.cache_clear()
    for times, (hidden, weight) in ((1, ("float32", "bfloat16")), (1, ("bfloat16", "float32"))):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                linear_head.warn_of_mixed_dtypes(getattr(torch, hidden), getattr(torch, weight))
        assert len(caught) == times and f"torch.{hidden} and the head" in str(caught[0].message)


def test_memory_is_of_one_size_for_all_long_calls():
    sizes = set()
    for num_rows in range(2100, 20000, 137):
        for buffers in (1, 2):
            rows = linear_head.rows_per_chunk(num_rows, 128256, buffers, 0)
            made = linear_head.chunk_buffers(rows, 128256, buffers, 0, META)
            assert [b.shape for b in made] == [(rows, 128256)] * buffers
            assert all(b.is_contiguous() for b in made)
            sizes.add(made[0].untyped_storage().nbytes())
    assert sizes <= {3 << 28, 1 << 30}
    short = linear_head.chunk_buffers(100, 1024, 1, 0, META)[0]
    asked = linear_head.chunk_buffers(1900, 128256, 1, 1900, META)[0]
    assert short.untyped_storage().nbytes() == 100 * 4096
    assert asked.untyped_storage().nbytes() == 1900 * 4 * 128256
