"""What is shipped and how it installs: wheel, sdist, editable, with and without the extension."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTENSION = next(iter(sorted(ROOT.glob("qadapter/_C_cpu.*so"))), None)
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
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def pip(*args: str | Path, executable: str = sys.executable, **env: str) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", executable, *args],
        env=os.environ | {"QADAPTER_BUILD": "auto"} | env,
        capture_output=True,
        text=True,
        timeout=900,
    )
    output = result.stdout + result.stderr
    if result.returncode and "No matching distribution found for setuptools" in output:
        pytest.skip("an isolated build needs a package index")
    assert result.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree, so that building leaves nothing in the real one."""
    copy = tmp_path_factory.mktemp("source") / "qadapter"
    ignore = shutil.ignore_patterns(
        ".*",
        "build",
        "dist",
        "demo-output",
        "*.egg-info",
        "*.so",
        "_build_info.json",
        "__pycache__",
    )
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignore)
    return copy


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


def test_import_needs_nothing_but_torch(tmp_path: Path) -> None:
    hidden = ["transformers", "peft", "accelerate", "datasets", "safetensors", "tqdm", "triton"]
    code = f"import sys; sys.modules.update(dict.fromkeys({hidden}))\n"
    # from the real tree, wherever the interpreter has its packages
    python(code + TRY_IT, tmp_path, PYTHONPATH=str(ROOT))


def test_pure_wheel_works_without_the_extension(
    pure_wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    pure_wheel.extractall(tmp_path)
    where = python(TRY_IT + "print(qadapter.__file__)", tmp_path)
    assert Path(where).is_relative_to(tmp_path)


@pytest.mark.skipif(EXTENSION is None, reason="the C++ extension is not built in place")
def test_extension_uses_the_stable_abi_only() -> None:
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    listing = subprocess.run(
        ["nm", "-D", "-C", "--undefined-only", EXTENSION],
        capture_output=True,
        text=True,
        check=True,
    )
    symbols = [line.split(maxsplit=1)[1] for line in listing.stdout.splitlines() if line.strip()]
    assert any("aoti_torch" in symbol for symbol in symbols), "not a torch extension at all?"
    unstable = [s for s in symbols if re.search(r"\b(c10|at|caffe2|torch)::", s)]
    assert not unstable, unstable
    private = [s for s in symbols if re.match(r"U _Py", s)]
    assert not private, private


@pytest.mark.skipif(EXTENSION is None, reason="the C++ extension is not built in place")
def test_extension_holds_no_path_of_the_build_machine() -> None:
    content = EXTENSION.read_bytes()
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
    for pattern in ("csrc/cpu/*", "csrc/common/*", "tests/*.py", "qadapter/demo_data/*.jsonl"):
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
    with pytest.raises(AssertionError, match=r"broken\.cpp"):
        build_wheel(broken, tmp_path / "no", "--no-build-isolation", QADAPTER_BUILD="cpu")


@pytest.mark.slow
@pytest.mark.skipif(not CAN_COMPILE, reason="needs a C++ compiler and the sources")
@pytest.mark.parametrize("compiler", ["compiler", "no-compiler"])
@pytest.mark.parametrize("isolation", ["isolated", "not-isolated"])
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_install_matrix(
    kind: str, isolation: str, compiler: str, source: Path, tmp_path: Path
) -> None:
    """In a fresh environment that sees this one's torch (through a .pth: no gigabytes to copy)."""
    tree = tmp_path / "tree"
    shutil.copytree(source, tree, symlinks=True)
    environment = tmp_path / "env"
    venv.create(environment, with_pip=False)
    executable = str(environment / "bin" / "python")
    site = Path(
        python("import sysconfig; print(sysconfig.get_path('purelib'))", tmp_path, executable)
    )
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")

    options = ["--no-build-isolation"] if isolation == "not-isolated" else []
    editable = ["-e"] if kind == "editable" else []
    env = {} if compiler == "compiler" else {"PATH": str(tmp_path), "CXX": "no-such-compiler"}
    pip("install", "--no-deps", *options, *editable, tree, executable=executable, **env)

    report = TRY_IT + (
        "import importlib.util as u, json, pathlib\n"
        "folder = pathlib.Path(qadapter.__file__).parent\n"
        "info = json.loads((folder / '_build_info.json').read_text())['cpu']\n"
        "kernels = sorted(p.name for p in (folder / 'kernels').glob('*.py'))\n"
        "extension = u.find_spec('qadapter._C_cpu')\n"
        "if extension: import qadapter._C_cpu\n"
        "print(json.dumps([str(folder), info, kernels, bool(extension)]))\n"
    )
    folder, info, kernels, extension = json.loads(python(report, tmp_path, executable))
    assert Path(folder) == (tree if kind == "editable" else site) / "qadapter"
    assert kernels == sorted(path.name for path in (ROOT / "kernels").glob("*.py"))
    assert extension == (compiler == "compiler")
    assert info == "built" if extension else "no-such-compiler" in info
    assert (environment / "bin" / "qadapter").exists()


@pytest.mark.slow
@pytest.mark.skipif(not CAN_COMPILE, reason="needs a C++ compiler and the sources")
def test_isolated_build_without_torch_says_how_to_get_the_extension(
    source: Path, tmp_path: Path
) -> None:
    if Path(sysconfig.get_path("purelib", vars={"base": sys.base_prefix}), "torch").exists():
        pytest.skip("the base interpreter has a torch that the build may borrow")
    venv.create(tmp_path / "env", with_pip=False)
    executable = str(tmp_path / "env" / "bin" / "python")
    pip("wheel", "--no-deps", "-w", tmp_path / "out", source, executable=executable)
    (wheel,) = (tmp_path / "out").glob("*-py3-none-any.whl")
    assert "--no-build-isolation" in build_info(zipfile.ZipFile(wheel))


@pytest.mark.slow
@pytest.mark.skipif(not CAN_COMPILE, reason="needs a C++ compiler and the sources")
def test_one_wheel_for_every_python(source: Path, tmp_path: Path) -> None:
    wheel = build_wheel(source, tmp_path, "--no-build-isolation", QADAPTER_BUILD="cpu")
    assert wheel.filename is not None
    assert "-cp311-abi3-" in wheel.filename
    assert "qadapter/_C_cpu.abi3.so" in wheel.namelist()
    assert build_info(wheel) == "built"
