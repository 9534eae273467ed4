"""Imports go down only and nowhere round, in the kernels too, which the linter does not see.

`lint-imports` (make lint) checks the rooms of the package; it leaves out folders without
``__init__.py``, and `kernels/` must not have one.
"""

import ast
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = next(p for p in Path(__file__).parents if (p / "pyproject.toml").is_file())
KERNELS = ROOT / "kernels"


def imports(path: Path) -> set[str]:
    """Modules that a file imports, anywhere in it: in functions and under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            module = str(node.module)
            package = module in ("qadapter", "qadapter.kernels")
            found |= {f"{module}.{alias.name}" for alias in node.names} if package else {module}
    return found


def test_kernels_import_kernels_alone():
    files = sorted(KERNELS.glob("*.py"))
    graph = {f"qadapter.kernels.{path.stem}": imports(path) for path in files}
    assert len(graph) > 10
    for module, found in graph.items():
        allowed = {"torch", "triton", *sys.stdlib_module_names}
        others = {name for name in found if name.split(".")[0] not in allowed}
        assert others <= graph.keys(), f"{module} imports {sorted(others - graph.keys())}"
    list(TopologicalSorter(graph).static_order())  # CycleError where they import each other


def test_every_room_has_its_layer_and_no_import_is_ignored():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers, circles = contracts["contracts"]
    assert layers["exhaustive"] and circles["type"] == "acyclic_siblings"
    assert "ignore_imports" not in {*layers, *circles}
    lines = [line.strip("() ") for line in layers["layers"]]
    assert [lines.index(room) for room in ("training", "text", "model", "ops", "kernels")] == [
        1, 2, 3, 5, 6
    ]  # fmt: skip


def test_importing_the_package_needs_torch_alone():
    code = (
        "import sys, qadapter, qadapter.functional, qadapter.reference, qadapter.modules\n"
        "heavy = {'transformers', 'peft', 'triton', 'datasets', 'accelerate', 'matplotlib'}\n"
        "loaded = heavy & sys.modules.keys()\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
