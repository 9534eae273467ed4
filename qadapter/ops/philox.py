"""Random numbers by counting: Philox4x32-10 (Salmon et al. 2011), on tensors and on plain ints.

A draw depends on its key and its count alone, on every device: csrc/common/philox.h and
`qadapter.kernels.sample_draw` compute the same bits.
"""

from typing import Any

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def _mul_hi_lo(a: Any, constant: int) -> tuple[Any, Any]:
    """High and low words of a 32 x 32 bit product, in int64 without overflow."""
    high, low = a >> 16, a & 0xFFFF
    mid = high * constant
    total = low * constant + ((mid & 0xFFFF) << 16)
    return ((mid >> 16) + (total >> 32)) & _MASK, total & _MASK


def philox_4x32(key: Any, counter: Any) -> tuple[Any, Any, Any, Any]:
    """Philox4x32-10 (Salmon et al. 2011) on int64 tensors: four words of 32 random bits each.

    ``key`` and ``counter`` are int64 of one shape; the upper half of the 128-bit counter is 0.
    Plain ints do as well.
    """
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    c0, c1 = counter & _MASK, (counter >> 32) & _MASK
    c2, c3 = c0 ^ c0, c0 ^ c0
    for _ in range(10):
        hi0, lo0 = _mul_hi_lo(c0, 0xD2511F53)
        hi1, lo1 = _mul_hi_lo(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def first_key(seed: int) -> int:
    """`row_keys` of row 0 alone, without a tensor."""
    w0, w1, _, _ = philox_4x32(seed, 0)
    key = (w0 << 32) | w1
    return key - 2**64 if key >= 2**63 else key


def row_keys(seed: Tensor, batch: int) -> Tensor:
    """int64 [B]: philox(seed, b) for each row b, from a seed int64 [1]."""
    index = torch.arange(batch, device=seed.device)
    w0, w1, _, _ = philox_4x32(seed.expand(batch), index)
    return (w0 << 32) | w1


def uniform(key: Tensor, counter: Tensor) -> Tensor:
    """float64 [B] in [0, 1), 53 bits each, from the first two words of philox(key, counter)."""
    w0, w1, _, _ = philox_4x32(key, counter)
    return ((w0 >> 5).double() * 67108864.0 + (w1 >> 6).double()) / 9007199254740992.0
