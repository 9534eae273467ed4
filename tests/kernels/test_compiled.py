"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 as the byte models assume, GPU or not.

Asserted is what the byte models rest on: the streaming kernels touch memory in 128-bit accesses
(also for odd vocabularies, through ALIGN = 2), and nothing spills. pytest -s prints the registers.
"""

import os
import re

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("in the interpreter nothing is compiled", allow_module_level=True)

from qadapter.kernels import (  # noqa: E402
    linear_bwd,
    linear_chunk,
    linear_finish,
    lora_add,
    preference,
)
from qadapter.kernels.residual_bwd import residual_bwd_kernel  # noqa: E402
from qadapter.kernels.residual_finish import residual_fwd_merge_kernel  # noqa: E402
from qadapter.kernels.residual_fwd import residual_fwd_kernel  # noqa: E402
from qadapter.kernels.sample import (  # noqa: E402
    DRAW_WARPS,
    FILTER_GROUP,
    MOST_FILTER_GROUPS,
    MOST_PLAIN_GROUPS,
    PLAIN_GROUP,
)
from qadapter.kernels.sample_blocks import TILE, WARPS, sample_blocks_kernel  # noqa: E402
from qadapter.kernels.sample_draw import sample_draw_kernel  # noqa: E402
from qadapter.kernels.sample_filter import (  # noqa: E402
    FILTER_TILE,
    FILTER_WARPS,
    sample_filter_kernel,
)
from tests.kernels.compiled import (  # noqa: E402
    ARCHITECTURES,
    VECTORS,
    check_resources,
    compile_for,
    wide_accesses,
)


def row_walk(align, dtype):
    """Constants of kernels that walk long rows with 8 warps."""
    rows = 256 if align == 0 else 512
    return {"RAGGED": align != 1, "ALIGN": align, "VEC": VECTORS[dtype], "ROWS": rows}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", VECTORS)
@pytest.mark.parametrize("align", [1, 2, 0], ids=["aligned", "skewed", "unaligned"])
def test_forward(align, dtype, arch, tmp_path):
    """Sign of m x base_lse given x split: those that differ in their inner loop."""
    for sign, has_lse, split in (
        (0, False, False),
        (0, True, False),
        (1, False, True),
        (-1, True, False),
    ):
        if align == 0 and sign != 1:
            continue
        constants = {
            "SIGN": sign,
            "HAS_BASE": True,
            "HAS_LSE": has_lse,
            "HAS_LOGP": False,
            "SPLIT": split,
            **row_walk(align, dtype),
        }
        compiled = compile_for(residual_fwd_kernel, arch, constants, 8, dtype)
        title = f"forward sm_{arch} {dtype} align {align} sign {sign} lse {has_lse}"
        registers = check_resources(compiled, tmp_path, title)
        if align != 0:
            # Whole tiles and the masked last tile, two vectors each, both streams.
            assert wide_accesses(compiled, "ld") == (4 if sign == 0 and has_lse else 8), title
            assert registers <= 64, title  # 1024 threads on a multiprocessor


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", VECTORS)
@pytest.mark.parametrize("align", [1, 2, 0], ids=["aligned", "skewed", "unaligned"])
def test_backward(align, dtype, arch, tmp_path):
    for sign in (0, 1, -1) if align else (1,):
        constants = {
            "SIGN": sign,
            **row_walk(align, dtype),
        }
        compiled = compile_for(residual_bwd_kernel, arch, constants, 8, dtype)
        title = f"backward sm_{arch} {dtype} align {align} sign {sign}"
        registers = check_resources(compiled, tmp_path, title)
        if align != 0:
            assert wide_accesses(compiled, "ld") == (2 if sign == 0 else 4), title
            assert wide_accesses(compiled, "st") == 2, title
            assert registers <= 64, title
        if dtype == "bf16":
            assert "cvt.rn.bf16" in compiled.asm["ptx"], "rounds to nearest"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_small_kernels(arch, tmp_path):
    block, half = {"BLOCK": preference.BLOCK}, {"BLOCK": preference.BLOCK // 2}
    merge = {"SIGN": 1, "HAS_BASE": True, "HAS_LSE": False, "HAS_LOGP": False, "LANES": 64}
    for kernel, constants, warps in (
        (residual_fwd_merge_kernel, merge, 4),
        (preference.sequence_kernel, {"VALUE_NEXT": True, **block}, 4),
        (preference.pairs_kernel, {"LENGTH_MEAN": True, "HAS_DENOMINATORS": False, **half}, 8),
        (preference.pairs_kernel, {"LENGTH_MEAN": False, "HAS_DENOMINATORS": True, **half}, 8),
        (preference.gradient_kernel, {"VALUE_NEXT": True, **block}, 8),
        (preference.gradient_kernel, {"VALUE_NEXT": False, **block}, 8),
    ):
        compiled = compile_for(kernel, arch, constants, warps)
        check_resources(compiled, tmp_path, f"{compiled.metadata.name} sm_{arch}")


def linear_rows(arch, dtype, sign, write, *, bias=False, capped=False, sums=True, vocab=128256):
    rows, warps = linear_chunk.chunk_tile(vocab)
    constants = {
        "SIGN": sign,
        "HAS_BIAS": bias,
        "CAPPED": capped,
        "SUM_BASE": sums,
        "WRITE": write,
        "P_PER_FLOAT": 1 if dtype == "fp32" else 2,
        "VEC": linear_chunk.VEC,
        "ROWS": rows,
    }
    kernel = linear_chunk.linear_rows_kernel
    return compile_for(kernel, arch, constants, warps, dtype, aligned=["bias_ptr"], stages=1)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", VECTORS)
def test_linear_rows(dtype, arch, tmp_path):
    for sign, bias, capped, sums, vocab in (
        (0, False, False, False, 128256),
        (0, True, False, False, 128256),
        (1, False, False, True, 128256),
        (-1, True, True, True, 128256),
        (-1, True, True, True, 200),
    ):
        if dtype == "fp16" and not capped:
            continue
        compiled = linear_rows(
            arch, dtype, sign, True, bias=bias, capped=capped, sums=sums, vocab=vocab
        )
        title = f"linear rows sm_{arch} {dtype} sign {sign} bias {bias} capped {capped} V {vocab}"
        registers = check_resources(compiled, tmp_path, title)
        assert registers <= 64, title  # 1024 threads on a multiprocessor
        # Whole tiles and the last one, twice, two vectors each: z, zb where it enters, the bias.
        assert wide_accesses(compiled, "ld") == 8 * (1 + (sign != 0) + bias), title
        stores = r"st\.global\S*\.v4\.b32" if dtype == "fp32" else r"st\.global\S*\.v2\.b32"
        # p overwrites its own row: in 16 bits no store may follow loads without a barrier between.
        events = re.findall(
            rf"ld\.global\S*\.v4|{stores}|bar(?:rier)?\.\S*sync", compiled.asm["ptx"]
        )
        order = "".join(event[0] for event in events)  # l, s or b
        assert order.count("s") == 4, title
        assert ("ls" in order) == (dtype == "fp32"), f"{title}: {order}"
        assert "b" in order[: order.index("s")], title
        if dtype == "bf16":
            assert "cvt.rn.bf16" in compiled.asm["ptx"], "rounds to nearest"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_linear_statistics(arch, tmp_path):
    """Both passes over a row's statistics, with and without writing p, are the same arithmetic.

    Equal streams cancel exactly for that reason; the instructions of the first loop are compared.
    """
    loops = []
    for write in (False, True):
        compiled = linear_rows(arch, "bf16", 0, write)
        check_resources(compiled, tmp_path, f"linear rows sm_{arch} write {write}")
        ptx = compiled.asm["ptx"]
        first = ptx[: ptx.index("bar.sync")]  # up to the merge of the lanes
        loops.append(
            re.findall(r"^\s(?:@\S+ )?((?:add|sub|mul|fma|ex2|max)\S*)", first, re.MULTILINE)
        )
    assert loops[0] == loops[1]
    assert sum("ex2" in name for name in loops[0]) >= 20


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", VECTORS)
def test_linear_ends(dtype, arch, tmp_path):
    constants = {"HAS_BIAS": True, "CAPPED": True, "BLOCK": linear_finish.DOT_BLOCK}
    aligned = ("q_ptr", "base_ptr", "weight_ptr", "q_stride", "base_stride", "weight_stride", "dim")
    kernel = linear_finish.action_logits_kernel
    compiled = compile_for(kernel, arch, constants, 4, dtype, aligned=aligned)
    check_resources(compiled, tmp_path, f"action logits sm_{arch} {dtype}")
    assert wide_accesses(compiled, "ld") >= 3
    if dtype == "fp32":
        names = ("HAS_BASE", "HAS_LSE", "HAS_LOGP", "SUBTRACT_LSE", "CENTERED")
        constants = {"BLOCK": linear_finish.FINISH_BLOCK}
        constants.update(dict.fromkeys(names, True), HAS_LSE=False, HAS_LOGP=False)
        compiled = compile_for(linear_finish.linear_finish_kernel, arch, constants, 4)
        check_resources(compiled, tmp_path, f"linear finish sm_{arch}")


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", VECTORS)
def test_linear_backward(dtype, arch, tmp_path):
    aligned = ("u_ptr", "weight_ptr", "grad_ptr", "u_stride", "weight_stride", "dim")
    kernel, constants = linear_bwd.linear_bwd_kernel, {"BLOCK": linear_bwd.BLOCK}
    compiled = compile_for(kernel, arch, constants, linear_bwd.WARPS, dtype, aligned=aligned)
    title = f"linear backward sm_{arch} {dtype}"
    assert check_resources(compiled, tmp_path, title) <= 64, title
    assert wide_accesses(compiled, "ld") >= 2 and wide_accesses(compiled, "st") >= 1, title


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_lora_add(arch, tmp_path):
    """K = O = 4096; both factors in float32, as PEFT keeps them, and in 16 bits."""
    aligned = ("x_ptr", "lora_a_ptr", "lora_b_ptr", "out_ptr", "x_stride", "out_stride", "dim")
    for rank, factors in ((8, "*fp32"), (8, "*bf16"), (32, "*fp32")):
        constants = {"RANK": rank, "BLOCK": lora_add.TILE // rank, "OUTPUTS": lora_add.OUTPUTS}
        types = {"lora_a_ptr": factors, "lora_b_ptr": factors}
        kernel, warps = lora_add.lora_add_kernel, lora_add.WARPS
        compiled = compile_for(kernel, arch, constants, warps, "bf16", aligned=aligned, types=types)
        title = f"lora add sm_{arch} rank {rank} {factors}"
        check_resources(compiled, tmp_path, title)
        assert wide_accesses(compiled, "ld") >= (8 if factors == "*fp32" else 4), title


def sampler_constants(group, *, has_base=True, **others):
    return {"HAS_BASE": has_base, "GROUP": group, **others}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", VECTORS)
def test_sample_blocks(dtype, arch, tmp_path):
    for group, aligned, has_base in (
        (PLAIN_GROUP, True, True),
        (FILTER_GROUP, True, True),
        (FILTER_GROUP, True, False),
        (PLAIN_GROUP, False, True),
    ):
        constants = sampler_constants(group, has_base=has_base, ALIGNED=aligned, ROWS=TILE // group)
        hints = ["vocab"] if aligned else []
        compiled = compile_for(
            sample_blocks_kernel, arch, constants, WARPS, dtype, aligned=hints, fusion=False
        )
        title = f"sample blocks sm_{arch} {dtype} group {group} aligned {aligned} base {has_base}"
        registers = check_resources(compiled, tmp_path, title)
        assert registers <= 64, title  # 1024 threads on a multiprocessor
        # 16 tokens a thread and stream.
        vectors = 16 // VECTORS[dtype] * (1 + has_base)
        assert wide_accesses(compiled, "ld") == (vectors if aligned else 0), title
        # x is the same in every kernel, and the same as in the other backends.
        assert "fma.rn.f32" not in compiled.asm["ptx"], title


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sample_draw(arch, tmp_path):
    by_value = {"scale_ptr": "i64", "base_weight_ptr": "i32"}
    by_value |= {"seed_ptr": "i64", "position_ptr": "i32"}
    for greedy, shared, types in (
        (False, True, {}),
        (True, False, {}),
        (False, True, by_value),
        (False, False, by_value),
    ):
        constants = sampler_constants(
            PLAIN_GROUP, GROUPS=MOST_PLAIN_GROUPS, SHARED_SEED=shared, GREEDY=greedy
        )
        compiled = compile_for(
            sample_draw_kernel,
            arch,
            constants,
            DRAW_WARPS,
            "bf16",
            aligned=["vocab"],
            fusion=False,
            types=types,
        )
        check_resources(compiled, tmp_path, f"sample draw sm_{arch} greedy {greedy}")


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("filters", "dtype", "greedy"),
    [
        ("k p min", "bf16", False),
        ("k p", "fp32", False),
        ("p min", "bf16", True),
        ("k", "fp32", True),
    ],
)
def test_sample_filter(filters, dtype, greedy, arch, tmp_path):
    names = filters.split()
    constants = sampler_constants(
        FILTER_GROUP,
        ALIGNED=True,
        BY_K="k" in names,
        BY_P="p" in names,
        BY_MIN="min" in names,
        GROUPS=MOST_FILTER_GROUPS,
        ROWS=FILTER_TILE // FILTER_GROUP,
        SHARED_SEED=False,
        GREEDY=greedy,
    )
    compiled = compile_for(
        sample_filter_kernel,
        arch,
        constants,
        FILTER_WARPS,
        dtype,
        aligned=["vocab"],
        fusion=False,
    )
    title = f"sample filter sm_{arch} {dtype} {filters}"
    # Some compilers give up a few registers so that two programs fit on a multiprocessor.
    check_resources(compiled, tmp_path, title, stack=48)
    # The listed groups: the last pass, and two in the search for every pivot; both streams.
    passes = 1 + 2 * len({"k", "p"} & set(names))
    assert wide_accesses(compiled, "ld") >= 2 * passes, title
