"""Rows of the install matrix for versions of torch and of Triton, run on the CPU.

Triton is small and comes from the index; torch is gigabytes, and taken from an interpreter that was
named with --also, or downloaded where --download allows it. What runs is the source tree with the
extension that was built in it, with one torch for all of them.
"""

import re
import shutil
import sys
from pathlib import Path
from typing import Any

from tests.packaging.installing import (
    ROOT,
    CaseFailed,
    Environment,
    SkipCase,
    call,
    expect,
    pip,
)

TORCHES = ("2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0")
TRITONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow")
OPERATIONS = ("tests/ops/test_no_rows.py", "tests/ops/test_kl.py", "tests/ops/test_launches.py")
OPERATIONS += ("tests/kernels/test_linear_head.py", "tests/csrc/cpu/test_low_rank.py")
INTERPRETED = ("tests/kernels/test_linear_bwd.py", "tests/kernels/test_lora_add.py")
INTERPRETED += ("tests/kernels/test_linear.py", "tests/kernels/test_sample.py", "-k")
INTERPRETED += ("linear_bwd or lora_add or without_a_base or one_seed or cached",)
COMPILED = ("tests/kernels/test_compiled.py", "-k", "90 and (lora or linear_backward or draw)")
VERSION = "import {0}; print({0}.__version__)"


def run_tests(python: Path, tree: Path, what: tuple[str, ...], **env: str) -> str:
    """The last line of what pytest says."""
    printed = call([python, *PYTEST, *what], cwd=tree, OMP_NUM_THREADS="1", **env)
    expect(" passed" in printed, printed[-2000:])
    return printed.splitlines()[-1]


def fetch(environment: Environment, *requirements: str) -> None:
    """With what they require; what is linked in under these names makes room."""
    for requirement in requirements:
        name = requirement.partition("=")[0].partition("<")[0]
        for link in environment.site.iterdir():
            if link.is_symlink() and link.name.partition("-")[0].partition(".")[0] == name:
                link.unlink()
    try:
        pip("install", "-q", *requirements, python=environment.python)
    except CaseFailed as error:
        if "No matching distribution found" in str(error):
            raise SkipCase("needs a package index") from None
        raise


def triton_row(version: str, matrix: Any) -> None:
    environment, tree = matrix.environment("all"), matrix.source()
    # Triton 3.6's interpreter: loops over tensor bounds fail with numpy 2.4.
    fetch(environment, f"triton=={version}", *(["numpy<2.4"] if version < "3.7" else []))
    expect(environment.run(VERSION.format("triton")) == version, "another Triton is imported")
    interpreted = run_tests(environment.python, tree, INTERPRETED, TRITON_INTERPRET="1")
    compiled = run_tests(environment.python, tree, COMPILED)
    matrix.notes.append(f"Triton {version}: interpreted {interpreted}; for sm_90 {compiled}")


def torch_of(version: str, matrix: Any) -> Path:
    """A Python that has this torch, pytest and transformers."""
    for python in map(Path.absolute, [Path(sys.executable), *matrix.also]):
        if call([python, "-c", VERSION.format("torch")], cwd=python.parent).startswith(version):
            return python
    if not matrix.download:
        raise SkipCase("no --also interpreter has it, and no --download")
    environment: Environment = matrix.environment("nothing")
    fetch(environment, f"torch=={version}", "numpy<2.4", "pytest", "transformers", "peft")
    return environment.python


def torch_row(version: str, matrix: Any) -> None:
    extension = ROOT / "qadapter" / "_C_cpu.abi3.so"
    if not extension.exists():
        raise SkipCase("needs the extension in the tree: setup.py build_ext --inplace")
    python, tree = torch_of(version, matrix), matrix.source()
    shutil.copy(extension, tree / "qadapter")
    report = call([python, "-m", "qadapter.cli", "env"], cwd=tree)
    expect("ok, max err" in report and "WRONG" not in report, report)
    expect(re.search(r"^cpp +available +ok", report, re.MULTILINE), report)
    operations = run_tests(python, tree, OPERATIONS)
    triton = call([python, "-c", VERSION.format("triton")], cwd=tree)
    interpreted = run_tests(python, tree, INTERPRETED, TRITON_INTERPRET="1")
    note = f"{operations}; with its Triton {triton}, interpreted: {interpreted}"
    matrix.notes.append(f"torch {version}: {note}")
