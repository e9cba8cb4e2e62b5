"""The scripts in `examples` run, and say what they should."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from mtz_core.network.operations import OPERATIONS


def said_by(example: str, capsys: pytest.CaptureFixture[str]) -> str:
    runpy.run_path(f"examples/{example}.py", run_name="__main__")
    return capsys.readouterr().out


def test_zip_your_own_networks(capsys: pytest.CaptureFixture[str]) -> None:
    said = said_by("zip_your_own_networks", capsys)
    errors = re.findall(r"(shape|bar) +its own network ([\d.]+), the zipped network ([\d.]+)", said)
    assert [task for task, *_ in errors] == ["shape", "bar"]
    for task, before, after in errors:
        assert float(after) < float(before) + 5, f"{task} loses more than a reader would believe"
    assert "Saved and loaded again: the same outputs." in said
    assert "Linear(in_features=256" in said


def test_register_an_operation(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtz_core.network.operations.OPERATIONS", dict(OPERATIONS))
    said = said_by("register_an_operation", capsys)
    assert said.count("refused: ") == 2
    assert "operator asinh cannot be zipped" in said
    assert "are not interchangeable" in said


def test_every_example_is_tried() -> None:
    tried = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in Path("examples").glob("*.py")} <= tried
