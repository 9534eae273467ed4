"""The sampler's filters and draw: top-k, then top-p of the rest, then min-p, exact and unsorted.

A filter is a pivot, the smallest kept value, and a quota of the tokens that equal it, lowest ids
first. One program per row:

    bound    a value no pivot lies below, from the groups' statistics alone: the k-th largest group
             maximum; for top-p the value at which the groups' maxima alone hold the mass
    list     the groups whose maximum reaches the bound, in token-id order: the only ones read again
    pivot    three-way search over the listed tokens until at most 2048 are left between the bounds
             (none of these rounds where 64 groups are listed or fewer), then those in registers
    draw     kept mass and ties of every listed group, prefix sums over those, then inside one

Measures of a pivot are exact counts, and masses in float32 per lane and float64 between lanes.
Ties at a pivot are told apart by prefix sums over counts. No atomics.

Bytes per row: 8 V / GROUP, and 4 GROUP per listed group (two 16-bit streams) two times, three
with both top-k and top-p, from L2: 50 KB at V = 128256 and top_k = 50, nothing next to the pass
before. What it costs is latency, some 70 reductions over 8 warps and 8 dependent loads: 13 to 18 us
by their number. A flat row with top-p alone lists every group and reads it about 8 times; one
program per row then needs several hundred us. Not measured on a GPU.
"""

import triton
import triton.language as tl

from qadapter.kernels.common import NEG_INF, POS_INF, finite_or_zero
from qadapter.kernels.sample_common import (
    NUMBERS,
    at,
    first_beyond,
    key_value,
    load_groups,
    order_key,
    row_scalars,
    row_uniform,
    store_nothing,
    store_token,
)

CANDIDATES = tl.constexpr(2048)  # tokens that a pivot is searched among in registers
FILTER_WARPS = 8
FILTER_TILE = 2048  # listed tokens read at a time: one 16-byte vector a thread in 16 bits
LOWEST_KEY = tl.constexpr(-2139095040)  # of the smallest finite float32
SCAN = tl.constexpr(1024)  # groups whose masses are summed up at a time
NO_QUOTA = tl.constexpr(1 << 30)


@triton.jit
def largest_key(keys, weights, above, target, low, high):
    """Largest key in [low, high) at which above + the weights of the keys from it reach the target.

    `low` where none does. Bounds are int64: high - low may exceed 31 bits.
    """
    while high - low > 1:
        middle = (low + high) >> 1
        reached = above + tl.sum(tl.where(keys >= middle.to(tl.int32), weights, 0.0)) >= target
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
    return low


@triton.jit
def largest_group_key(keys, weights, target, low, high):
    """`largest_key` of the groups' maxima, of which -inf counts for nothing.

    All of them are at or above the smallest: where they do not reach the target together nothing
    does, and where they do no key below the smallest has to be tried. That is 20 to 24 halvings for
    maxima within some powers of two of each other, and not 32; none where they do not reach it.
    """
    there = keys >= LOWEST_KEY
    smallest = tl.min(tl.where(there, keys, 0x7FFFFFFF), axis=0).to(tl.int64)
    enough = tl.sum(tl.where(there, weights, 0.0)) >= target
    start = tl.where(enough, tl.maximum(low, tl.minimum(smallest, high - 1)), low)
    return largest_key(keys, weights, 0.0, target, start, tl.where(enough, high, low + 1))


@triton.jit
def listed_tokens(
    q_row,
    base_row,
    list_ptr,
    start,
    listed,
    vocab,
    weight,
    HAS_BASE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """x [ROWS, GROUP] of one tile of the list; -inf where there is no token."""
    place = start + tl.arange(0, ROWS)
    group = tl.load(list_ptr + place, mask=place < listed, other=0)
    return load_groups(q_row, base_row, group, place < listed, vocab, weight, HAS_BASE, GROUP)


@triton.jit
def measure(key, x, threshold, maximum, scale2, BY_MASS: tl.constexpr):
    """Mass, or number, of the tokens whose key reaches the threshold, by fours (one thread's)."""
    if BY_MASS:
        each = tl.where(key >= threshold, tl.exp2((x - maximum) * scale2), 0.0)
    else:
        each = tl.where(key >= threshold, 1.0, 0.0)
    return tl.sum(tl.reshape(each, [key.shape[0], key.shape[1] // 4, 4]), axis=2)


@triton.jit
def inner_key(value, low, high):
    """The key of a value, moved strictly between two int64 bounds."""
    return tl.minimum(tl.maximum(order_key(value).to(tl.int64), low + 1), high - 1)


@triton.jit
def tighten(threshold, reached, count, low, high, count_low, count_high):
    """Bounds after one more threshold has been measured."""
    raises, lowers = reached & (threshold > low), (reached == 0) & (threshold < high)
    count_low = tl.where(raises, count, count_low)
    count_high = tl.where(lowers, count, count_high)
    return (
        tl.where(raises, threshold, low),
        tl.where(lowers, threshold, high),
        count_low,
        count_high,
    )


@triton.jit
def find_pivot(
    q_row,
    base_row,
    list_ptr,
    listed,
    buffer_ptr,
    vocab,
    weight,
    maximum,
    scale2,
    target,
    low,
    high,
    HAS_BASE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BY_MASS: tl.constexpr,
):
    """(pivot, count above it, mass above it): the largest key at which the tokens from it on reach
    the target, a mass or a count; at least `low`, below `high`. Keys are int64, counts float32
    (exact up to 2^24 tokens), masses float64."""
    count_low, count_high = (listed * GROUP).to(tl.float32), 0.0
    while (high - low > 1) & (count_low - count_high > CANDIDATES):
        # Thirds of the values close in fast; half of the keys closes in for certain.
        bottom = key_value(low.to(tl.int32)) * 0.33333334
        top = key_value(tl.minimum(high, order_key(maximum).to(tl.int64)).to(tl.int32)) * 0.33333334
        t1 = inner_key(bottom * 2.0 + top, low, high)
        t2 = inner_key(bottom + top * 2.0, low, high)
        t3 = (low + high) >> 1
        k1, k2, k3 = t1.to(tl.int32), t2.to(tl.int32), t3.to(tl.int32)
        m1 = tl.zeros([ROWS, GROUP // 4], tl.float32)
        m2, m3, c1, c2, c3 = m1, m1, m1, m1, m1
        for start in range(0, listed, ROWS):
            x = listed_tokens(
                q_row, base_row, list_ptr, start, listed, vocab, weight, HAS_BASE, GROUP, ROWS
            )
            key = order_key(x)
            c1 += measure(key, x, k1, maximum, scale2, False)
            c2 += measure(key, x, k2, maximum, scale2, False)
            c3 += measure(key, x, k3, maximum, scale2, False)
            if BY_MASS:
                m1 += measure(key, x, k1, maximum, scale2, True)
                m2 += measure(key, x, k2, maximum, scale2, True)
                m3 += measure(key, x, k3, maximum, scale2, True)
        n1, n2, n3 = tl.sum(c1), tl.sum(c2), tl.sum(c3)
        if BY_MASS:
            r1 = tl.sum(m1.to(tl.float64)) >= target
            r2 = tl.sum(m2.to(tl.float64)) >= target
            r3 = tl.sum(m3.to(tl.float64)) >= target
        else:
            r1, r2, r3 = n1 >= target, n2 >= target, n3 >= target
        low, high, count_low, count_high = tighten(t1, r1, n1, low, high, count_low, count_high)
        low, high, count_low, count_high = tighten(t2, r2, n2, low, high, count_low, count_high)
        low, high, count_low, count_high = tighten(t3, r3, n3, low, high, count_low, count_high)

    # What is left between the bounds goes to the buffer, in any fixed order.
    counts = tl.zeros([ROWS, GROUP // 4], tl.float32)
    masses = tl.zeros([ROWS, GROUP // 4], tl.float32)
    stored = 0
    first, beyond = low.to(tl.int32), high.to(tl.int32)
    for start in range(0, listed, ROWS):
        x = listed_tokens(
            q_row, base_row, list_ptr, start, listed, vocab, weight, HAS_BASE, GROUP, ROWS
        )
        key = order_key(x)
        counts += measure(key, x, beyond, maximum, scale2, False)
        masses += measure(key, x, beyond, maximum, scale2, True)
        key = tl.reshape(key, [ROWS * GROUP])
        between = (key >= first) & (key < beyond)
        place = stored + tl.cumsum(between.to(tl.int32), 0) - 1
        # Only equal keys can be more than fit, and then their number does not matter here.
        tl.store(buffer_ptr + place, key, mask=between & (place < CANDIDATES))
        stored += tl.sum(between.to(tl.int32))
    count_above, mass_above = tl.sum(counts), tl.sum(masses.to(tl.float64))
    tl.debug_barrier()
    index = tl.arange(0, CANDIDATES)
    key = tl.load(buffer_ptr + index, mask=index < stored, other=LOWEST_KEY - 1)
    mass = tl.exp2((key_value(key) - maximum) * scale2).to(tl.float64)
    if BY_MASS:
        pivot = largest_key(key, mass, mass_above, target, low, high)
    else:
        pivot = largest_key(key, 1.0, count_above, target, low, high)
    larger = key > pivot.to(tl.int32)
    count_above += tl.sum(tl.where(larger, 1.0, 0.0))
    mass_above += tl.sum(tl.where(larger, mass, 0.0))
    tl.debug_barrier()  # before the next search writes the buffer
    return pivot, count_above, mass_above


@triton.jit
def draw_group(kept_ptr, ties_ptr, listed, threshold, quota, pivot_mass, SCAN: tl.constexpr):
    """(place in the list, what of the threshold and of the quota is left for that group).

    Never a group without mass: where rounding leaves the threshold beyond all, the last one.
    """
    position = 0
    before = tl.zeros([], tl.float64)  # mass of all groups before that place
    scanned = tl.zeros([], tl.float64)
    left = quota
    start = 0
    while (start < listed) & (scanned <= threshold):
        here = start + tl.arange(0, SCAN)
        kept = tl.load(kept_ptr + here, mask=here < listed, other=0.0).to(tl.float64)
        ties = tl.load(ties_ptr + here, mask=here < listed, other=0)
        ties_before = tl.cumsum(ties, 0) - ties
        kept_ties = tl.minimum(tl.maximum(quota - ties_before, 0), ties)
        mass = kept + kept_ties.to(tl.float64) * pivot_mass
        chosen, mass_before = first_beyond(mass, threshold - scanned, SCAN)
        mass_here = tl.sum(mass)
        position = tl.where(mass_here > 0.0, start + chosen, position)
        before = tl.where(mass_here > 0.0, scanned + mass_before, before)
        left = tl.where(mass_here > 0.0, quota - at(ties_before, chosen, SCAN), left)
        quota -= tl.sum(ties)
        scanned += mass_here
        start += SCAN
    return position, threshold - before, left


_RUNTIME = ["base_stride", "q_stride", "scale_step", "base_weight_step", "position_step", "groups"]
_RUNTIME += [*NUMBERS, "top_k", "top_p_bits", "log_min_p_bits"]


@triton.jit(do_not_specialize=_RUNTIME)
def sample_filter_kernel(
    base_ptr,
    q_ptr,
    scale_ptr,
    base_weight_ptr,
    seed_ptr,
    position_ptr,
    group_max_ptr,
    group_sum_ptr,
    workspace_ptr,
    tokens_out,
    logprobs_out,
    base_stride,
    q_stride,
    scale_step,
    base_weight_step,
    position_step,
    vocab,
    groups,
    top_k,
    top_p_bits,
    log_min_p_bits,
    HAS_BASE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BY_K: tl.constexpr,
    BY_P: tl.constexpr,
    BY_MIN: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    SHARED_SEED: tl.constexpr,
    GREEDY: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    scale, scale2, weight, legal = row_scalars(
        row, scale_ptr, base_weight_ptr, scale_step, base_weight_step
    )
    top_p = tl.cast(top_p_bits, tl.int64).to(tl.float64, bitcast=True)
    log_min_p = tl.cast(log_min_p_bits, tl.int64).to(tl.float64, bitcast=True)
    q_row = q_ptr + row * q_stride
    base_row = base_ptr + row * base_stride
    if ALIGNED:
        q_row = tl.multiple_of(q_row, 16)
        base_row = tl.multiple_of(base_row, 16)
    list_ptr = workspace_ptr + row * (2 * groups + CANDIDATES)
    ties_ptr = list_ptr + groups
    buffer_ptr = ties_ptr + groups
    kept_ptr = group_sum_ptr + row * groups  # the sums make room for the masses kept of them

    index = tl.arange(0, GROUPS)
    exists = index < groups
    group_max = tl.load(group_max_ptr + row * groups + index, mask=exists, other=NEG_INF)
    group_sum = tl.load(group_sum_ptr + row * groups + index, mask=exists, other=0.0)
    maximum = tl.max(group_max, axis=0)
    best = tl.min(tl.where(group_max == maximum, index, GROUPS), axis=0)
    share = tl.exp2((group_max - finite_or_zero(maximum)) * scale2)
    total = tl.sum((group_sum * share).to(tl.float64))
    if (total != total) | (maximum == NEG_INF) | (maximum == POS_INF) | (legal == 0):
        store_nothing(row, tokens_out, logprobs_out)
        return

    # The bound. Keys from here on; those of single values in int64.
    group_key = order_key(group_max)
    high = order_key(maximum).to(tl.int64) + 1
    low = tl.full([], LOWEST_KEY, tl.int64)
    least = low
    if BY_MIN:
        # Around the rounded threshold, the smallest value that passes in float64.
        nearby = order_key((maximum + log_min_p / scale).to(tl.float32)) + tl.arange(0, 8) - 4
        distance = key_value(nearby).to(tl.float64) - maximum.to(tl.float64)
        passes = (nearby >= LOWEST_KEY) & (distance * scale >= log_min_p)
        least = tl.min(tl.where(passes, nearby.to(tl.int64), high - 1), axis=0)
    if BY_K:
        low = largest_group_key(group_key, 1.0, top_k, low, high)
    elif BY_P:
        # What lies so far down that V of it are less than half of 1 - p does not count.
        depth = tl.log2((vocab / ((1.0 - top_p) * total)).to(tl.float32)) + 1.0
        deepest = order_key(maximum - depth / scale2).to(tl.int64)
        low = tl.minimum(tl.maximum(tl.maximum(low, deepest), least), high - 1)
        low = largest_group_key(group_key, share, top_p * total * 1.00001, low, high)
    else:
        low = least

    # The list.
    listed_here = group_key >= low.to(tl.int32)
    place = tl.cumsum(listed_here.to(tl.int32), 0) - 1
    tl.store(list_ptr + place, index, mask=listed_here)
    listed = tl.sum(listed_here.to(tl.int32))
    tl.debug_barrier()

    # The pivots: kept is what exceeds the pivot, and `quota` of what equals it.
    pivot = low - 1
    quota = 0
    if BY_K:
        pivot, count_above, mass_above = find_pivot(
            q_row,
            base_row,
            list_ptr,
            listed,
            buffer_ptr,
            vocab,
            weight,
            maximum,
            scale2,
            top_k,
            low,
            high,
            HAS_BASE,
            GROUP,
            ROWS,
            False,
        )
        quota = top_k - count_above.to(tl.int32)
        if BY_P:
            pivot_mass = tl.exp2((key_value(pivot.to(tl.int32)) - maximum) * scale2)
            total = mass_above + quota.to(tl.float64) * pivot_mass.to(tl.float64)
            low = tl.maximum(pivot, least)
    if BY_P:
        before = pivot
        pivot, _count, mass_above = find_pivot(
            q_row,
            base_row,
            list_ptr,
            listed,
            buffer_ptr,
            vocab,
            weight,
            maximum,
            scale2,
            top_p * total,
            low,
            high,
            HAS_BASE,
            GROUP,
            ROWS,
            True,
        )
        pivot_mass = tl.exp2((key_value(pivot.to(tl.int32)) - maximum) * scale2).to(tl.float64)
        # The first tie always stays; ties without mass all do.
        wanted = tl.maximum(tl.ceil((top_p * total - mass_above) / pivot_mass), 1.0)
        wanted = tl.where(wanted < NO_QUOTA, wanted, NO_QUOTA).to(tl.int32)
        quota = tl.where(pivot == before, tl.minimum(quota, wanted), wanted)
    if BY_MIN:
        quota = tl.where(least > pivot, 0, quota)
        pivot = tl.maximum(pivot, least - 1)

    # Kept mass and ties of every listed group.
    pivot_key = pivot.to(tl.int32)
    masses = tl.zeros([ROWS], tl.float64)
    all_ties = tl.zeros([ROWS], tl.int32)
    for start in range(0, listed, ROWS):
        x = listed_tokens(
            q_row, base_row, list_ptr, start, listed, vocab, weight, HAS_BASE, GROUP, ROWS
        )
        key = order_key(x)
        mass = tl.sum(tl.where(key > pivot_key, tl.exp2((x - maximum) * scale2), 0.0), axis=1)
        ties = tl.sum((key == pivot_key).to(tl.int32), axis=1)
        here = start + tl.arange(0, ROWS)
        tl.store(kept_ptr + here, mass, mask=here < listed)
        tl.store(ties_ptr + here, ties, mask=here < listed)
        masses += mass.to(tl.float64)
        all_ties += ties
    tl.debug_barrier()
    pivot_mass = tl.exp2((key_value(pivot_key) - maximum) * scale2).to(tl.float64)
    total = tl.sum(masses) + tl.minimum(quota, tl.sum(all_ties)).to(tl.float64) * pivot_mass

    if GREEDY:
        group, threshold = best, total
    else:
        threshold = row_uniform(row, seed_ptr, position_ptr, position_step, SHARED_SEED) * total
        position, threshold, quota = draw_group(
            kept_ptr, ties_ptr, listed, threshold, quota, pivot_mass, SCAN
        )
        group = tl.load(list_ptr + position)
    one_group = group + tl.zeros([1], tl.int32)
    x = load_groups(q_row, base_row, one_group, one_group >= 0, vocab, weight, HAS_BASE, GROUP)
    x = tl.reshape(x, [GROUP])
    if GREEDY:
        inside = tl.min(tl.where(x == maximum, tl.arange(0, GROUP), GROUP), axis=0)
    else:
        key = order_key(x)
        tie = key == pivot_key
        kept_here = (key > pivot_key) | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= quota))
        token_mass = tl.where(kept_here, tl.exp2((x - maximum) * scale2), 0.0)
        inside, _before = first_beyond(token_mass.to(tl.float64), threshold, GROUP)
    x_token = at(tl.where(x == NEG_INF, 0.0, x), inside, GROUP)
    store_token(row, group, inside, x_token, maximum, scale, total, tokens_out, logprobs_out, GROUP)
