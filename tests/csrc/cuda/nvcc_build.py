"""What nvcc makes of the CUDA kernels: registers, spills, shared memory, and 16-byte accesses.

`python tests/csrc/cuda/nvcc_build.py` writes nvcc_resources.json anew, the table that the tests
hold every build against. Needs nvcc; no GPU.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
TABLE = Path(__file__).with_name("nvcc_resources.json")
SOURCES = sorted(path.name for path in ROOT.glob("csrc/cuda/*.cu"))
TARGETS = {"sm_80": "compute_80", "sm_90a": "compute_90a", "sm_100": "compute_100"}


@functools.cache
def find_nvcc() -> Path | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [Path(home, "bin/nvcc")] if home else []
    places += [Path(found) for found in [shutil.which("nvcc")] if found]
    places.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((place for place in places if os.access(place, os.X_OK)), None)


@functools.cache
def release() -> str:
    text = subprocess.run([find_nvcc(), "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    return found[1] if found else "unknown"


def find_cuobjdump() -> str | None:
    """That of the toolkit, or the one that Triton brings."""
    nvcc = find_nvcc()
    places = [nvcc.parent / "cuobjdump"] if nvcc else []
    try:
        import triton

        places.append(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    except ImportError:
        pass
    found = [str(place) for place in places if os.access(place, os.X_OK)]
    return found[0] if found else shutil.which("cuobjdump")


@functools.cache
def short_name(mangled: str) -> str:
    """`residual_fwd_kernel<bf16, 1, true>` of a symbol."""
    plain = subprocess.run(["c++filt", mangled], capture_output=True, text=True).stdout.strip()
    found = re.search(r"(\w+_kernel(?:<.*>)?)\(", plain)
    name = found[1] if found else plain
    return name.replace("qadapter::lowp::", "").replace("qadapter::cuda::", "")


def compile_source(name: str, out: Path) -> None:
    """object.o for all targets, and what ptxas says of it in log.txt, in a new folder ``out``."""
    targets = [f"-gencode=arch={arch},code={code}" for code, arch in TARGETS.items()]
    flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-Xptxas", "-v", "-lineinfo"]
    out.mkdir()
    command = [find_nvcc(), *flags, *targets, f"-I{ROOT / 'csrc'}"]
    command += ["-c", ROOT / "csrc/cuda" / name, "-o", out / "object.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    (out / "log.txt").write_text(done.stderr + done.stdout)


def resources(compiled: Path) -> dict[str, dict[str, list[int]]]:
    """Kernel -> target -> [registers, static shared memory, stack frame, spilled bytes]."""
    found: dict[str, dict[str, list[int]]] = defaultdict(dict)
    kernel = target = ""
    stack = spilled = 0
    for line in (compiled / "log.txt").read_text().splitlines():
        if entry := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            kernel, target = short_name(entry[1]), entry[2]
        elif frame := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            stack, spilled = int(frame[1]), int(frame[2]) + int(frame[3])
        elif used := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            found[kernel][target] = [int(used[1]), int(shared[1]) if shared else 0, stack, spilled]
    return dict(found)


def accesses(compiled: Path, cuobjdump: str) -> dict[tuple[str, str], tuple[int, int]]:
    """(Kernel, target) -> how many 16-byte loads and stores of global memory its SASS has."""
    command = [cuobjdump, "-sass", str(compiled / "object.o")]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {}
    target = kernel = ""
    for line in listing.splitlines():
        if arch := re.match(r"\s*(?:arch = |code for )(sm_\w+)", line):
            target = arch[1]
        elif function := re.match(r"\s*Function : (\S+)", line):
            kernel = short_name(function[1])
            found[kernel, target] = (0, 0)
        elif wide := re.search(r"\b(LDG|STG)\.E\S*\.128\b", line):
            loads, stores = found[kernel, target]
            found[kernel, target] = (loads + (wide[1] == "LDG"), stores + (wide[1] == "STG"))
    return found


def main() -> None:
    table = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in SOURCES:
            compile_source(name, Path(folder, name))
            table[name] = resources(Path(folder, name))
    rows = []
    for name, kernels in table.items():
        for kernel, targets in sorted(kernels.items()):
            rows.append(f"  {json.dumps(f'{name}: {kernel}')}: {json.dumps(targets)}")
    note = '  "columns": "registers, static shared memory, stack, spilled bytes",\n'
    text = f'{{\n  "nvcc": "{release()}",\n{note}' + ",\n".join(rows) + "\n}\n"
    TABLE.write_text(text)


if __name__ == "__main__":
    main()
