"""Laws of the workspace: a faithful snapshot, made again without touching what is right already."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml

from flows.group.workspace import LINKED_FROM_BYTES, Remote, WorkspaceBusy, folder_of, held
from flows.spec.snapshot import MissingSource
from tests.support.small_project import Group, snapshot


def test_holds_what_the_stages_read(group: Group) -> None:
    pipeline, stages = group.prepare(match={"value": 7})
    assert pipeline.folder == folder_of(group.home, "small")
    for name in ("dvc.yaml", "code/step.py", "data/digits.txt", "data/fashion"):
        assert (pipeline.folder / name).read_bytes() == (group.root / name).read_bytes()
    assert yaml.safe_load((pipeline.folder / "params.yaml").read_text())["match"] == {"value": 7}
    assert [stage.name for stage in stages] == ["collect@digits", "collect@fashion", "match", "evaluate"]
    assert stages[2].needs == ("collect@digits", "collect@fashion")


def test_code_is_copied_and_bytecode_stays_behind(group: Group) -> None:
    (group.root / "tasks" / "__pycache__").mkdir(parents=True)
    (group.root / "tasks" / "match.py").write_text("pass\n")
    (group.root / "tasks" / "__pycache__" / "match.cpython-311.pyc").write_bytes(b"\0")
    pipeline, _ = group.prepare()
    assert (pipeline.folder / "tasks" / "match.py").stat().st_nlink == 1
    assert not (pipeline.folder / "tasks" / "__pycache__").exists()


def test_preparing_again_touches_nothing(group: Group) -> None:
    pipeline, _ = group.prepare()
    before = snapshot(pipeline.folder)
    os.utime(group.root / "code" / "step.py")
    group.prepare()
    assert snapshot(pipeline.folder) == before


def test_changed_files_are_replaced_and_vanished_ones_removed(group: Group) -> None:
    pipeline, _ = group.prepare()
    old = (pipeline.folder / "data" / "digits.txt").open()
    replacement = group.root / "data" / "new"
    replacement.write_text("9876543210\n")
    replacement.replace(group.root / "data" / "digits.txt")
    (group.root / "data" / "fashion").rename(group.root / "data" / "clothes")
    pipeline, _ = group.prepare(models={"digits": {"data": "data/digits.txt"}, "fashion": {"data": "data/clothes"}})
    assert (pipeline.folder / "data" / "digits.txt").read_text() == "9876543210\n"
    assert old.read() == "0123456789\n", "replaced, not overwritten"
    old.close()
    assert not (pipeline.folder / "data" / "fashion").exists()
    assert (pipeline.folder / "data" / "clothes").exists()


def test_folders_are_brought_whole_and_absolute_paths_left(group: Group, tmp_path: Path) -> None:
    (group.root / "data" / "shards" / "deep").mkdir(parents=True)
    (group.root / "data" / "shards" / "deep" / "one").write_text("1\n")
    outside = tmp_path / "outside.txt"
    outside.write_text("0\n")
    pipeline, _ = group.prepare(models={"digits": {"data": "data/shards"}, "fashion": {"data": str(outside)}})
    assert (pipeline.folder / "data" / "shards" / "deep" / "one").read_text() == "1\n"
    assert not list(pipeline.folder.rglob("outside.txt"))


def test_outputs_stay_and_linked_data_is_never_modified(group: Group) -> None:
    (group.root / "data" / "digits.txt").write_text("0123456789\n" * (LINKED_FROM_BYTES // 10))
    before = snapshot(group.root / "data")
    assert group.run() == ["executed"] * 4
    brought = folder_of(group.home, "small") / "data" / "digits.txt"
    assert brought.stat().st_nlink == 2, "linked to the contents"
    with pytest.raises(PermissionError) if os.geteuid() else nullcontext(), brought.open("ab"):
        pass
    group.prepare()
    assert (folder_of(group.home, "small") / "metrics.txt").exists()
    assert snapshot(group.root / "data") == before
    assert not (group.root / "dvc.lock").exists(), "the project itself is only read"


def test_what_a_killed_run_left_does_no_harm(group: Group) -> None:
    pipeline, _ = group.prepare()
    (pipeline.folder / "code" / ".step.py.partial").write_text("half a fi")
    (pipeline.folder / "code" / "step.py").write_text("half a fi")
    locks = pipeline.folder / ".dvc" / "tmp" / "rwlock"
    locks.parent.mkdir(exist_ok=True)
    # A number that lives again, as another program: DVC alone would wait for it for ever.
    entry = {"pid": os.getppid(), "cmd": "dvc repro"}
    locks.write_text(json.dumps({"write": {str(pipeline.folder / "pairing"): entry}}))
    assert group.run() == ["executed"] * 4
    locks.write_text('{"write": {"')
    assert group.run() == ["unchanged"] * 4


def test_missing_and_foreign_files_are_named(group: Group) -> None:
    with pytest.raises(MissingSource, match=r"data/nothing does not exist in"):
        group.prepare(models={"digits": {"data": "data/nothing"}, "fashion": {"data": "data/fashion"}})
    with pytest.raises(MissingSource, match=r"\.\./x lies outside"):
        group.prepare(models={"digits": {"data": "../x"}, "fashion": {"data": "data/fashion"}})


def test_one_process_at_a_time(group: Group) -> None:
    program = (
        "import sys, pathlib, flows.group.workspace as w\nwith w.held(pathlib.Path(sys.argv[1]), patience=0): pass"
    )
    command = [sys.executable, "-c", program, str(group.folder)]
    with held(group.folder):
        other = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert "WorkspaceBusy" in other.stderr
    assert "another mtz is at work" in other.stderr
    with held(group.folder), held(group.folder.with_name("large")):
        pass
    assert subprocess.run(command, cwd=Path(__file__).parents[3]).returncode == 0


def test_a_dvc_by_hand_is_respected(group: Group) -> None:
    pipeline, _ = group.prepare()
    group.patience = 0
    by_hand = subprocess.Popen([sys.executable, "-c", "input()", "dvc"], stdin=subprocess.PIPE)
    locks = pipeline.folder / ".dvc" / "tmp" / "rwlock"
    locks.parent.mkdir(exist_ok=True)
    entry = {"pid": by_hand.pid, "cmd": "dvc repro"}
    locks.write_text(json.dumps({"read": {str(pipeline.folder / "pairing"): [entry]}}))
    try:
        with pytest.raises(WorkspaceBusy, match=rf"DVC process \({by_hand.pid}\)"):
            group.prepare()
    finally:
        by_hand.kill()
        by_hand.wait()


def test_configuration_has_no_credentials(project: Path) -> None:
    secrets = {"AWS_ACCESS_KEY_ID": "the-key", "AWS_SECRET_ACCESS_KEY": "the-secret"}
    group = Group(project, Remote("s3://bucket/mtz/dvc", "http://127.0.0.1:1", "eu-north-1"), secrets)
    pipeline, _ = group.prepare()
    shared = (pipeline.folder / ".dvc" / "config").read_text()
    local = (pipeline.folder / ".dvc" / "config.local").read_text()
    assert "verify = true" in shared
    assert "no_scm = true" in shared
    assert "endpointurl = http://127.0.0.1:1" in local
    assert "127.0.0.1" not in shared
    assert "the-" not in shared + local + repr(pipeline)
