"""The layout shows the design: no cycles, small folders, a map in every package."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("launch", "evals")
"""Folders that are imported through links of the same names in dualpath_sgl."""
MOST_MODULES = 13


def _modules() -> dict[str, Path]:
    """Dotted name -> file, for every module of the four packages; a package's is its `__init__.py`."""
    found = {}
    for package in ("dualpath_sgl", "scheduler_svc", *LINKED):
        for file in (ROOT / package).rglob("*.py"):  # does not follow links
            parts = file.relative_to(ROOT).with_suffix("").parts
            if "site" not in parts:  # stand-ins for other projects' packages
                parts = ("dualpath_sgl", *parts) if package in LINKED else parts
                found[".".join(parts).removesuffix(".__init__")] = file
    return found


MODULES = _modules()
PACKAGES = [file for file in MODULES.values() if file.name == "__init__.py"]


def _imported(file: Path) -> Iterator[str]:
    """Every name in an import statement, those in functions and under TYPE_CHECKING included."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module


IMPORTS = {name: {*_imported(file)} & MODULES.keys() - {name} for name, file in MODULES.items()}


def _cycle(graph: dict[str, set[str]]) -> str:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " <- ".join(error.args[1])
    return ""


def test_modules_import_each_other_in_one_direction():
    assert len(MODULES) > 150 and sum(map(len, IMPORTS.values())) > 500
    assert not _cycle(IMPORTS)


def test_folders_import_each_other_in_one_direction():
    folders: dict[str, set[str]] = {}
    for name, others in IMPORTS.items():
        here = str(MODULES[name].parent.relative_to(ROOT))
        there = {str(MODULES[other].parent.relative_to(ROOT)) for other in others}
        folders.setdefault(here, set()).update(there - {here})
    assert not _cycle(folders)


def _contents(package: Path) -> list[str]:
    """Names in its folder, as a map gives them: `module.py`, `folder/`."""
    modules = [file.name for file in package.parent.glob("*.py") if file != package]
    inner = [file.parent for file in package.parent.glob("*/__init__.py") if not file.parent.is_symlink()]
    return modules + [f"{folder.name}/" for folder in inner]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda file: str(file.parent.relative_to(ROOT)))
def test_a_package_has_few_modules_and_a_map_that_names_each(package):
    modules = [name for name in _contents(package) if name.endswith(".py")]
    assert len(modules) <= MOST_MODULES
    told = ast.get_docstring(ast.parse(package.read_text())) or ""
    assert [name for name in _contents(package) if name not in told] == []
    rows = re.findall(r"^ *([\w/]+(?:\.py|/))  ", told, re.MULTILINE)
    assert [row for row in rows if not (package.parent / row).exists()] == []


def test_launch_and_evals_are_imported_under_one_name():
    tests = {str(file): file for file in (ROOT / "tests").rglob("*.py")}
    wrong = [
        f"{name} imports {other}"
        for name, file in (MODULES | tests).items()
        for other in _imported(file)
        if other.split(".")[0] in LINKED
    ]
    assert wrong == []
