"""The portable vector code becomes NEON on 64-bit Arm, and is right there (in an emulator).

Needs what Debian calls g++-aarch64-linux-gnu and qemu-user.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from qadapter.ops import cpp

ROOT = Path(__file__).resolve().parents[3]
COMPILER, EMULATOR, READER = (
    "aarch64-linux-gnu-g++",
    "qemu-aarch64",
    "aarch64-linux-gnu-objdump",
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if missing := [name for name in (COMPILER, EMULATOR, READER) if shutil.which(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    path = tmp_path_factory.mktemp("arm") / "vector_code"
    includes = [f"-I{folder}" for folder in (ROOT / "csrc", *cpp_extension.include_paths())]
    stable = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]
    source = Path(__file__).with_name("vector_code.cpp")
    command = [COMPILER, "-std=c++20", "-O3", "-static", *stable, *includes, source, "-o", path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return path


def test_kernels_agree_with_float64(program):
    done = subprocess.run([EMULATOR, program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 32


@pytest.mark.parametrize("kernel", ["add_block", "bwd_piece", "multiply"])
def test_loops_are_neon_without_calls(program, kernel):
    command = [READER, "--disassemble", "--demangle", program]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = re.findall(rf"^\w+ <([^\n]*\b{kernel}<[^\n]*)>:\n(.*?)\n\n", text, re.M | re.S)
    assert functions
    for name, body in functions:
        assert re.search(r"\bfmla\s+v\d+\.4s", body), name
        called = set(re.findall(r"\bbl\s+\w+ <([^>+]*)", body))
        # of a maximum that rises, once a block; zeros for rows without a gradient
        assert not {f for f in called if re.match(r"_*(exp|log|pow|fma)f?$", f)}, (name, called)


def test_the_name_is_neon():
    assert cpp.portable_name("aarch64") == cpp.portable_name("arm64") == "neon"
    assert cpp.portable_name("x86_64") == cpp.portable_name("AMD64") == "plain"
