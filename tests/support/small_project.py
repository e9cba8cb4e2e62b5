"""A small real project: a DVC pipeline of stages that take no time, with the layout of the example's."""

import textwrap
from pathlib import Path
from typing import Literal

import yaml

from flows.group.dvc import Pipeline, Stage
from flows.group.workspace import Remote, cache_of, folder_of, held, prepare
from flows.spec.job import Job
from flows.spec.snapshot import Project
from tasks.params import StorageParams
from tasks.storage.contents import Contents
from tests.support.waiting import PATIENCE_SECONDS

STEP = """
    '''Stage of the small pipeline: python code/step.py NAME OUT IN… writes what it has read.'''
    import os, pathlib, signal, sys, time, yaml
    name, out, *sources = sys.argv[1:]
    settings = yaml.safe_load(open("params.yaml")).get(name.split("@")[0], {})
    print(f"{name}: reading {len(sources)} files", flush=True)
    if "sleep" in settings:
        time.sleep(settings["sleep"])
    if settings.get("fail") == "refuse":
        sys.exit("error: the number of neurons is negative. Give a positive one.")
    if settings.get("fail") == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if settings.get("fail") == "once":
        mark = pathlib.Path("tried-before")
        if not mark.exists():
            mark.touch()
            print("error: storage does not answer", file=sys.stderr)
            sys.exit(75)
    inputs = "".join(pathlib.Path(source).read_text() for source in sources)
    if "please refuse" in inputs:
        sys.exit("error: the data asks to be refused. Give other data.")
    if "please wait" in inputs:
        time.sleep(3600)
    text = f"{name} {settings.get('value')}\\n" + "".join(pathlib.Path(source).read_text() for source in sources)
    pathlib.Path(out).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(out).write_text(text)
    print(f"{name}: wrote {len(text)} characters", flush=True)
"""

DVC_YAML = """
    stages:
      collect:
        foreach: ${models}
        do:
          cmd: python code/step.py collect@${key} activations/${key} ${item.data}
          deps: [code/step.py, "${item.data}"]
          params: [collect, "models.${key}"]
          outs: ["activations/${key}"]
      match:
        cmd: python code/step.py match pairing activations/digits activations/fashion
        deps: [code/step.py, activations/digits, activations/fashion]
        params: [match]
        outs: [pairing]
      evaluate:
        cmd: python code/step.py evaluate metrics.txt pairing
        deps: [code/step.py, pairing]
        params: [evaluate]
        outs: [metrics.txt]
"""

PARAMS = """
    group: small
    models:
      digits: {data: data/digits.txt}
      fashion: {data: data/fashion}
    collect: {value: 1}
    match: {value: 1}
    evaluate: {value: 1}
"""

GROUP_PARAMS = """
    group: small
    models:
      digits: {network: "tasks.models.example_networks:lenet5", weights: networks/any, data: data/digits.txt}
      fashion: {network: "tasks.models.example_networks:lenet5", weights: networks/any, data: data/fashion}
    collect: {images: 1}
    match: {share: 1.0}
    evaluate: {batch_size: 1}
    register: {name: small}
"""
"""What params.yaml says where it is validated; the stages read none of it."""

STAGES = ("collect@digits", "collect@fashion", "match", "evaluate")


def make_project(root: Path) -> None:
    """Write the small project into `root`."""
    (root / "code").mkdir(parents=True)
    (root / "data").mkdir()
    (root / "code" / "step.py").write_text(textwrap.dedent(STEP))
    (root / "dvc.yaml").write_text(textwrap.dedent(DVC_YAML))
    (root / "params.yaml").write_text(textwrap.dedent(PARAMS))
    (root / "data" / "digits.txt").write_text("0123456789\n")
    (root / "data" / "fashion").write_text("coat\n")


def job_of(
    root: Path, contents: Contents, place: StorageParams, group: str, kind: Literal["group", "model"] = "group"
) -> Job:
    """A job of the project as it is now, whose snapshot the storage has."""
    params = {**yaml.safe_load(textwrap.dedent(GROUP_PARAMS)), "group": group, "storage": place.model_dump()}
    if kind == "model":
        params["models"] = {group: params["models"][group]}
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    taken = Project(root, contents).take(params)
    fingerprint = taken.keep(contents)
    contents.upload({fingerprint, *taken.files.values()})
    return Job(fleet="fleet", kind=kind, group=group, fingerprint=fingerprint, settings=params, run="run")


def params_of(root: Path, **blocks: dict[str, object]) -> dict[str, object]:
    """The project's parameters with some blocks replaced."""
    return {**yaml.safe_load((root / "params.yaml").read_text()), **blocks}


class Group:
    """One group of a small project, prepared anew for each use."""

    def __init__(self, root: Path, remote: Remote | None = None, environment: dict[str, str] | None = None) -> None:
        self.root = root
        self.home = root / ".mtz"
        self.folder = folder_of(self.home, "small")
        self.remote = remote or Remote(str(root.parent / "remote"))
        self.environment = environment or {}
        self.patience = PATIENCE_SECONDS

    def prepare(self, **blocks: dict[str, object]) -> tuple[Pipeline, tuple[Stage, ...]]:
        params, contents = params_of(self.root, **blocks), Contents(self.home / "contents")
        taken = Project(self.root, contents).take(params)
        with held(self.folder, self.patience) as folder:
            cache = cache_of(self.home)
            return prepare(folder, taken, contents, params, cache, self.remote, self.environment)

    def run(self, **blocks: dict[str, object]) -> list[str]:
        """Reproduce all stages; return their outcomes."""
        pipeline, stages = self.prepare(**blocks)
        return [pipeline.reproduce(stage.name).outcome for stage in stages]


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """All files of a folder but DVC's own: name → inode, time of change, content."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file() and ".dvc" not in path.parts
    }
