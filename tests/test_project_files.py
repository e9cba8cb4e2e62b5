"""The files around the code are valid, and they agree with it and with each other."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


def run(*arguments: str) -> None:
    checked = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def pinned(file: str) -> dict[str, str]:
    """The exact versions in a file of requirements."""
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
    return {Requirement(line).name: str(Requirement(line).specifier).removeprefix("==") for line in lines}


def lowest(requirement: Requirement) -> str:
    [bound] = [s.version for s in requirement.specifier if s.operator == ">="]
    return bound


@pytest.mark.parametrize(
    ("schema", "file"),
    [("vendor.citation-file-format", "CITATION.cff"), ("vendor.github-workflows", ".github/workflows/ci.yml")],
)
def test_files_keep_to_their_schemas(schema: str, file: str) -> None:
    run("check_jsonschema", "--builtin-schema", schema, file)


def test_the_hooks_are_valid_and_download_nothing() -> None:
    run("pre_commit", "validate-config")
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repository["repo"] for repository in hooks["repos"]] == ["local"]
    assert {hook["language"] for hook in hooks["repos"][0]["hooks"]} == {"system"}


def test_one_version_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    headings = re.findall(r"^## \[([\d.]+)\] - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == (PROJECT["version"], citation["date-released"])
    assert citation["version"] == PROJECT["version"]
    assert headings == sorted(headings, key=lambda heading: [int(part) for part in heading[0].split(".")], reverse=True)


def test_the_lowest_versions_are_the_bounds_and_the_environment_keeps_to_them() -> None:
    requirements = [Requirement(text) for text in PROJECT["dependencies"]]
    tested = pinned("tests/lowest-versions.txt")
    assert tested.keys() == {requirement.name for requirement in requirements}
    for requirement in requirements:
        assert tested[requirement.name].startswith(lowest(requirement))
        assert requirement.specifier.contains(tested[requirement.name])
    [torch] = [requirement for requirement in requirements if requirement.name == "torch"]
    assert torch.specifier.contains(pinned("requirements-torch.txt")["torch"])


def test_the_lock_names_no_registry_and_no_torch() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    assert "://" not in lock and "index-url" not in lock
    assert re.search(r"^(torch|triton|nvidia-cu\S*)==", lock, re.MULTILINE) is None


def test_the_workflow_runs_what_every_change_has_to_pass() -> None:
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    assert "bash .ci/run" in [step.get("run") for step in jobs["all"]["steps"]]
    versions = jobs["all"]["strategy"]["matrix"]["python"]
    assert all(f"Programming Language :: Python :: {version}" in PROJECT["classifiers"] for version in versions)
    named = re.findall(r"[\w/.-]+\.txt", WORKFLOW.read_text())
    assert named and all((ROOT / name).exists() for name in named)


def test_every_path_that_contributors_are_told_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    links = re.findall(r"\]\(([^)#]+)\)", text)
    quoted = [word for code in re.findall(r"`([^`\n]+)`", text) for word in code.split()]
    paths = {word for word in quoted if "/" in word and not word.startswith(".venv/")} - {"tasks/stages/NAME.py"}
    assert len(paths) > 30
    assert [path for path in sorted({*paths, *links}) if not (ROOT / path).exists()] == []


def test_every_target_that_contributors_are_told_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    told = set(re.findall(r"\bmake ([a-z-]+)(?=`|\s+#| &&)", (ROOT / "CONTRIBUTING.md").read_text()))
    assert {"setup", "test", "test-core", "check", "docs", "lock"} <= told <= targets
