"""README and the pages of `docs` tell the truth: snippets run, settings are valid, commands exist, links lead on."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
import typer.main
import yaml
from torch import nn

from flows.cli import app
from flows.spec.fleet_file import FleetFile
from mtz_core.network.operations import OPERATIONS
from tasks.params import read_yaml, validate
from tests.support.several import MaskedEncoder, masked

pytestmark = pytest.mark.slow

ROOT = Path.cwd()
PAGES = (*sorted(Path().glob("*.md")), Path("data/README.md"), *sorted(Path("docs").rglob("*.md")))
TUTORIAL = Path("docs/your-own-models.md")

_BLOCK = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<body>.*?)^ *```$", re.M | re.S
)
_LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
_CALL = re.compile(
    r"(?:[A-Z_]+=\S+ |eval \"\$\(|docker compose .* exec coordinator )*((?:\.venv/bin/)?(?:mtz|make) [^)]+)"
)
_INLINE = re.compile(r"`((?:\.venv/bin/)?(?:mtz|make) [^`]+)`")
_PATH = re.compile(r"`((?:\.ci|data|docs|examples|flows|infra|mtz_core|tasks|tests)/[\w./-]*)`")
_PLACEHOLDER = re.compile(r"(?:^|/)[A-Z]+(?:\.\w+)?(?:/|$)")


@dataclass(frozen=True)
class Block:
    """A block of code on a page."""

    page: Path
    language: str
    title: str | None
    body: str

    def __str__(self) -> str:
        return f"{self.page}: {self.title or self.body.strip().splitlines()[0][:40]}"


def blocks(*languages: str) -> list[Block]:
    """All blocks in one of these languages, page by page."""
    return [
        Block(page, found["language"], found["title"], dedent(found["body"]))
        for page in PAGES
        for found in _BLOCK.finditer(page.read_text(encoding="utf-8"))
        if found["language"] in languages
    ]


# --- Python ---


def perceptron(classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, classes))


class Detector(nn.Module):
    """Puts out classes and boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.logits, self.boxes = perceptron(8), nn.Linear(8, 3), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.body(x).relu()
        return {"logits": self.logits(y), "boxes": self.boxes(y)}


def names() -> dict[str, Any]:
    """What snippets speak of without saying where it comes from."""
    torch.manual_seed(0)
    x = torch.randn(200, 1, 4, 4)
    given: dict[str, Any] = dict.fromkeys(
        ("x", "images_a", "images_b", "x_a", "x_b", "x_c", "x_d", "inputs", "test_a"), x
    )
    given |= {name: perceptron(3).eval() for name in ("net_a", "net_b", "a", "b", "c", "d", "module", "network")}
    labels = torch.zeros(200, dtype=torch.int64)
    texts = masked(60)
    given |= {
        "ids": texts["input_ids"],
        "mask": texts["attention_mask"],
        "batch_1": texts,
        "batch_2": masked(60, seed=2),
    }
    given |= {"bert_a": MaskedEncoder().eval(), "bert_b": MaskedEncoder().eval()}
    given |= {"detector_a": Detector().eval(), "detector_b": Detector().eval(), "boxes": torch.zeros(200, 4)}
    return {**given, "example": x[:2], "labels": labels, "labels_a": labels, "classes": labels}


@pytest.mark.parametrize("block", [b for b in blocks("python") if b.page != TUTORIAL], ids=str)
def test_snippets_run(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mtz_core.network.operations.OPERATIONS", dict(OPERATIONS))
    for folder in ("exports", "data/mine"):
        Path(folder).mkdir(parents=True)
    exec(compile(block.body, str(block), "exec"), names())


@pytest.mark.timeout(600)
def test_your_own_models_can_be_followed(tmp_path: Path) -> None:
    for name in ("mtz_core", "tasks", "flows", "examples"):
        shutil.copytree(name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "fleet.yaml", "pyproject.toml"):
        shutil.copy(name, tmp_path)
    for block in blocks("python", "yaml"):
        if block.page == TUTORIAL and block.title:
            (tmp_path / block.title).write_text(block.body)

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True)

    for linter in (("check",), ("format", "--check")):
        linted = python("-m", "ruff", *linter, "my_networks.py", "prepare.py")
        assert linted.returncode == 0, linted.stdout
    prepared = python("prepare.py")
    assert prepared.returncode == 0, prepared.stderr
    kept = python("-m", "flows.cli", "check")
    assert kept.returncode == 1 and "digits" in kept.stderr, "with the example's fleet.yaml, as the page warns"
    (tmp_path / "fleet.yaml").unlink()
    checked = python("-m", "flows.cli", "check")
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.endswith("All is well: `mtz run` can start.\n")


# --- YAML ---


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_settings_are_valid(block: Block) -> None:
    content = yaml.safe_load(block.body)
    if "version" in content:
        FleetFile.model_validate(content)
        return
    whole = [b for b in blocks("yaml") if b.page == block.page and "group:" in b.body]
    base = yaml.safe_load(whole[0].body) if whole else read_yaml(Path("params.yaml"))
    validate(base | content, str(block))


# --- commands ---


def command_lines() -> Iterator[tuple[str, str]]:
    """Every line of a page that calls `mtz` or `make`, and every such call in a sentence."""
    for block in blocks(""):
        for line in block.body.splitlines():
            if found := _CALL.match(line.partition(" #")[0]):
                yield str(block.page), found[1].strip()
    for page in PAGES:
        prose = _BLOCK.sub("", page.read_text(encoding="utf-8"))
        for found in _INLINE.finditer(prose):
            yield str(page), " ".join(found[1].split())


@pytest.mark.parametrize(("page", "line"), sorted(set(command_lines())))
def test_commands_exist(page: str, line: str) -> None:
    words = shlex.split(line.replace("…", "x"))
    if words[0] == "make":
        targets = re.findall(r"^([a-z][a-z0-9-]*):.*?##", Path("Makefile").read_text(), re.M)
        named = [word for word in words[1:] if "=" not in word]
        assert named and named[0] in targets, f"{page}: make has no {named}"
        return
    command: Any = typer.main.get_command(app)
    rest = words[1:]
    while rest and rest[0] in getattr(command, "commands", {}):
        command = command.commands[rest.pop(0)]
    assert not getattr(command, "commands", None) or not rest or rest[0].startswith("-"), f"{page}: no command {line}"
    own = rest[: rest.index("--")] if "--" in rest else rest
    known = {text for option in command.params for text in option.opts} | {"--help", "--version"}
    for word in own:
        if word.startswith("--"):
            assert word.partition("=")[0] in known, f"{page}: {line}: there is no {word}"


# --- links ---


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    prose = _BLOCK.sub("", page.read_text(encoding="utf-8"))
    for found in _LINK.finditer(prose):
        target, _, anchor = found["target"].partition("#")
        if "://" in target:
            continue
        file = (page.parent / target).resolve() if target else page.resolve()
        assert file.exists(), f"{page} links to {found['target']}"
        assert file.is_relative_to(ROOT), f"{page} links to {found['target']}, outside of the project"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page} links to {found['target']}"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_named_paths_exist(page: Path) -> None:
    made = {"infra/.env"}  # by infra/new-env.sh, never committed
    for path in _PATH.findall(_BLOCK.sub("", page.read_text(encoding="utf-8"))):
        assert path in made or _PLACEHOLDER.search(path) or Path(path).exists(), f"{page} names {path}"


def anchors(file: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts and mkdocs make them."""
    headings = re.findall(r"^#+ +(.+)$", _BLOCK.sub("", file.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
