"""Builds the optional C++ extension; all else about the package is static, in pyproject.toml.

The extension is compiled against LibTorch's stable ABI and CPython's limited API, so one wheel
(cp311-abi3) serves every torch from 2.11 and every CPython from 3.11. Nothing fails without it:
with no torch, no compiler or a failing compile the result is a pure-Python wheel, and
`qadapter/_build_info.json` keeps the reason for `qadapter env`.

QADAPTER_BUILD=0 leaves the extension out; QADAPTER_BUILD=cpu makes a missing extension an error.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import site
import sys
import sysconfig
import warnings
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
SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/cpu/*.cpp"))
# Metadata hooks run this file too, and must not pay for importing torch.
BUILDING = bool({"bdist_wheel", "editable_wheel", "build", "build_ext"} & set(sys.argv))


def borrow_torch() -> None:
    """Let an isolated build see the torch that is installed where the package will go.

    Listing torch in `build-system.requires` would make pip download the newest torch (gigabytes)
    into a throw-away environment on every build, although the installed one, if >= 2.11, gives the
    same extension. pip's isolated build runs the target environment's interpreter with its
    site-packages hidden, so they are appended here, behind the build requirements. uv and
    `python -m build` make a separate environment instead: there this finds nothing and the build
    is pure Python.
    """
    if importlib.util.find_spec("torch") is None:
        for base in {sys.prefix, sys.base_prefix}:
            paths = {"base": base, "platbase": base}
            site.addsitedir(sysconfig.get_path("platlib", vars=paths))
        importlib.invalidate_caches()


def why_not() -> str | None:
    """The reason why the extension cannot be built here, or None."""
    if MODE == "0":
        return "left out by QADAPTER_BUILD=0"
    if not SOURCES:
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


def say(reason: str) -> None:
    # a warning and not a print: pip hides what a build prints, but newer ones pass warnings on
    warnings.warn(f"qadapter is built without its C++ extension: {reason}", stacklevel=2)


def record(folder: str | Path, reason: str | None) -> None:
    path = Path(folder, "qadapter", "_build_info.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cpu": reason or "built"}) + "\n")


def cpu_extension() -> Extension:
    from torch.utils.cpp_extension import CppExtension, include_paths

    # Neither the paths of this machine nor debug information belong in a wheel.
    prefixes = [f"{ROOT}{os.sep}", *(f"{path}{os.sep}" for path in include_paths())]
    unix_flags = ["-O3", "-g0", *(f"-ffile-prefix-map={prefix}=" for prefix in prefixes)]
    return CppExtension(
        "qadapter._C_cpu",
        SOURCES,
        include_dirs=[str(ROOT / "csrc")],
        depends=sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/*/*.h")),
        # No -std: torch sets the one its headers need. No -march: the kernels choose at run time.
        extra_compile_args=["/O2"] if os.name == "nt" else unix_flags,
        define_macros=[
            ("TORCH_TARGET_VERSION", "0x020b000000000000"),
            ("TORCH_STABLE_ONLY", None),
        ],
        py_limited_api=True,
    )


def drop_stale() -> None:
    """An extension that an earlier build left in the source tree must not pass for this one's."""
    for path in ROOT.glob("qadapter/_C_cpu.*"):
        path.unlink()


if MODE not in ("auto", "0", "cpu"):
    raise SystemExit(f"qadapter: QADAPTER_BUILD must be auto, 0 or cpu, not {MODE!r}")
reason = why_not() if BUILDING else "not building"
if reason is None:
    from torch.utils.cpp_extension import BuildExtension

    # ninja may be installed beside an interpreter that was called without activating its venv
    os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")
elif MODE == "cpu" and BUILDING:
    raise SystemExit(f"qadapter: QADAPTER_BUILD=cpu, but {reason}")
else:
    BuildExtension = build_ext
    if BUILDING:
        say(reason)


class OptionalBuildExt(BuildExtension):
    """Turns any failure into a pure-Python build, unless the extension was asked for."""

    def run(self) -> None:
        in_source = self.inplace
        failure = reason
        if self.extensions:
            try:
                super().run()
            except (Exception, SystemExit) as error:
                if MODE == "cpu":
                    raise
                failure = f"compiling failed ({error}); QADAPTER_BUILD=cpu and pip -v show how"
                say(failure)
                self.extensions = self.distribution.ext_modules = []
        if failure is not None and in_source:
            drop_stale()
        record(ROOT if in_source else self.build_lib, failure)


class BuildPy(build_py):
    """Adds the reason for a missing extension to the package."""

    def run(self) -> None:
        super().run()
        if reason is not None:
            if self.editable_mode:
                drop_stale()
            record(ROOT if self.editable_mode else self.build_lib, reason)


class BdistWheel(bdist_wheel):
    """Tags the wheel by what was really built, which is known only after compiling."""

    def run(self) -> None:
        build = self.get_finalized_command("build")
        shutil.rmtree(build.build_lib, ignore_errors=True)  # what an earlier build left there
        self.run_command("build")
        self.skip_build = True
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


setup(
    ext_modules=[cpu_extension()] if reason is None else [],
    cmdclass={"build_ext": OptionalBuildExt, "build_py": BuildPy, "bdist_wheel": BdistWheel},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if reason is None else {},
)
