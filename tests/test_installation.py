"""The wheel: the core alone asks for few packages and works with no other; the command says what it lacks."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("mtz_core", "tasks", "flows")
CORE = {"jaxtyping", "numpy", "safetensors", "scipy", "torch"}
# Imported packages that a requirement of another name brings.
BROUGHT_BY = {"botocore": "boto3", "distributed": "prefect-dask", "mlflow": "mlflow", "s3transfer": "boto3"}

ZIP = """
import sys, torch, mtz_core
assert mtz_core.__file__.startswith(sys.argv[1]), mtz_core.__file__
def network():
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
zipped = mtz_core.zip_networks(
    {"a": network(), "b": network()}, calibration={"a": torch.randn(50, 4), "b": torch.randn(50, 4)}
)
zipped.save(sys.argv[1] + "/zipped")
assert mtz_core.load(sys.argv[1] + "/zipped")(torch.zeros(3, 4), task="b").shape == (3, 2)
print(mtz_core.__version__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the sources: building writes beside them."""
    sources = tmp_path_factory.mktemp("sources")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*command, "--wheel-dir", sources / "dist", sources], check=True)
    [wheel] = (sources / "dist").glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def core_alone(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages as `pip install .` leaves it: ours, what it requires, and nothing else."""
    site = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(site)
    for distribution in closure(CORE):
        names = {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}
        for name in names:
            if not (site / name).exists():
                (site / name).symlink_to(distribution.locate_file(name))  # type: ignore[arg-type]
    return site


def closure(names: set[str]) -> Iterator[metadata.Distribution]:
    """The installed distributions of these names and, again and again, of what they require without an extra."""
    waiting, seen = sorted(names), set(names)
    while waiting:
        distribution = metadata.distribution(waiting.pop())
        yield distribution
        for required in required_by(distribution) - seen:
            seen.add(required)
            waiting.append(required)


def required_by(distribution: metadata.Distribution, extra: str = "") -> set[str]:
    requirements = map(Requirement, distribution.requires or ())
    return {r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": extra})}


def imported_by(package: str) -> set[str]:
    """The distributions of other people that a package imports, anywhere in its code."""
    trees = [ast.parse(file.read_text()) for file in (ROOT / package).rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    foreign = {name.split(".")[0] for name in names} - sys.stdlib_module_names - {*PACKAGES}
    known = metadata.packages_distributions()
    return {BROUGHT_BY.get(name) or known[name][0].lower().replace("_", "-") for name in foreign}


def run(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the packages of one folder alone."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-S", *arguments]
    return subprocess.run(command, cwd=site, env=environment, capture_output=True, text=True, check=False)


def test_the_core_requires_what_it_imports_and_no_more(core_alone: Path) -> None:
    [ours] = metadata.distributions(name="mtz", path=[str(core_alone)])
    assert required_by(ours) == CORE == imported_by("mtz_core")


def test_the_extras_bring_what_the_pipeline_imports(core_alone: Path) -> None:
    [ours] = metadata.distributions(name="mtz", path=[str(core_alone)])
    brought = required_by(ours, "pipeline") | required_by(ours, "cluster")
    assert imported_by("tasks") | imported_by("flows") <= {name.lower() for name in brought}
    assert "mtz" in required_by(ours, "cluster")  # with the pipeline


def test_the_wheel_holds_every_module_and_data_file(wheel: Path) -> None:
    files = {
        file.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == files
    assert {"mtz_core/py.typed", "tasks/studies/pareto_template.json", "flows/group/dvc_index.py"} <= held


@pytest.mark.long
def test_the_core_works_with_what_it_requires_alone(core_alone: Path) -> None:
    zipped = run(core_alone, "-c", ZIP, str(core_alone))
    assert zipped.returncode == 0, zipped.stderr
    assert zipped.stdout.strip() == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_the_command_names_the_extra_that_it_needs(core_alone: Path) -> None:
    [script] = metadata.distributions(name="mtz", path=[str(core_alone)])
    [command] = script.entry_points.select(group="console_scripts")
    assert (command.name, command.value) == ("mtz", "flows.__main__:main")
    for arguments in ([], ["--help"], ["run"]):
        refused = run(core_alone, "-m", "flows", *arguments)
        assert refused.returncode == 1
        assert refused.stdout == ""
        [line] = refused.stderr.splitlines()
        assert line.startswith("error: ") and 'pip install ".[pipeline]"' in line


def test_the_command_says_its_version() -> None:
    command = [sys.executable, "-m", "flows", "--version"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout == f"mtz {metadata.version('mtz')}\n"
