"""The map of docs/architecture.md holds: imports point one way, none in a circle, and what is heavy waits."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAP = (ROOT / "docs" / "architecture.md").read_text()
HEAVY = ("torch", "transformers", "mlflow", "sklearn", "datasets", "scipy", "pandas", "optuna", "matplotlib")
FILES = sorted(
    path
    for top in ("distilbench", "hydra_plugins")
    for path in (ROOT / top).rglob("*.py")
    if path != ROOT / "distilbench" / "__init__.py"
)


def block(name: str) -> list[str]:
    """The lines of one fenced block of the map."""
    found = re.search(rf"```{name}\n(.*?)```", MAP, re.DOTALL)
    assert found, f"docs/architecture.md has no block {name}"
    return found[1].splitlines()


LEVEL = {room: level for level, line in enumerate(block("layers")) for room in line.split()}
ROOMS_OF = {line.partition(":")[0]: set(line.partition(":")[2].split()) for line in block("libraries")}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    parts = module.split(".")
    return "plugins" if parts[0] == "hydra_plugins" else parts[1]


MODULES = {name_of(path) for path in FILES}


def modules_of(node: ast.Import | ast.ImportFrom) -> set[str]:
    """The modules that a statement imports: of ``from package import module`` the module, not the package."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    names = {f"{node.module}.{alias.name}" for alias in node.names}
    return names & MODULES | ({node.module} if node.module and names - MODULES else set())


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


@cache
def imports(path: Path) -> frozenset[str]:
    """Every module that a file imports, inside of functions too."""
    found: set[str] = set()
    for node in nodes(path):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= modules_of(node)
    return frozenset(found)


@cache
def for_types_alone(path: Path) -> set[str]:
    found: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for inner in ast.walk(node):
                if isinstance(inner, ast.ImportFrom):
                    found |= modules_of(inner)
    return found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_up_the_list_of_rooms(path):
    own = room_of(name_of(path))
    for name in imports(path):
        ours = name.startswith(("distilbench.", "hydra_plugins.distilbench"))
        if ours and room_of(name) != own:
            assert LEVEL[room_of(name)] < LEVEL[own], f"{own} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_each_library_is_imported_only_where_the_map_allows(path):
    for library, rooms in ROOMS_OF.items():
        if any(name.split(".")[0] == library for name in imports(path) - for_types_alone(path)):
            assert room_of(name_of(path)) in rooms, f"{library} imported in {name_of(path)}"


def test_the_report_opens_the_store_by_one_door():
    doors = {name_of(p) for p in FILES if room_of(name_of(p)) == "report" and
             any(name.startswith("distilbench.tracking") for name in imports(p))}  # fmt: skip
    assert doors == {"distilbench.report.from_store"}


def test_no_file_imports_itself_through_others():
    modules = {name_of(path): path for path in FILES}
    edges = {
        module: {name for name in imports(path) - for_types_alone(path) if name in modules and name != module}
        for module, path in modules.items()
    }
    while edges:  # take away what imports nothing that is left, again and again: what stays is a circle
        free = [module for module, others in edges.items() if not others & edges.keys()]
        assert free, f"in a circle: {sorted(edges)}"
        for module in free:
            del edges[module]


def test_every_package_stands_in_the_map():
    assert {room_of(name_of(path)) for path in FILES} == LEVEL.keys()


def test_checking_a_configuration_imports_nothing_heavy():
    modules = ("train", "compare", "confirm", "predict", "benchmark", "models.resolve", "data.text", "tracking")
    code = "import sys" + "".join(f", distilbench.{name}" for name in modules)
    code += f"; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_every_file_of_a_room_stands_in_the_map():
    listed = {word.rpartition("/")[2] for word in re.findall(r"[\w/]+", MAP)}
    ours = [path for path in FILES if path.name != "__init__.py" and room_of(name_of(path)) != "plugins"]
    assert [name_of(path) for path in ours if path.stem not in listed] == []
