"""Installs the package in every way that people do, in fresh environments, and tries it there.

    make wheel-test
    python -m tests.packaging.install_matrix [--only TEXT] [--also PYTHON] [--download] [--list]

Standard library only. Every environment is new; torch and, where a case wants them, the other
dependencies are those of the interpreter that runs this, linked in (they are gigabytes). A case
fails if it installs what it should not, lacks what it should have, or computes a wrong number.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests.packaging.installing import (
    ROOT,
    CaseFailed,
    Environment,
    SkipCase,
    call,
    copy_source,
    distributions,
    expect,
    pip,
)
from tests.packaging.version_rows import TORCHES, TRITONS, torch_row, triton_row

REPORT = """
import importlib.util, json, pathlib, qadapter
folder = pathlib.Path(qadapter.__file__).parent
note = folder / "_build_info.json"
print(json.dumps({
    "folder": str(folder),
    "info": json.loads(note.read_text()) if note.exists() else {},
    "kernels": sorted(path.name for path in (folder / "kernels").glob("*.py")),
    "backends": {b.name: [b.available, b.reason] for b in qadapter.backends()},
}))
"""
FROM_THE_ROOT = """
import transformers
from transformers import LlamaForCausalLM, Trainer
from transformers.utils import is_kernels_available
import importlib.util, qadapter
assert importlib.util.find_spec('qadapter.kernels.common')
print(is_kernels_available())
"""


@dataclass
class Matrix:
    """What the cases share: where they work, and the artifacts, which are built once."""

    folder: Path
    also: list[Path] = field(default_factory=list)
    download: bool = False  # torch, too
    notes: list[str] = field(default_factory=list)
    _artifacts: tuple[Path, Path] | None = None
    _count: int = 0

    def source(self) -> Path:
        return copy_source(self.scratch() / "tree")

    def scratch(self) -> Path:
        self._count += 1
        folder = self.folder / str(self._count)
        folder.mkdir()
        return folder

    def environment(self, sees: str) -> Environment:
        return Environment(self.scratch() / "env", sees)

    def artifacts(self) -> tuple[Path, Path]:
        """sdist, and the wheel that was built from it, by `python -m build`."""
        if self._artifacts is None:
            if importlib.util.find_spec("build") is None:
                raise SkipCase("needs the package build")
            out = self.scratch()
            try:
                call([sys.executable, "-m", "build", "--outdir", out, self.source()])
            except CaseFailed as error:
                if "No matching distribution found for setuptools" in str(error):
                    raise SkipCase("an isolated build needs a package index") from None
                raise
            (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
            self._artifacts = sdist, wheel
        return self._artifacts

    def sdist(self) -> Path:
        return self.artifacts()[0]

    def wheel(self) -> Path:
        return self.artifacts()[1]


def kernel_names() -> list[str]:
    return sorted(path.name for path in (ROOT / "qadapter" / "kernels").glob("*.py"))


def try_out(environment: Environment, where: Path, why_no_extension: str | None = None) -> None:
    """Complete, at ``where``, with right numbers, and the extension or the reason for none."""
    report = json.loads(environment.run(REPORT))
    expect(Path(report["folder"]) == where / "qadapter", f"it is at {report['folder']}")
    expect(report["kernels"] == kernel_names(), f"Triton kernels: {report['kernels']}")
    available, reason = report["backends"]["cpp"]
    if why_no_extension is None:
        expect(available and report["info"].get("cpu") == "built", reason)
    else:
        expect(not available and why_no_extension in reason, f"cpp: {available}, {reason}")
    printed = call([environment.bin / "qadapter", "env"], cwd=environment.elsewhere)
    expect("ok, max err" in printed and "FAILED" not in printed, printed)
    expect("WRONG" not in printed, printed)
    if why_no_extension is not None:
        expect(why_no_extension in printed, f"`qadapter env` does not say why:\n{printed}")
    environment.run(torch_only_example())


def torch_only_example() -> str:
    """The first Python block of the README that needs nothing but torch."""
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        imported = set(re.findall(r"^(?:from|import) (\w+)", block, re.MULTILINE))
        if imported <= {"torch", "qadapter"} and "torch" in imported:
            return block
    raise CaseFailed("README.md has no example that needs nothing but torch")


def can_compile() -> None:
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        raise SkipCase("needs a C++ compiler")


def without_compiler(matrix: Matrix) -> dict[str, str]:
    return {"PATH": str(matrix.scratch()), "CXX": "no-such-compiler", "CUDA_HOME": "/nonexistent"}


def note_wheel(matrix: Matrix, how: str, seconds: float, wheel: Path) -> None:
    size = wheel.stat().st_size / 1024
    matrix.notes.append(f"wheel, {how}: {seconds:.0f} s, {wheel.name}, {size:.0f} KiB")
    if shutil.which("readelf"):
        out = matrix.scratch()
        shutil.unpack_archive(wheel, out, "zip")
        extensions = sorted(out.glob("qadapter/*.so"))
        symbols = ROOT / "tests" / "packaging" / "symbols.py"
        matrix.notes.append(call([sys.executable, symbols, *extensions]))


CASES: dict[str, Callable[[Matrix], None]] = {}


def case(title: str) -> Callable[[Callable[[Matrix], None]], Callable[[Matrix], None]]:
    def add(function: Callable[[Matrix], None]) -> Callable[[Matrix], None]:
        CASES[title] = function
        return function

    return add


@case("python -m build: sdist, and the wheel from it")
def build(matrix: Matrix) -> None:
    can_compile()
    start = time.perf_counter()
    sdist, wheel = matrix.artifacts()
    seconds = time.perf_counter() - start
    expect("-cp311-abi3-" in wheel.name, wheel.name)
    matrix.notes.append(f"sdist: {sdist.stat().st_size / 1024:.0f} KiB")
    note_wheel(matrix, "`python -m build`", seconds, wheel)


@case("wheel, beside torch alone")
def wheel_torch_only(matrix: Matrix) -> None:
    environment = matrix.environment("torch")
    environment.install(matrix.wheel())
    hidden = environment.run("import importlib.util as u; print(u.find_spec('transformers'))")
    expect(hidden == "None", "the environment has more than torch")
    try_out(environment, environment.site)


@case("wheel, beside all dependencies")
def wheel(matrix: Matrix) -> None:
    environment = matrix.environment("all")
    environment.install(matrix.wheel())
    try_out(environment, environment.site)
    environment.run("from qadapter import QAdapterConfig, QAdapterModel, QAdapterTrainer")


@case("from the repository root")
def from_root(matrix: Matrix) -> None:
    environment = matrix.environment("all")
    environment.install(matrix.wheel())
    printed = environment.run(FROM_THE_ROOT, cwd=matrix.source())
    expect(printed.splitlines()[-1] == "False", "transformers takes kernels/ for the package")


@case("from the repository root, with the package kernels")
def from_root_with_kernels(matrix: Matrix) -> None:
    """A stand-in with the version that transformers asks for, so that no index is needed."""
    environment = matrix.environment("all")
    environment.install(matrix.wheel())
    lowest = environment.run(
        "from transformers.utils import import_utils as u; print(u.KERNELS_MIN_VERSION)"
    )
    package = environment.site / "kernels"
    package.mkdir()
    # transformers imports names from it: any will do, and each can be called or used as decorator
    (package / "__init__.py").write_text(
        "class Stub:\n"
        "    def __init__(self, *args, **kwargs): pass\n"
        "    def __call__(self, first=None, *args, **kwargs): return first\n"
        "def __getattr__(name):\n"
        "    if name.startswith('__'): raise AttributeError(name)\n"
        "    return Stub if name[0].isupper() else (lambda *a, **k: Stub())\n"
    )
    info = environment.site / f"kernels-{lowest}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {lowest}\n")
    printed = environment.run(FROM_THE_ROOT, cwd=matrix.source())
    expect(printed.splitlines()[-1] == "True", "kernels/ hides the package of that name")


@case("sdist, isolated build")
def sdist(matrix: Matrix) -> None:
    can_compile()
    environment = matrix.environment("torch")
    environment.install(matrix.sdist())
    try_out(environment, environment.site)


@case("sdist, uv")
def sdist_uv(matrix: Matrix) -> None:
    can_compile()
    if shutil.which("uv") is None:
        raise SkipCase("needs uv")
    environment = matrix.environment("torch")
    command = ["uv", "pip", "install", "-q", "--no-deps", matrix.sdist()]
    call(command, VIRTUAL_ENV=str(environment.bin.parent))
    try_out(environment, environment.site)


@case("sdist, no compiler on PATH")
def sdist_no_compiler(matrix: Matrix) -> None:
    environment = matrix.environment("torch")
    environment.install(matrix.sdist(), **without_compiler(matrix))
    try_out(environment, environment.site, "no-such-compiler")


@case("sdist, no torch in sight of the build")
def sdist_no_torch(matrix: Matrix) -> None:
    if (Path(sysconfig.get_path("purelib", vars={"base": sys.base_prefix})) / "torch").exists():
        raise SkipCase("the base interpreter has a torch that the build may borrow")
    environment = matrix.environment("nothing")
    environment.install(matrix.sdist())
    environment.link(distributions("torch"))  # which comes after the package
    try_out(environment, environment.site, "--no-build-isolation")


@case("sdist, QADAPTER_BUILD=0")
def sdist_left_out(matrix: Matrix) -> None:
    environment = matrix.environment("torch")
    environment.install(matrix.sdist(), QADAPTER_BUILD="0")
    try_out(environment, environment.site, "QADAPTER_BUILD=0")


@case("sdist, QADAPTER_BUILD=cpu without a compiler is an error")
def sdist_asked_for(matrix: Matrix) -> None:
    environment = matrix.environment("torch")
    try:
        environment.install(matrix.sdist(), QADAPTER_BUILD="cpu", **without_compiler(matrix))
    except CaseFailed as error:
        expect("no-such-compiler" in str(error), f"the error does not say why: {error}")
    else:
        raise CaseFailed("it was installed without the extension that was asked for")


@case("sdist, QADAPTER_BUILD=cuda: nvcc, no GPU")
def sdist_cuda(matrix: Matrix) -> None:
    can_compile()
    if not (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()):
        raise SkipCase("needs nvcc")
    environment, out = matrix.environment("torch"), matrix.scratch()
    start = time.perf_counter()
    command = ("wheel", "-q", "--no-deps", "-w", out, matrix.sdist())
    pip(*command, python=environment.python, QADAPTER_BUILD="cuda")
    (wheel,) = out.glob("*-cp311-abi3-*.whl")
    note_wheel(matrix, "with the CUDA kernels", time.perf_counter() - start, wheel)
    environment.install(wheel)
    try_out(environment, environment.site)
    available, reason = json.loads(environment.run(REPORT))["backends"]["cuda"]
    expect(available or not re.search("not built|cannot be loaded", reason), reason)


@case("editable, not isolated")
def editable(matrix: Matrix) -> None:
    can_compile()
    environment, tree = matrix.environment("all"), matrix.source()
    environment.install(tree, "--no-build-isolation", "-e")
    try_out(environment, tree)
    printed = environment.run(FROM_THE_ROOT, cwd=tree)
    expect(printed.splitlines()[-1] == "False", "transformers takes kernels/ for the package")


@case("editable, isolated, no compiler on PATH")
def editable_no_compiler(matrix: Matrix) -> None:
    environment, tree = matrix.environment("torch"), matrix.source()
    environment.install(tree, "-e", **without_compiler(matrix))
    try_out(environment, tree, "no-such-compiler")


@case("the same wheel under other interpreters")
def others(matrix: Matrix) -> None:
    if not matrix.also:
        raise SkipCase("none named with --also")
    folder = matrix.scratch()
    shutil.unpack_archive(matrix.wheel(), folder, "zip")
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\n"
    for python in map(Path.absolute, matrix.also):  # not resolved: a venv is known by its link
        report = json.loads(call([python, "-c", code + REPORT], cwd=folder).splitlines()[-1])
        available, reason = report["backends"]["cpp"]
        expect(available, f"{python}: {reason}")
        check = (
            "from qadapter import environment as e; print(e.report()); assert e.all_checks_pass()"
        )
        printed = call([python, "-c", code + check], cwd=folder)
        versions = [" ".join(line.split()) for line in printed.splitlines()[:4]]
        line = next(line for line in printed.splitlines() if line.startswith("cpp"))
        matrix.notes.append(f"{', '.join(versions[:1] + versions[3:])}: {' '.join(line.split())}")


for version in TRITONS:
    CASES[f"Triton {version}, on the CPU"] = partial(triton_row, version)
for version in TORCHES:
    CASES[f"torch {version}, on the CPU"] = partial(torch_row, version)


def run(title: str, matrix: Matrix) -> tuple[str, str]:
    """Outcome ("ok", "skipped", "FAILED") and what there is to say about it."""
    try:
        CASES[title](matrix)
    except SkipCase as reason:
        return "skipped", str(reason)
    except (CaseFailed, subprocess.TimeoutExpired, OSError) as error:
        return "FAILED", str(error)
    return "ok", ""


@contextlib.contextmanager
def working_folder(keep: Path | None) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="install-matrix-") as folder:
            yield Path(folder)
    else:
        keep.mkdir(parents=True)
        yield keep.resolve()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", help="cases whose title contains this")
    also = "another interpreter, with a torch of its own, to try the wheel in"
    parser.add_argument("--also", type=Path, action="append", default=[], help=also)
    parser.add_argument("--download", action="store_true", help="torch, where none has it: 3 GB")
    parser.add_argument("--keep", type=Path, help="work in this new folder, and leave it there")
    parser.add_argument("--list", action="store_true", help="print the titles and stop")
    args = parser.parse_args()
    titles = [title for title in CASES if args.only in title]
    if args.list or not titles:
        print("\n".join(CASES))
        sys.exit(not args.list)
    failures = []
    with working_folder(args.keep) as folder:
        matrix = Matrix(folder, args.also, args.download)
        width = max(map(len, titles))
        print(f"python {sys.version.split()[0]}, torch {importlib.metadata.version('torch')}\n")
        print(f"{'case':{width}}  {'seconds':>7}  result")
        for title in titles:
            start = time.perf_counter()
            outcome, why = run(title, matrix)
            seconds = time.perf_counter() - start
            brief = f"{outcome}: {why}" if outcome == "skipped" else outcome
            print(f"{title:{width}}  {seconds:7.1f}  {brief}", flush=True)
            if outcome == "FAILED":
                failures.append(f"== {title}\n{why}")
        print("\n" + "\n".join([*matrix.notes, *failures]))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
