"""Triton kernels compiled ahead of time, without a GPU, and what the compiler says of them."""

import os
import re
import shutil
import subprocess

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = [80, 90, 100]
VECTORS = {"fp32": 4, "bf16": 8, "fp16": 8}
INTEGERS = {
    "base_stride": "i64",
    "q_stride": "i64",
    "skew": "i32",
    "vocab": "i32",
    "blocks": "i32",
    "vectors_per_split": "i32",
    "splits": "i32",
    "num_rows": "i32",
    "num_pairs": "i32",
    "num_sequences": "i32",
    "steps": "i32",
    "weight_stride": "i64",
    "u_stride": "i64",
    "x_stride": "i64",
    "out_stride": "i64",
    "width": "i32",
    "rank": "i32",
    "first_row": "i32",
    "stride": "i32",
    "dim": "i32",
    "scale_step": "i32",
    "base_weight_step": "i32",
    "position_step": "i32",
    "groups": "i32",
    "top_k": "i32",
    "top_p_bits": "i64",
    "log_min_p_bits": "i64",
}
POINTERS = {
    "actions_ptr": "*i64",
    "cu_ptr": "*i32",
    "counts_ptr": "*i32",
    "scale_ptr": "*fp64",
    "base_weight_ptr": "*fp64",
    "seed_ptr": "*i64",
    "position_ptr": "*i64",
    "workspace_ptr": "*i32",
    "tokens_out": "*i64",
}
LOGITS = ("base_ptr", "q_ptr", "grad_ptr", "p_ptr", "weight_ptr", "u_ptr", "x_ptr", "out_ptr")


def compile_for(
    kernel, arch, constants, warps, logits="fp32", *, aligned=(), stages=3, fusion=True, types=None
):
    """`aligned`: arguments that are divisible by 16, as the launcher would find out; `types`: of
    some arguments, others than usual."""
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
    signature |= types or {}
    indices = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    hints = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=indices, attrs=hints)
    options = {"num_warps": warps, "enable_fp_fusion": fusion, "num_stages": stages}
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


def check_resources(compiled, tmp_path, title, *, stack=0):
    """No more stack than that and no local memory: no spills. Prints the registers."""
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
    assert usage["STACK"] <= stack, title
    assert usage["LOCAL"] == 0, title
    return usage["REG"]
