"""Tests mirror the packages: one file for each module, none imports another, and helpers live in tests/support."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("mtz_core", "tasks", "flows")
MIRRORED = sorted(path for package in PACKAGES for path in (ROOT / "tests" / package).rglob("test_*.py"))

SEVERAL = {
    "mtz_core/merging/test_differing_networks.py": "matching and walk, of networks that differ somewhere",
    "mtz_core/merging/test_rounded_networks.py": "walk, adding and the zipped module, of networks that are rounded",
    "mtz_core/merging/test_many_networks.py": "matching and walk, of three networks and more",
    "mtz_core/merging/test_unlike_networks.py": "matching and walk, of networks that share only a part",
    "mtz_core/test_several_inputs.py": "everything, of networks with several inputs",
    "mtz_core/test_several_outputs.py": "everything, of networks with several outputs",
    "mtz_core/test_shapes.py": "shape annotations everywhere",
    "mtz_core/test_zoo.py": "laws that hold for every network",
    "mtz_core/test_zoo_foreign.py": "laws that hold for every network",
    "mtz_core/test_zoo_foreign_masks.py": "laws that hold for every network",
    "mtz_core/test_zoo_foreign_text.py": "laws that hold for every network",
    "tasks/stages/test_several_inputs.py": "all stages, of networks with several inputs",
    "tasks/stages/test_several_outputs.py": "all stages, of networks with several outputs",
    "tasks/stages/test_stages.py": "all stages, one after another",
    "tasks/stages/test_tokens.py": "all stages, of networks that read tokens",
}
"""Tests of several modules, and what they are about."""


def mirrored_by(test: Path) -> str:
    """The file, or folder, that a test is of, without `.py`."""
    relative = test.relative_to(ROOT / "tests")
    return str(relative.with_name(relative.stem.removeprefix("test_")))


@pytest.mark.parametrize("test", MIRRORED, ids=lambda test: str(test.relative_to(ROOT / "tests")))
def test_a_test_file_mirrors_a_module(test: Path) -> None:
    module = ROOT / mirrored_by(test)
    mirrors = module.with_suffix(".py").is_file() or (module / "__init__.py").is_file()
    assert mirrors != (str(test.relative_to(ROOT / "tests")) in SEVERAL)


ELSEWHERE = {
    "flows/__main__.py": "test_installation.py",
    "flows/processes/warm_server.py": "flows/processes/test_warm.py",
}
"""Modules of flows whose tests are those of others."""


def test_every_module_of_flows_has_a_test_file() -> None:
    modules = [path.relative_to(ROOT) for path in (ROOT / "flows").rglob("*.py") if path.name != "__init__.py"]
    untested = {
        str(module) for module in modules if not (ROOT / "tests" / module.parent / f"test_{module.name}").is_file()
    }
    assert untested == ELSEWHERE.keys()
    assert all((ROOT / "tests" / test).is_file() for test in ELSEWHERE.values())


def imported(file: Path) -> set[str]:
    """The modules that a file imports anywhere in it, and the names that it imports from packages of tests."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "tests import by full names"
            found |= {str(node.module), *(f"{node.module}.{name.name}" for name in node.names)}
    return found


def is_test_module(module: str) -> bool:
    """Whether pytest, and no import, is to load this module."""
    file = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    return module.startswith("tests.") and file.is_file() and file.stem.startswith(("test_", "conftest"))


def test_nothing_imports_tests() -> None:
    files = [path for folder in ("tests", *PACKAGES) for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 200
    assert {str(path): sorted(filter(is_test_module, imported(path))) for path in files} == {
        str(path): [] for path in files
    }


def test_helpers_hold_no_tests() -> None:
    helpers = list((ROOT / "tests" / "support").rglob("*.py"))
    assert helpers
    for path in helpers:
        assert not path.stem.startswith(("test_", "conftest"))
        functions = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        assert not [name for name in functions if name.startswith("test_")]
