"""What an operation asks of a GPU besides its own kernels; fake tensors, so no GPU is needed."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from qadapter import functional as QF


class OnGpu(TorchDispatchMode):
    """The operations whose result lies on a GPU, but for views and memory that is not written."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, tuple) else result
        name = func.overloadpacket.__name__
        on_gpu = isinstance(first, Tensor) and first.device.type == "cuda"
        if on_gpu and name not in ("empty", "detach"):
            self.seen.append(name)
        return result


def test_numbers_cost_the_sampler_no_launch():
    """Scale, base weight, seed and position go by value: none is filled in before the draw."""
    with FakeTensorMode():
        base, q = (torch.empty(4, 1000, device="cuda") for _ in range(2))
        one = [torch.empty(1, 1000, device="cuda") for _ in range(2)]
        with OnGpu() as gpu:
            QF.sample(base, q, alpha_0=0.5, alpha_tilde=0.8, seed=3, position=7, top_k=5)
            assert gpu.seen == ["sample"]
            QF.sample(*one, alpha_0=0.5, seed=3)
            QF.sample(None, q, temperature=0.5, top_p=0.9)
    assert gpu.seen == ["sample", "sample", "randint", "sample"]
