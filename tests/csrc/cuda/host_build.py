"""The CUDA kernels compiled for a host: the files of csrc/cuda as they are, on emulator.h.

Its operations take CPU tensors and are registered as `torch.ops.qadapter_cuda_host`. It needs a C++
compiler and x86-64, and neither nvcc nor a GPU.
"""

import functools
import platform
import shutil
import subprocess
import tempfile
from multiprocessing.pool import ThreadPool
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).parent
ROOT = Path(__file__).resolve().parents[3]
FLAGS = ["-std=c++20", "-O2", "-g0", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra"]
# nvcc's attributes are macros here, and lambdas of a struct's members look unused
FLAGS += ["-Wno-unused-parameter", "-Wno-missing-field-initializers", "-Werror"]
MACROS = [
    "-DQADAPTER_EMULATED",
    "-DQADAPTER_CUDA_LIBRARY=qadapter_cuda_host",
    "-DQADAPTER_CUDA_KEY=CPU",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    "-DTORCH_STABLE_ONLY",
]
ONLY_FOR_GPUS = {"status.cu", "module.cpp"}


def why_not() -> str | None:
    if platform.machine() != "x86_64":
        return "the emulator's context switch is for x86-64"
    if shutil.which("c++") is None:
        return "no C++ compiler"
    if not any(ROOT.glob("csrc/cuda/*.cu")):
        return "no sources"
    return None


def _compile(source: Path, out: Path) -> Path:
    includes = [f"-I{ROOT / 'csrc'}", f"-I{HERE}"]
    includes += [f"-isystem{path}" for path in include_paths()]
    target = out / f"{source.name}.o"
    command = ["c++", *FLAGS, *MACROS, *includes, "-x", "c++", "-c", source, "-o", target]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return target


def build(library: Path) -> None:
    sources = [*ROOT.glob("csrc/cuda/*.cu"), *ROOT.glob("csrc/cuda/*.cpp")]
    sources = [path for path in sources if path.name not in ONLY_FOR_GPUS]
    with tempfile.TemporaryDirectory() as folder:
        all_sources = [HERE / "emulator.cpp", *sorted(sources)]
        with ThreadPool(2) as pool:
            objects = pool.map(lambda path: _compile(path, Path(folder)), all_sources)
        paths = [f"-L{path}" for path in library_paths()]
        command = ["c++", "-shared", *objects, *paths, "-ltorch_cpu", "-lc10", "-o", library]
        subprocess.run(command, check=True)


@functools.cache
def load(library: Path) -> object:
    """`torch.ops.qadapter_cuda_host`."""
    torch.ops.load_library(str(library))
    return torch.ops.qadapter_cuda_host
