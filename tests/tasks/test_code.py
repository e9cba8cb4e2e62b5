"""The digest of code covers what a module imports, at any depth, and nothing else."""

from __future__ import annotations

from pathlib import Path

import grimp
import pytest

from tasks.code import code_digest, sources_of

PROJECT = {
    "mine/__init__.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mine import never\n",
    "mine/network.py": "import torch\nfrom mine.parts import block\n\ndef build():\n    from . import late\n",
    "mine/parts/__init__.py": "",
    "mine/parts/block.py": "from ..deep import value as other\n",
    "mine/deep.py": "value = 1\n",
    "mine/late.py": "import lazy\n",
    "mine/never.py": "",
    "mine/unused.py": "",
    "lazy/__init__.py": "def __getattr__(name): ...\n",
    "lazy/inner.py": "",
}
REACHED = {name for name in PROJECT if name not in ("mine/never.py", "mine/unused.py")}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in PROJECT.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("stage", ["stages.collect", "stages.hessians", "stages.retrain", "studies.affinities"])
def test_it_finds_what_the_import_graph_has(stage: str) -> None:
    graph = grimp.build_graph("mtz_core", "tasks", cache_dir=None, exclude_type_checking_imports=True)
    imported = graph.find_upstream_modules(f"tasks.{stage}") | {f"tasks.{stage}"}
    found = sources_of(f"tasks.{stage}")
    packages = {name for name, file in found.items() if file.name == "__init__.py"}
    assert found.keys() - packages == imported - packages
    assert packages == {
        ".".join(name.split(".")[:depth]) for name in imported for depth in range(1, name.count(".") + 1)
    }


def test_imports_are_followed_wherever_they_are(project: Path) -> None:
    assert {str(file.relative_to(project)) for file in sources_of("mine.network").values()} == REACHED


@pytest.mark.parametrize("name", sorted(PROJECT))
def test_a_change_anywhere_below_changes_the_digest(project: Path, name: str) -> None:
    before = code_digest("mine.network")
    (project / name).write_text(PROJECT[name] + "# changed\n")
    assert (code_digest("mine.network") != before) == (name in REACHED)
    (project / name).write_text(PROJECT[name])
    assert code_digest("mine.network") == before


def test_modules_of_libraries_do_not_count(project: Path) -> None:
    assert sources_of("torch", "json", "nowhere.at_all") == {}


@pytest.mark.parametrize(
    "content", [b"def broken(", b"\0", b"\xff\xfe", b"from . import parts\n", b"x = " + b"1+" * 20000 + b"1"]
)
def test_code_that_nobody_can_import_counts_all_the_same(project: Path, content: bytes) -> None:
    (project / "alone.py").write_bytes(content)
    assert sources_of("alone") == {"alone": project / "alone.py"}
    before = code_digest("alone")
    (project / "alone.py").write_bytes(content + b"\n")
    assert code_digest("alone") != before


def test_a_module_that_may_be_in_a_package_or_not_is_followed(project: Path) -> None:
    program = "try:\n    from .deep import value\nexcept ImportError:\n    from mine.deep import value\n"
    (project / "alone.py").write_text(program)
    assert "mine.deep" in sources_of("alone")
