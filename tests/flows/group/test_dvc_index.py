"""What DVC knows of a pipeline, as a process of its own tells it."""

import textwrap
from pathlib import Path

from flows.group.dvc import Pipeline, Stage

DVC_YAML = """
    stages:
      last: {cmd: "true", deps: [middle/a, middle/b, /etc/hostname], outs: [out.txt]}
      b: {cmd: "true", deps: [in.txt, "s3://bucket/far"], outs: [middle/b]}
      a: {cmd: "true", deps: [in.txt, b.txt], outs: [middle/a], metrics: [a.json]}
      b.txt: {cmd: "true", outs: [b.txt]}
      alone: {cmd: "true"}
"""


def test_stages_come_after_those_they_need_and_otherwise_as_they_are_listed(project: Path) -> None:
    (project / ".dvc").mkdir()
    (project / ".dvc" / "config").write_text("[core]\n    no_scm = true\n")
    (project / "dvc.yaml").write_text(textwrap.dedent(DVC_YAML))
    found = Pipeline(project).stages()
    assert [stage.name for stage in found] == ["b", "b.txt", "a", "last", "alone"]
    about = {stage.name: stage for stage in found}
    assert about["a"] == Stage("a", ("b.txt",), ("in.txt", "b.txt"), ("middle/a", "a.json"))
    assert about["b"].dependencies == ("in.txt",), "files of this machine alone"
    assert set(about["last"].needs) == {"a", "b"}
    assert set(about["last"].dependencies) == {"middle/a", "middle/b", "/etc/hostname"}
    assert about["alone"] == Stage("alone", (), (), ())
