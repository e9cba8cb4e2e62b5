"""What DVC decides about a stage, and what becomes of its errors."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flows.results.stage_result import StageFailed
from flows.spec.snapshot import InvalidPipeline
from tests.support.processes import is_alive
from tests.support.small_project import STAGES, Group
from tests.support.waiting import AGES_SECONDS, until


def test_executed_unchanged_restored(group: Group) -> None:
    pipeline, stages = group.prepare()
    assert pipeline.changes().keys() == set(STAGES)
    lines: list[str] = []
    results = [pipeline.reproduce(stage.name, on_progress=lines.append) for stage in stages]
    assert [result.outcome for result in results] == ["executed"] * 4
    assert results[0].last_line.startswith("collect@digits: wrote ")
    assert 0 < results[0].command_seconds < results[0].seconds
    assert "match: reading 2 files" in lines
    assert pipeline.changes() == {}
    assert group.run() == ["unchanged"] * 4
    (group.root / "code" / "step.py").write_text((group.root / "code" / "step.py").read_text() + "\n# changed\n")
    pipeline, _ = group.prepare()
    assert set(pipeline.changes().values()) == {frozenset({"code/step.py"})}
    assert group.run() == ["executed"] * 4

    assert group.run(match={"value": 2}) == ["unchanged", "unchanged", "executed", "executed"]
    assert group.run() == ["unchanged", "unchanged", "restored", "restored"]

    pipeline, _ = group.prepare()
    forced = pipeline.reproduce("evaluate", force=True)
    assert forced.outcome == "executed"
    assert 0 < forced.command_seconds < forced.seconds, "DVC records nothing new, and so does not say when it is done"


def test_what_the_project_has_run_by_hand_is_not_run_again(group: Group) -> None:
    (group.root / ".dvc").mkdir()
    (group.root / ".dvc" / "config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
    (group.root / ".dvcignore").write_text(".mtz\n")
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q"], cwd=group.root, check=True)
    assert group.run() == ["restored"] * 4
    assert (group.root / "dvc.lock").read_bytes() == (group.prepare()[0].folder / "dvc.lock").read_bytes()


def test_a_second_clone_restores_from_the_remote(group: Group, tmp_path: Path) -> None:
    assert group.run() == ["executed"] * 4
    pipeline, _ = group.prepare()
    pipeline.push()
    clone = tmp_path / "clone"
    shutil.copytree(group.root, clone, ignore=shutil.ignore_patterns(".mtz", ".dvc"))
    second = Group(clone, group.remote)
    pipeline, stages = second.prepare()
    assert pipeline.restore() == frozenset(), "nothing says what was run"
    shutil.copy2(group.folder / "dvc.lock", second.folder)
    assert pipeline.restore() == set(STAGES)
    assert [pipeline.reproduce(stage.name).outcome for stage in stages] == ["unchanged"] * 4
    assert (pipeline.folder / "metrics.txt").read_text() == (group.prepare()[0].folder / "metrics.txt").read_text()


def test_restoring_runs_nothing(group: Group) -> None:
    pipeline, _ = group.prepare()
    assert pipeline.restore() == frozenset()
    assert group.run() == ["executed"] * 4
    assert group.run(match={"value": 2}, evaluate={"value": 2})[2:] == ["executed", "executed"]
    pipeline, _ = group.prepare(match={"value": 1}, evaluate={"value": 3})
    assert pipeline.restore() == {"match"}
    assert pipeline.changes().keys() == {"evaluate"}


def test_a_refusal_is_told_and_not_retried(group: Group) -> None:
    pipeline, _ = group.prepare(collect={"fail": "refuse"})
    with pytest.raises(StageFailed, match=r"^collect@digits: the number of neurons is negative\. Give") as failure:
        pipeline.reproduce("collect@digits")
    assert not failure.value.can_be_retried


def test_a_killed_stage_and_a_passing_fault_can_be_retried(group: Group) -> None:
    pipeline, _ = group.prepare(collect={"fail": "die"})
    with pytest.raises(StageFailed, match=r"was killed \(signal 9\)") as failure:
        pipeline.reproduce("collect@digits")
    assert failure.value.can_be_retried
    pipeline, _ = group.prepare(collect={"fail": "once"})
    with pytest.raises(StageFailed, match="storage does not answer") as failure:
        pipeline.reproduce("collect@digits")
    assert failure.value.can_be_retried
    assert pipeline.reproduce("collect@digits").outcome == "executed"


def test_faults_of_dvc_are_told(group: Group) -> None:
    pipeline, _ = group.prepare()
    with pytest.raises(StageFailed, match="nothing: Stage 'nothing' not found"):
        pipeline.reproduce("nothing")
    (group.root / "dvc.yaml").write_text("stages: {match: {cmd: [}}")
    with pytest.raises(InvalidPipeline, match=r"dvc\.yaml"):
        group.prepare()


def test_a_stage_dies_with_its_flow(group: Group) -> None:
    pipeline, _ = group.prepare(collect={"sleep": AGES_SECONDS})
    program = (
        "import sys, pathlib; from flows.group.dvc import Pipeline\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "Pipeline(folder).reproduce('collect@digits', on_progress=lambda line: print(line, flush=True))"
    )
    flow = subprocess.Popen(
        [sys.executable, "-c", program, str(pipeline.folder)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert flow.stdout is not None
    assert any("reading 1 files" in line for line in flow.stdout)
    stage = next(int(process.name) for process in Path("/proc").glob("[0-9]*") if _is_stage(process))
    os.kill(flow.pid, signal.SIGKILL)
    flow.wait()
    flow.stdout.close()
    until(lambda: not is_alive(stage))
    assert group.run() == ["executed"] * 4


def _is_stage(process: Path) -> bool:
    try:
        return b"collect@digits" in (process / "cmdline").read_bytes().split(b"\0")[2:4]
    except OSError:
        return False
