"""Builds the two optional extensions; all else about the package is static, in pyproject.toml.

    qadapter._C_cpu     C++ kernels for the CPU
    qadapter._C_cuda    CUDA kernels; needs nvcc, and no GPU

They are compiled against LibTorch's stable ABI and CPython's limited API, so one wheel
(cp311-abi3) serves every torch from 2.11 and every CPython from 3.11. Nothing fails without them:
with no torch, no compiler or a failing compile the result is a pure-Python wheel, and
`qadapter/_build_info.json` keeps the reasons for `qadapter env`.

QADAPTER_BUILD says what is wanted:

    auto    the default: what can be built; CUDA where nvcc is found and torch is a CUDA build
    0       neither
    cpu     the first; its absence is an error
    cuda    both; the absence of either is an error. torch may be a CPU build
"""

import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # only without isolation, where nobody checks build-system.requires
    raise SystemExit("qadapter: pip install 'setuptools>=77.0.3' first") from None

ROOT = Path(__file__).resolve().parent
MIN_TORCH = (2, 11)  # the stable ABI is complete enough from here on; also in pyproject.toml
MODE = os.environ.get("QADAPTER_BUILD", "auto")
# Metadata hooks run this file too, and must not pay for importing torch.
BUILDING = bool({"bdist_wheel", "editable_wheel", "build", "build_ext"} & set(sys.argv))
MIN_NVCC = (12, 8)  # the first that knows sm_100
# Binaries for Ampere, Hopper and Blackwell, and PTX that a driver compiles for all others.
CUDA_TARGETS = ("80,code=sm_80", "80,code=compute_80", "90a,code=sm_90a", "100,code=sm_100")
JOB_BYTES = 2 << 30  # nvcc and the C++ compiler need about 1 GB a job, and others need some, too


def jobs() -> int:
    """How many compilers at a time, where MAX_JOBS does not say: by cores and by memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not POSIX
        return min(2, cores or 1)
    return max(1, min(cores or 1, memory // JOB_BYTES))


os.environ.setdefault("MAX_JOBS", str(jobs()))


def files(*patterns: str) -> list[str]:
    return sorted(
        path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern)
    )


SOURCES = {
    "cpu": files("csrc/cpu/*.cpp"),
    "cuda": files("csrc/cuda/*.cpp", "csrc/cuda/*.cu"),
}


def environments() -> Iterator[str]:
    """Where torch may be installed, the likeliest place first."""
    # pip's isolated build runs the target environment's interpreter with its site-packages hidden.
    yield from (sys.prefix, sys.base_prefix)
    # `python -m build` and uv make an environment of their own. What is meant is the active one ...
    yield from filter(None, map(os.environ.get, ("VIRTUAL_ENV", "CONDA_PREFIX")))
    # ... which uv hides, or the .venv that uv finds, or that of the python in `python -m build`:
    # the process that started this one knows.
    caller = Path(f"/proc/{os.getppid()}")
    try:
        command = os.fsdecode((caller / "cmdline").read_bytes()).split("\0")
        variables = os.fsdecode((caller / "environ").read_bytes()).split("\0")
        folder = (caller / "cwd").resolve()
    except OSError:  # not Linux
        return
    if Path(command[0]).name == "uv":
        active = dict(pair.partition("=")[::2] for pair in variables)
        yield active.get("VIRTUAL_ENV") or str(folder / ".venv")
    elif os.path.isabs(command[0]):
        yield str(Path(command[0]).parent.parent)


@functools.cache
def borrow_torch() -> str:
    """Let an isolated build see the torch that is installed where the package will go.

    Listing torch in `build-system.requires` would make pip download the newest torch (gigabytes)
    into a throw-away environment on every build, although the installed one, if >= 2.11, gives the
    same extension. So the site-packages that have one are appended here, behind the build
    requirements. Where there is none the build is pure Python. Returns the environment.
    """
    found = sys.prefix
    for prefix in environments():
        if importlib.util.find_spec("torch") is not None:
            break
        found = prefix
        paths = {"base": prefix, "platbase": prefix}
        site.addsitedir(sysconfig.get_path("platlib", vars=paths))
        importlib.invalidate_caches()
    return found


def why_not_cpu() -> str | None:
    """The reason why no extension can be built here, or None."""
    if MODE == "0":
        return "left out by QADAPTER_BUILD=0"
    if not SOURCES["cpu"]:
        return "no sources in csrc/cpu"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "free-threaded CPython has no limited API"
    borrow_torch()
    if importlib.util.find_spec("torch") is None:
        return (
            "torch was not visible to the build; install torch first, then run "
            "`pip install --no-build-isolation` on the source"
        )
    version = importlib.metadata.version("torch")
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < MIN_TORCH:
        return f"torch {version} is older than {'.'.join(map(str, MIN_TORCH))}"
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if os.name != "nt" and shutil.which(compiler) is None:
        return f"no C++ compiler: {compiler} is not on PATH"
    return None


def toolkit_of(nvcc: Path) -> Path | None:
    """The CUDA folder of an nvcc, which may be a link to the real one or a script that calls it."""
    toolkit = nvcc.resolve().parent.parent
    if not (toolkit / "include" / "cuda_runtime.h").is_file():
        command = [str(nvcc), "--dryrun", "-x", "cu", os.devnull]
        try:
            plan = subprocess.run(command, capture_output=True, text=True, timeout=60).stderr
        except (OSError, subprocess.SubprocessError):
            return None
        top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
        toolkit = Path(top[1].strip()).resolve() if top else toolkit
    return toolkit if (toolkit / "bin" / "nvcc").is_file() else None


def find_cuda() -> Path | None:
    """The CUDA folder: CUDA_HOME or CUDA_PATH, that of the nvcc on PATH, or /usr/local/cuda."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        return toolkit_of(Path(named, "bin", "nvcc"))
    on_path = shutil.which("nvcc")
    found = toolkit_of(Path(on_path)) if on_path else None
    return found or toolkit_of(Path("/usr/local/cuda/bin/nvcc"))


def why_not_cuda() -> str | None:
    """Why the CUDA extension is left out where the other one can be built; None if it is not."""
    if MODE == "cpu":
        return "left out by QADAPTER_BUILD=cpu"
    if not SOURCES["cuda"]:
        return "no sources in csrc/cuda"
    if not sys.platform.startswith("linux"):
        return f"CUDA kernels are built on Linux, not on {sys.platform}"
    cuda = find_cuda()
    if cuda is None:
        return "no nvcc: neither in CUDA_HOME nor on PATH nor in /usr/local/cuda"
    if MODE == "auto":
        import torch

        if torch.version.cuda is None:
            return f"torch {torch.__version__} is not a CUDA build; QADAPTER_BUILD=cuda builds them"
    version = subprocess.run([cuda / "bin" / "nvcc", "--version"], capture_output=True, text=True)
    release = re.search(r"release (\d+)\.(\d+)", version.stdout)
    if release is None:
        return f"{cuda}/bin/nvcc does not run: {version.stderr.strip() or 'no version'}"
    if (int(release[1]), int(release[2])) < MIN_NVCC:
        return f"nvcc {release[1]}.{release[2]} is older than {MIN_NVCC[0]}.{MIN_NVCC[1]}"
    return None


def say(reason: str) -> None:
    # a warning and not a print: pip hides what a build prints, but newer ones pass warnings on
    warnings.warn(f"qadapter is built without its C++ extension: {reason}", stacklevel=2)


def record(folder: str | Path) -> None:
    """What was built, and else why not, for `qadapter env`."""
    path = Path(folder, "qadapter", "_build_info.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({name: why or "built" for name, why in reasons.items()}) + "\n")


def extension(name: str) -> Extension:
    from torch.utils import cpp_extension

    # Neither the paths of this machine nor debug information belong in a wheel.
    prefixes = [f"{ROOT}{os.sep}", *(f"{path}{os.sep}" for path in cpp_extension.include_paths())]
    maps = [f"-ffile-prefix-map={prefix}=" for prefix in prefixes]
    # What is inline in torch's headers must stay this module's own: exported, it might give way to
    # what another library, built from other headers, calls by the same name.
    hidden = ["-fvisibility=hidden"]
    # No -std: torch sets the one its headers need. No -march: the kernels choose at run time.
    flags = {"cxx": ["/O2"] if os.name == "nt" else ["-O3", "-g0", *hidden, *maps]}
    libraries: dict[str, list[str]] = {}
    if name == "cuda":
        cuda = find_cuda()
        cpp_extension.CUDA_HOME = str(cuda)  # torch's guess is wrong where nvcc is a script
        host = [part for flag in (*hidden, *maps) for part in ("-Xcompiler", flag)]
        targets = [f"-gencode=arch=compute_{target}" for target in CUDA_TARGETS]
        flags["nvcc"] = ["-O3", *host, *targets]
        # The static runtime: the extension then needs no CUDA library but the driver, loads
        # anywhere, and takes no part in which CUDA libraries torch brings.
        libraries = {"libraries": ["cudart_static", "rt", "dl", "pthread"]}
        libraries["library_dirs"] = [str(cuda / "lib64"), str(cuda / "lib")]
    return cpp_extension.CppExtension(
        f"qadapter._C_{name}",
        SOURCES[name],
        include_dirs=[str(ROOT / "csrc")],
        depends=files("csrc/*/*.h", "csrc/*/*.cuh"),
        extra_compile_args=flags,
        define_macros=[
            ("TORCH_TARGET_VERSION", "0x020b000000000000"),
            ("TORCH_STABLE_ONLY", None),
        ],
        py_limited_api=True,
        **libraries,
    )


def drop_stale() -> None:
    """An extension that an earlier build left in the source tree must not pass for this one's."""
    for name, why in reasons.items():
        for path in ROOT.glob(f"qadapter/_C_{name}.*") if why else ():
            path.unlink()


if MODE not in ("auto", "0", "cpu", "cuda"):
    raise SystemExit(f"qadapter: QADAPTER_BUILD must be auto, 0, cpu or cuda, not {MODE!r}")
wanted = {"cpu": ("cpu",), "cuda": ("cpu", "cuda")}.get(MODE, ())
reasons: dict[str, str | None] = {"cpu": "not building", "cuda": "not building"}
if BUILDING:
    reasons["cpu"] = why_not_cpu()
    reasons["cuda"] = reasons["cpu"] or why_not_cuda()
    for name in wanted:
        if reasons[name] is not None:
            raise SystemExit(f"qadapter: QADAPTER_BUILD={MODE}, but {reasons[name]}")
if reasons["cpu"] is None:
    from torch.utils.cpp_extension import BuildExtension

    # ninja may be installed beside an interpreter that was called without activating its venv
    scripts = sysconfig.get_path("scripts", vars={"base": borrow_torch()})
    os.environ["PATH"] += os.pathsep + scripts
else:
    BuildExtension = build_ext
    if BUILDING:
        say(reasons["cpu"])


class OptionalBuildExt(BuildExtension):
    """Leaves out what fails to compile, unless it was asked for."""

    def run(self) -> None:
        in_source, compiler = self.inplace, self.compiler
        built = []
        for extension in self.extensions:  # one by one: the other may still succeed
            name = extension.name.removeprefix("qadapter._C_")
            self.extensions, self.compiler = [extension], compiler
            try:
                super().run()
                built.append(extension)
            except (Exception, SystemExit) as error:
                if name in wanted:
                    raise
                reasons[name] = (
                    f"compiling failed ({error}); QADAPTER_BUILD={name} and pip -v show how"
                )
                say(f"{name}: {reasons[name]}")
        self.extensions = self.distribution.ext_modules = built
        if in_source:
            drop_stale()
        record(ROOT if in_source else self.build_lib)


class BuildPy(build_py):
    """Adds the reasons to a package without extensions; with some, `build_ext` does that."""

    def run(self) -> None:
        super().run()
        if reasons["cpu"] is not None:
            if self.editable_mode:
                drop_stale()
            record(ROOT if self.editable_mode else self.build_lib)


class BdistWheel(bdist_wheel):
    """Tags the wheel by what was really built, which is known only after compiling."""

    def run(self) -> None:
        build = self.get_finalized_command("build")
        shutil.rmtree(build.build_lib, ignore_errors=True)  # what an earlier build left there
        self.run_command("build")
        self.skip_build = True
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


extensions = [extension(name) for name, why in reasons.items() if why is None]
setup(
    ext_modules=extensions,
    cmdclass={"build_ext": OptionalBuildExt, "build_py": BuildPy, "bdist_wheel": BdistWheel},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if extensions else {},
)
