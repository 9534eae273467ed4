"""Shared by the sampler's kernels: a row's scalars, loads by groups, keys in the order of values.

A row is cut into groups of GROUP tokens, counted from its first token: what is summed up together
never depends on where in memory a row lies, so a row's result does not depend on its batch. For the
same reason products and sums stay apart (`enable_fp_fusion=False`): x is bit for bit the same in
every kernel, and the same as that of the other backends. The price is narrow loads where V is not
a multiple of a 16-byte vector.
"""

import triton
import triton.language as tl

from qadapter.kernels.common import NEG_INF, POS_INF

# Arguments that are pointers, or a number for all rows, by value: a launch less for each of them.
NUMBERS = ["scale_ptr", "base_weight_ptr", "seed_ptr", "position_ptr"]
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def float64_of(source, index):
    """Of a float64 pointer the element, else the number whose bits came by value."""
    if source.dtype.is_ptr():
        value = tl.load(source + index)
    else:
        value = tl.cast(source, tl.int64).to(tl.float64, bitcast=True)
    return value


@triton.jit
def int64_of(source, index):
    """Of an int64 pointer the element, else the number that came by value."""
    if source.dtype.is_ptr():
        value = tl.load(source + index)
    else:
        value = tl.cast(source, tl.int64)
    return value


@triton.jit
def row_scalars(row, scale_ptr, base_weight_ptr, scale_step, base_weight_step):
    """(scale in float64, scale log2 e and base_weight in float32, whether they are legal)."""
    scale = float64_of(scale_ptr, row * scale_step)
    weight = float64_of(base_weight_ptr, row * base_weight_step)
    legal = (scale > 0.0) & (scale < POS_INF) & (tl.abs(weight) < POS_INF)
    # Within float32, and never 0: -inf times it must stay -inf.
    scale2 = tl.minimum(tl.maximum(scale * LOG2E, 1e-30), 3.0e38).to(tl.float32)
    return scale, scale2, weight.to(tl.float32), legal


@triton.jit
def mix_rows(zq, zb, weight):
    """z_q + weight z_b in float32.

    -inf in either stream masks the token, also under a negative weight; +inf in the base is NaN.
    """
    x = zq + weight * zb
    x = tl.where(zb == POS_INF, float("nan"), x)
    return tl.where((zq == NEG_INF) | (zb == NEG_INF), NEG_INF, x)


@triton.jit
def load_groups(
    q_row, base_row, group, live, vocab, weight, HAS_BASE: tl.constexpr, GROUP: tl.constexpr
):
    """x of the groups [R], float32 [R, GROUP]; -inf where there is no token.

    Where V is a multiple of 16 Triton sees that the end of a row cuts no vector.
    """
    columns = (group * GROUP)[:, None] + tl.arange(0, GROUP)[None, :]
    x = tl.load(q_row + columns, mask=live[:, None] & (columns < vocab), other=NEG_INF)
    x = x.to(tl.float32)
    if HAS_BASE:
        columns_used = tl.where(weight != 0.0, vocab, 0)  # a base without weight is not read
        zb = tl.load(base_row + columns, mask=live[:, None] & (columns < columns_used), other=0.0)
        x = mix_rows(x, zb.to(tl.float32), weight)
    return x


@triton.jit
def order_key(x):
    """int32 in the order of x; -0 and 0 are one key. The way back is `key_value`."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def key_value(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def row_uniform(row, seed_ptr, position_ptr, position_step, SHARED_SEED: tl.constexpr):
    """float64 in [0, 1), 53 bits of philox(key, position). A shared seed: key philox(seed, row)."""
    zero = tl.full([], 0, tl.uint32)
    if SHARED_SEED:
        index = row.to(tl.uint64)
        low, high = index.to(tl.uint32), (index >> 32).to(tl.uint32)
        w0, w1, _, _ = tl.philox(int64_of(seed_ptr, 0), low, high, zero, zero)
        key = (w0.to(tl.uint64) << 32) | w1.to(tl.uint64)
    else:
        key = int64_of(seed_ptr, row).to(tl.uint64)
    counter = int64_of(position_ptr, row * position_step).to(tl.uint64)
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    w0, w1, _, _ = tl.philox(key, low, high, zero, zero)
    high_bits = (w0 >> 5).to(tl.float64) * 67108864.0
    return (high_bits + (w1 >> 6).to(tl.float64)) * 1.1102230246251565e-16  # 2^-53


@triton.jit
def first_beyond(mass, threshold, SIZE: tl.constexpr):
    """(first index whose cumulative mass exceeds the threshold, mass before it); float64 [SIZE].

    Never an index without mass. Where rounding leaves the threshold beyond the end, the last one.
    """
    index = tl.arange(0, SIZE)
    has_mass = mass > 0.0
    hit = has_mass & (tl.cumsum(mass, 0) > threshold)
    first = tl.min(tl.where(hit, index, SIZE), axis=0)
    last = tl.max(tl.where(has_mass, index, 0), axis=0)
    chosen = tl.where(first < SIZE, first, last)
    return chosen, tl.sum(tl.where(index < chosen, mass, 0.0), axis=0)


@triton.jit
def at(values, index, SIZE: tl.constexpr):
    """values[index] of a vector [SIZE]."""
    return tl.sum(tl.where(tl.arange(0, SIZE) == index, values, 0), axis=0)


@triton.jit
def store_token(
    row,
    group,
    inside,
    x_token,
    maximum,
    scale,
    total,
    tokens_out,
    logprobs_out,
    GROUP: tl.constexpr,
):
    """The drawn token and its log-probability, (x - max) scale - ln total."""
    tl.store(tokens_out + row, group.to(tl.int64) * GROUP + inside)
    distance = x_token.to(tl.float64) - maximum.to(tl.float64)
    log_total = tl.log(total.to(tl.float32)).to(tl.float64)
    tl.store(logprobs_out + row, (distance * scale - log_total).to(tl.float32))


@triton.jit
def store_nothing(row, tokens_out, logprobs_out):
    tl.store(tokens_out + row, tl.full([], -1, tl.int64))
    tl.store(logprobs_out + row, float("nan"))
