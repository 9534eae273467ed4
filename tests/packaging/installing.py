"""Fresh environments to install into, for test_packaging.py and install_matrix.py.

Standard library only.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 1800  # seconds for one command
NOT_SHIPPED = (
    *(".*", "build", "dist", "demo-output", "*.egg-info", "*.log"),
    *("*.so", "_build_info.json", "__pycache__"),
)


class SkipCase(Exception):
    """The case cannot be tried here."""


class CaseFailed(Exception):
    """A command failed, or a result is wrong."""


def expect(condition: object, message: str) -> None:
    if not condition:
        raise CaseFailed(message)


def call(command: list[str | Path], cwd: Path | None = None, **env: str) -> str:
    """Output of a command in an environment that knows nothing of this one's Python."""
    private = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "CONDA_PREFIX", "QADAPTER_BUILD")
    clean = {key: value for key, value in os.environ.items() if key not in private}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean | env,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    if result.returncode:
        raise CaseFailed(f"{command}\n{result.stdout}{result.stderr}")
    return result.stdout.strip()


def pip(*args: str | Path, python: str | Path = sys.executable, **env: str) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    try:
        return call([*command, *args], **env)
    except CaseFailed as error:
        if "No matching distribution found for setuptools" in str(error):
            raise SkipCase("an isolated build needs a package index") from None
        raise


def copy_source(target: Path) -> Path:
    """The source tree without what was built in it, so that building leaves nothing in the real."""
    ignore = shutil.ignore_patterns(*NOT_SHIPPED)
    shutil.copytree(ROOT, target, symlinks=True, ignore=ignore)
    return target


def distributions(name: str) -> dict[str, importlib.metadata.Distribution]:
    """A distribution and all that it requires, extras left out."""
    found: dict[str, importlib.metadata.Distribution] = {}
    todo = [name]
    while todo:
        try:
            distribution = importlib.metadata.distribution(todo.pop())
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        if distribution.name not in found:
            found[distribution.name] = distribution
            plain = [r for r in distribution.requires or () if not re.search(r";.*\bextra\b", r)]
            todo += [re.split(r"[^\w.-]", requirement)[0] for requirement in plain]
    return found


class Environment:
    """A fresh virtual environment with ``sees``: "nothing", "torch" (and what torch requires), or
    "all" packages of this interpreter but qadapter itself."""

    def __init__(self, folder: Path, sees: str) -> None:
        venv.create(folder, with_pip=False)
        self.bin = folder / "bin"
        self.python = self.bin / "python"
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        self.site = Path(call([self.python, "-c", code]))
        if sees == "torch":
            self.link(distributions("torch"))
        elif sees == "all":
            self.link({d.name: d for d in importlib.metadata.distributions()})

    def link(self, packages: dict[str, importlib.metadata.Distribution]) -> None:
        for name, distribution in packages.items():
            if name.lower() in ("qadapter", "pip", "kernels"):
                continue
            # ".." leads to commands
            tops = {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}
            for top in tops:
                link, target = self.site / top, Path(str(distribution.locate_file(top)))
                if not link.is_symlink() and target.exists():
                    link.symlink_to(target)

    def run(self, code: str, cwd: Path | None = None, **env: str) -> str:
        return call([self.python, "-c", code], cwd=cwd or self.elsewhere, **env)

    def install(self, what: Path, *options: str, **env: str) -> None:
        pip("install", "-q", "--no-deps", *options, what, python=self.python, **env)
