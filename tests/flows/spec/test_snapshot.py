"""Laws of the snapshot: all that a pipeline reads, nothing of where or when, and the same digest for the same."""

from pathlib import Path

import pytest
import yaml
from safetensors.torch import save_file
from torch import nn

from flows.group.dvc import Pipeline
from flows.spec.fleet_file import read_fleet
from flows.spec.snapshot import InvalidPipeline, MissingSource, Project, Snapshot
from tasks.sources import Access, SourceError
from tasks.storage import s3
from tasks.storage.contents import Contents
from tests.support.small_project import Group, params_of

ROOT = Path(__file__).parents[3]


@pytest.fixture
def contents(tmp_path: Path) -> Contents:
    return Contents(tmp_path / "contents")


def test_it_has_what_dvc_says_that_the_stages_read(group: Group, contents: Contents) -> None:
    """Templates are filled in here as DVC does, which would need a process for each group."""
    (group.root / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    (group.root / "params.yaml").write_text(yaml.safe_dump(params))
    (group.root / ".dvc").mkdir()
    (group.root / ".dvc" / "config").write_text("[core]\n    no_scm = true\n")
    stages = Pipeline(group.root).stages()
    outputs = {output for stage in stages for output in stage.outputs}
    made = {str(parent) for output in outputs for parent in Path(output).parents}
    read = {name for stage in stages for name in stage.dependencies} - outputs - made - {"params.yaml"}
    for name in read:
        (group.root / name).mkdir(parents=True, exist_ok=True)
        (group.root / name / "file").write_text(name)
    taken = Project(group.root, contents).take(params)
    assert {str(Path(name).parent) for name in taken.files} - {"."} == read - {"data"}, "of data, the models' own"


def test_files_of_other_models_belong_to_other_groups(group: Group, contents: Contents) -> None:
    content = yaml.safe_load((group.root / "dvc.yaml").read_text())
    content["stages"]["match"]["deps"] += ["data"]
    (group.root / "dvc.yaml").write_text(yaml.safe_dump(content))
    params = {**params_of(group.root), "note": ""}
    before = Project(group.root, contents).take(params)
    assert "data/digits.txt" in before.files
    (group.root / "data" / "letters.txt").write_text("abc\n")
    assert Project(group.root, contents).take(params) == before
    (group.root / "data" / "digits.txt").write_text("9\n")
    assert Project(group.root, contents).take(params) != before


def test_the_fingerprint_is_of_what_results_depend_on(group: Group, contents: Contents) -> None:
    params = params_of(group.root)
    before = Project(group.root, contents).take(params).keep(contents)
    places = {"storage": {"bucket": "other"}, "tracking": {"uri": "other"}, "flow": {"workers": 9}}
    assert Project(group.root, contents).take({**params, **places}).keep(contents) == before
    assert Project(group.root, contents).take(dict(reversed(params.items()))).keep(contents) == before
    assert Project(group.root, contents).take({**params, "match": {"value": 2}}).keep(contents) != before
    (group.root / "data" / "digits.txt").write_text("9\n")
    changed = Project(group.root, contents).take(params)
    assert changed.keep(contents) != before
    loaded = Snapshot.load(contents, changed.keep(contents))
    assert loaded == changed
    assert contents.read(loaded.files["data/digits.txt"]) == b"9\n"


def test_models_that_the_fleet_declares_have_places_of_their_own(group: Group, tmp_path: Path) -> None:
    root = group.root
    (root / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    (root / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    for name in ("mtz_core", "tasks"):
        (root / name).symlink_to(ROOT / name)
    (root / "my_networks.py").write_text("'''Builds networks.'''\n")
    for name in ("a", "b"):
        save_file(nn.Linear(2, 2).state_dict(), root / f"{name}.safetensors")
        (root / "data" / name).mkdir()
        for split in ("train", "validation", "test"):
            (root / "data" / name / f"{split}.parquet").write_text(f"{name} {split}")
    declared = {n: {"source": f"{n}.safetensors", "network": "my_networks:build", "data": f"data/{n}"} for n in "ab"}
    fleet = {"version": 2, "models": declared, "groups": {"pair": {"models": ["a", "b"]}}}
    (root / "fleet.yaml").write_text(yaml.safe_dump(fleet))
    (plan,) = read_fleet(root / "params.yaml", root / "fleet.yaml").explicit_groups()
    contents = Contents(group.home / "contents")
    with s3.connect(plan.params.storage, tmp_path / "home") as store:
        access = Access(root, group.home, contents, store, plan.params.tracking)
        project = Project(root, contents)
        files = project.group(plan, access).files
        model = read_fleet(root / "params.yaml", root / "fleet.yaml").model("a")
        own = project.model(model, access)
        (root / "a.safetensors").unlink()
        with pytest.raises(SourceError, match=r"models\.a\.source"):
            Project(root, contents).group(plan, access)
    placed = {name for name in files if name.startswith(("networks/", "data/"))}
    splits = {f"data/{name}/{split}.parquet" for name in "ab" for split in ("train", "validation", "test")}
    assert placed == splits | {"networks/a.safetensors", "networks/b.safetensors"}
    assert {"my_networks.py", "dvc.yaml", "tasks/stages/match.py", "mtz_core/merging/matching.py"} <= files.keys()
    stages = yaml.safe_load(contents.read(own.files["dvc.yaml"]))["stages"]
    assert set(stages) == {"pretrain", "collect", "hessians"}
    assert not any(name.startswith(("networks/b", "data/b")) for name in own.files)


def test_what_is_missing_or_damaged_is_named(group: Group, contents: Contents) -> None:
    params = params_of(group.root)
    with pytest.raises(InvalidPipeline, match=r"\$\{item\.data\} is not in params\.yaml"):
        Project(group.root, contents).take({**params, "models": {"digits": {}}})
    (group.root / "data" / "digits.txt").unlink()
    with pytest.raises(MissingSource, match=r"data/digits\.txt does not exist"):
        Project(group.root, contents).take(params)
    (group.root / "dvc.yaml").write_text("stages: 3")
    with pytest.raises(InvalidPipeline, match="cannot be read"):
        Project(group.root, contents).take(params)
