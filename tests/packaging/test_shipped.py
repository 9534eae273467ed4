"""Wheel, sdist and editable install ship what they should, with and without the extension."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

from tests.packaging import install_matrix, installing, symbols

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Without one, pytest skips what is parametrized with these.
EXTENSIONS = sorted(ROOT.glob("qadapter/_C_*.so"))
CAN_COMPILE = shutil.which("c++") is not None and any(ROOT.glob("csrc/cpu/*.cpp"))
TRY_IT = """
import torch, qadapter
from qadapter import functional as QF
values = QF.residual_values(torch.zeros(2, 5), torch.zeros(2, 5), torch.tensor([1, -100]))
assert values.q.tolist() == [0, 0], values
"""


def python(code: str, cwd: Path, executable: str = sys.executable, **env: str) -> str:
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [executable, "-c", code],
        cwd=cwd,
        env=clean | env,
        capture_output=True,
        text=True,
        timeout=installing.LIMIT,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def pip(*args: str | Path, **env: str) -> None:
    try:
        installing.pip(*args, **env)
    except installing.SkipCase as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree, so that building leaves nothing in the real one."""
    return installing.copy_source(tmp_path_factory.mktemp("source") / "qadapter")


def build_wheel(source: Path, out: Path, *options: str, **env: str) -> zipfile.ZipFile:
    pip("wheel", "-q", "--no-deps", "-w", out, *options, source, **env)
    (wheel,) = out.glob("*.whl")
    return zipfile.ZipFile(wheel)


@pytest.fixture(scope="module")
def pure_wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("pure")
    return build_wheel(source, out, "--no-build-isolation", QADAPTER_BUILD="0")


def build_info(wheel: zipfile.ZipFile) -> str:
    return json.loads(wheel.read("qadapter/_build_info.json"))["cpu"]


# The source tree


def test_kernels_folder_does_not_shadow_the_package_of_that_name() -> None:
    if not (ROOT / "kernels").is_dir():
        pytest.skip("an unpacked sdist has the kernels in qadapter/kernels only")
    assert not (ROOT / "kernels" / "__init__.py").exists()
    spec = "import importlib.util as u; s = u.find_spec('kernels'); print(s and s.origin)"
    origin = python(spec, ROOT)
    # Nothing, a namespace (no file), or an installed distribution; never a file of this project.
    assert origin == "None" or not Path(origin).resolve().is_relative_to(ROOT / "kernels")


def test_transformers_models_import_from_the_repo_root() -> None:
    pytest.importorskip("transformers")
    assert python("from transformers import LlamaForCausalLM as M; print(M.__name__)", ROOT)


def test_kernels_link_is_relative() -> None:
    link = ROOT / "qadapter" / "kernels"
    if not link.is_symlink():
        pytest.skip("not a checkout")
    assert os.readlink(link) == os.path.join("..", "kernels")


def test_every_folder_with_modules_is_a_listed_package() -> None:
    folders = {path.parent for path in (ROOT / "qadapter").rglob("*.py")}
    folders |= {ROOT / "qadapter" / "kernels"}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert names == set(PYPROJECT["tool"]["setuptools"]["packages"])


def test_metadata_is_static_and_matches_the_package() -> None:
    import qadapter

    assert "dynamic" not in PYPROJECT["project"]
    assert qadapter.__version__ == PYPROJECT["project"]["version"]
    assert f"\n## {qadapter.__version__} " in (ROOT / "CHANGELOG.md").read_text()


def test_packaging_names_no_registry_and_no_local_path() -> None:
    for name in ("pyproject.toml", "constraints.txt", "Makefile", ".ci/run"):
        path = ROOT / name
        if path.exists():
            text = path.read_text()
            assert not re.search(r"index-url|find-links|https?://|file://|/work|/root", text), name


# What the package needs at run time


def test_import_and_env_need_nothing_but_torch(tmp_path: Path) -> None:
    hidden = ["transformers", "peft", "accelerate", "datasets", "safetensors", "tqdm", "triton"]
    code = f"import sys; sys.modules.update(dict.fromkeys({hidden}))\n"
    env = "from qadapter.cli import main; sys.exit(main(['env']))"
    # from the real tree, wherever the interpreter has its packages
    python(code + TRY_IT + env, tmp_path, PYTHONPATH=str(ROOT))


def test_pure_wheel_works_without_the_extension(
    pure_wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    pure_wheel.extractall(tmp_path)
    where = python(TRY_IT + "print(qadapter.__file__)", tmp_path)
    assert Path(where).is_relative_to(tmp_path)


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_extension_uses_the_stable_abi_only(extension: Path) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf (binutils)")
    found = symbols.needs(extension)
    assert found.torch, "not a torch extension at all?"
    assert not found.foreign
    assert not symbols.not_in_shim(found.torch, Path(torch.__file__).parent / "include")
    unknown = [name for name in found.libraries if not symbols.LIBRARIES.fullmatch(name)]
    assert not unknown
    assert not found.search_path, "a path of this machine"
    assert {"GLIBC", "GLIBCXX"} <= set(found.versions)
    # Exported, they could be exchanged for another library's of the same name.
    assert not [name for name in found.exported if re.search(r"c10|torch|qadapter", name)]
    assert any(name.startswith("PyInit__C_") for name in found.exported)


def test_symbol_check_finds_what_is_not_stable() -> None:
    """torch's own Python bindings use what an extension must not use."""
    if shutil.which("readelf") is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and readelf (binutils)")
    library = Path(torch.__file__).parent / "lib" / "libtorch_python.so"
    if not library.exists():
        pytest.skip(f"no {library}")
    foreign = symbols.needs(library).foreign
    for pattern in (r"_ZN2at", r"_ZNK?3c10", r"_Py", r"PyFrame_"):
        assert any(re.match(pattern, name) for name in foreign), pattern


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_torch_abi_audit_agrees(extension: Path) -> None:
    pytest.importorskip("torch_abi_audit", reason="needs: pip install torch-abi-audit")
    run = "import sys; from torch_abi_audit.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", run, "--check", "both", extension]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Min torch:   2.11" in result.stdout


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_extension_holds_no_path_of_the_build_machine(extension: Path) -> None:
    content = extension.read_bytes()
    for path in {str(ROOT), sysconfig.get_path("purelib"), str(Path.home()) + os.sep}:
        assert path.encode() not in content, path


# What is built


def test_wheel_contents(pure_wheel: zipfile.ZipFile) -> None:
    names = set(pure_wheel.namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("qadapter/*.py")}
    kernels = {f"qadapter/kernels/{path.name}" for path in ROOT.glob("qadapter/kernels/*.py")}
    data = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("qadapter/demo_data/*.jsonl")}
    assert modules | kernels | data | {"qadapter/py.typed"} <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    extra = {name for name in names if not name.startswith(("qadapter/", "qadapter-"))}
    assert not extra, "nothing but the package may land in site-packages"


def test_build_switched_off_gives_a_pure_wheel_that_says_why(pure_wheel: zipfile.ZipFile) -> None:
    assert pure_wheel.filename is not None
    assert pure_wheel.filename.endswith("-py3-none-any.whl")
    assert not any(name.endswith((".so", ".pyd")) for name in pure_wheel.namelist())
    assert "QADAPTER_BUILD=0" in build_info(pure_wheel)


def test_sdist_contents_and_wheel_from_it(source: Path, tmp_path: Path) -> None:
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    name = python(code, source).splitlines()[-1]
    shutil.unpack_archive(tmp_path / name, tmp_path, filter="data")
    tree = tmp_path / name.removesuffix(".tar.gz")
    patterns = (
        "csrc/*/*",
        "tests/**/*.py",
        "tests/**/*.json",
        "tests/**/*.cpp",
        "tests/**/*.h",
        "examples/*.py",
        "docs/*.md",
        "qadapter/demo_data/*.jsonl",
    )
    for pattern in patterns:
        expected = {p.relative_to(ROOT) for p in ROOT.glob(pattern) if p.is_file()}
        assert expected <= {p.relative_to(tree) for p in tree.glob(pattern)}, pattern
    assert {p.name for p in (tree / "qadapter/kernels").glob("*.py")} == {
        p.name for p in (ROOT / "qadapter/kernels").glob("*.py")
    }
    for file in ("LICENSE", "constraints.txt", "Makefile", "setup.py", "qadapter/py.typed"):
        assert (tree / file).is_file(), file
    wheel = build_wheel(tree, tmp_path / "out", "--no-build-isolation", QADAPTER_BUILD="0")
    assert {f"qadapter/kernels/{p.name}" for p in ROOT.glob("qadapter/kernels/*.py")} <= set(
        wheel.namelist()
    )


@pytest.mark.skipif(not CAN_COMPILE, reason="needs a C++ compiler and the sources")
def test_no_compiler_gives_a_pure_wheel_that_says_why(source: Path, tmp_path: Path) -> None:
    env = {"PATH": str(tmp_path), "CXX": "no-such-compiler"}
    wheel = build_wheel(source, tmp_path / "out", "--no-build-isolation", **env)
    assert wheel.filename is not None
    assert wheel.filename.endswith("-py3-none-any.whl")
    assert "no-such-compiler" in build_info(wheel)


@pytest.mark.skipif(not CAN_COMPILE, reason="needs a C++ compiler and the sources")
def test_failing_compile_breaks_the_install_only_when_asked_for(
    source: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(source, broken, symlinks=True)
    for path in broken.glob("csrc/cpu/*.cpp"):
        path.unlink()
    (broken / "csrc/cpu/broken.cpp").write_text("int broken = ;\n")
    wheel = build_wheel(broken, tmp_path / "out", "--no-build-isolation")
    assert wheel.filename is not None
    assert wheel.filename.endswith("-py3-none-any.whl")
    assert "compiling failed" in build_info(wheel)
    with pytest.raises(installing.CaseFailed, match=r"broken\.cpp"):
        build_wheel(broken, tmp_path / "no", "--no-build-isolation", QADAPTER_BUILD="cpu")


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> install_matrix.Matrix:
    return install_matrix.Matrix(tmp_path_factory.mktemp("matrix"))


@pytest.mark.slow
@pytest.mark.parametrize("title", install_matrix.CASES)
def test_install_matrix(title: str, matrix: install_matrix.Matrix) -> None:
    outcome, why = install_matrix.run(title, matrix)
    if outcome == "skipped":
        pytest.skip(why)
    assert outcome == "ok", why


@pytest.mark.slow
@pytest.mark.skipif(not CAN_COMPILE, reason="needs a C++ compiler and the sources")
def test_one_wheel_for_every_python(source: Path, tmp_path: Path) -> None:
    wheel = build_wheel(source, tmp_path, "--no-build-isolation", QADAPTER_BUILD="cpu")
    assert wheel.filename is not None
    assert "-cp311-abi3-" in wheel.filename
    assert "qadapter/_C_cpu.abi3.so" in wheel.namelist()
    assert build_info(wheel) == "built"
