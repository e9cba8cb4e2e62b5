"""A model's flow on a small project, with real DVC and S3: its statistics are a content that every machine can have."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from flows.group.statistics_flow import measure_model
from flows.results.group_report import as_report
from flows.results.stage_result import StageRefused
from tasks.params import StorageParams
from tasks.storage import outcomes
from tasks.storage.contents import Contents, stored_key
from tasks.storage.outcomes import Outcome
from tasks.storage.s3 import Storage
from tests.support.small_project import job_of

pytestmark = pytest.mark.usefixtures("without_server")

DVC_YAML = """
    stages:
      hessians:
        foreach: ${models}
        do:
          cmd: python code/step.py hessians@${key} hessians/${key}.safetensors ${item.data}
          deps: [code/step.py, "${item.data}"]
          outs: ["hessians/${key}.safetensors"]
"""


def test_statistics_are_measured_once_and_kept(project: Path, place: StorageParams, store: Storage, home: Path) -> None:
    (project / "dvc.yaml").write_text(textwrap.dedent(DVC_YAML))
    contents = Contents(home / "contents", store)
    job = job_of(project, contents, place, "digits", "model")
    report = as_report(measure_model.fn(job, home))
    assert (report.kind, report.group, report.status) == ("model", "digits", "measured")
    assert [(stage.stage, stage.outcome) for stage in report.stages] == [("hessians@digits", "executed")]
    assert Path(report.folder) == home / "statistics" / "digits"
    made = Path(report.folder, "hessians", "digits.safetensors").read_bytes()
    assert contents.read(report.statistics) == made
    assert store.read(stored_key(report.statistics)) == made
    expected = Outcome("measured", "digits", statistics=report.statistics)
    assert outcomes.recall(store, [job["fingerprint"]]) == {job["fingerprint"]: expected}
    assert store.exists("locks/models/digits.lock")

    again = as_report(measure_model.fn(job, home))
    assert (again.statistics, again.stages[0].outcome) == (report.statistics, "unchanged")


def test_a_model_that_cannot_be_measured_is_recorded_as_refused(
    project: Path, place: StorageParams, store: Storage, home: Path
) -> None:
    (project / "dvc.yaml").write_text(textwrap.dedent(DVC_YAML))
    (project / "code" / "step.py").write_text("import sys\nprint('error: it has no layers.')\nsys.exit(65)\n")
    job = job_of(project, Contents(home / "contents", store), place, "fashion", "model")
    with pytest.raises(StageRefused, match="it has no layers"):
        measure_model.fn(job, home)
    (outcome,) = outcomes.recall(store, [job["fingerprint"]]).values()
    assert outcome == Outcome("refused", "fashion", reason="hessians@fashion: it has no layers.")
