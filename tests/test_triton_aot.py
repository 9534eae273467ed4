"""Ahead-of-time compilation of every Triton kernel for sm_80, sm_90 and sm_100; needs no GPU.

Asserted is what the byte models rest on: the streaming kernels touch memory in 128-bit accesses
(also for odd vocabularies, through ALIGN = 2), and nothing spills. pytest -s prints the registers.
"""

import os
import re
import shutil
import subprocess

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("in the interpreter nothing is compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from qadapter.kernels import preference  # noqa: E402
from qadapter.kernels.residual_bwd import residual_bwd_kernel  # noqa: E402
from qadapter.kernels.residual_finish import residual_fwd_merge_kernel  # noqa: E402
from qadapter.kernels.residual_fwd import residual_fwd_kernel  # noqa: E402

ARCHITECTURES = [80, 90, 100]
VECTORS = {"fp32": 4, "bf16": 8, "fp16": 8}
INTEGERS = {
    "base_stride": "i64",
    "q_stride": "i64",
    "skew": "i32",
    "vocab": "i32",
    "vectors_per_split": "i32",
    "splits": "i32",
    "num_rows": "i32",
    "num_pairs": "i32",
    "num_sequences": "i32",
    "steps": "i32",
}
POINTERS = {"actions_ptr": "*i64", "cu_ptr": "*i32", "counts_ptr": "*i32"}
LOGITS = ("base_ptr", "q_ptr", "grad_ptr")


def compile_for(kernel, arch, constants, warps, logits="fp32"):
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in LOGITS:
            signature[name] = f"*{logits}"
        elif name.endswith(("_ptr", "_out")):
            signature[name] = POINTERS.get(name, "*fp32")
        else:
            signature[name] = INTEGERS.get(name, "fp32")
    indices = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=indices, attrs={})
    options = {"num_warps": warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def cuobjdump():
    bundled = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
    found = bundled if os.access(bundled, os.X_OK) else shutil.which("cuobjdump")
    if found is None:
        pytest.skip("cuobjdump is neither bundled with this Triton nor on PATH")
    return found


def wide_accesses(compiled, kind):
    """How many 128-bit loads or stores of global memory the PTX has."""
    return len(re.findall(rf"{kind}\.global\S*\.(?:v4\.b32|v2\.b64)", compiled.asm["ptx"]))


def check_resources(compiled, tmp_path, title):
    """No stack and no local memory, that is no spills; prints the registers."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    command = [cuobjdump(), "--dump-resource-usage", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {
        name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)
    }
    wide = wide_accesses(compiled, "ld"), wide_accesses(compiled, "st")
    print(
        f"\n{title}: {usage['REG']} registers, {usage['SHARED']} B shared, 128-bit ld, st {wide}",
        end="",
    )
    assert usage["STACK"] == 0, title
    assert usage["LOCAL"] == 0, title
    return usage["REG"]


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
            "RAGGED": align != 1,
            "ALIGN": align,
            "VEC": VECTORS[dtype],
            "ROWS": 256 if align == 0 else 512,
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
            "RAGGED": align != 1,
            "ALIGN": align,
            "VEC": VECTORS[dtype],
            "ROWS": 256 if align == 0 else 512,
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
