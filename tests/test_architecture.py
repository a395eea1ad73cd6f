"""The map holds: imports point one way, and what is heavy waits until the configuration has been checked."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "distilbench"
LAYERS = [
    {"signals", "settings"},
    {"results"},
    {"records", "sources", "significance"},
    {"corpora"},
    {"data", "model", "freezing", "optimization", "device", "report"},
    {"tracking", "progress", "engines"},
    {"probe", "limits"},
    {"peers"},
    {"trials", "reporting"},
    {"composition", "sweeps", "together"},
    {"train", "compare", "benchmark"},
    {"confirm"},
]
"""From the bottom up: a module may import from layers below its own, and from its own package."""
ONLY_IN = {
    "mlflow": {"tracking"},
    "hydra": {"settings", "composition", "train", "compare", "confirm", "benchmark"},
    "rich": {"progress", "report", "trials", "reporting", "compare", "benchmark"},
    "optuna": {"sweeps", "report"},
}
HEAVY = ("torch", "transformers", "mlflow", "sklearn", "datasets", "scipy", "pandas", "optuna", "matplotlib")


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.relative_to(PACKAGE) != Path("__init__.py"))


def level(module: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if module in layer)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down_the_map(path):
    own = module_of(path)
    for name in imports(path):
        if name.startswith("distilbench."):
            other = name.split(".")[1]
            assert other == own or level(other) < level(own), f"{own} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_each_collaborator_has_one_room(path):
    for library, rooms in ONLY_IN.items():
        if any(name.split(".")[0] == library for name in imports(path)):
            assert module_of(path) in rooms, f"{library} imported in {path.name}"


def test_checking_a_configuration_imports_nothing_heavy():
    modules = ("train", "compare", "confirm", "benchmark", "model", "data", "tracking")
    code = "import sys" + "".join(f", distilbench.{name}" for name in modules)
    code += f"; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
