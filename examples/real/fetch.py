"""Packages with real networks, from the package registries that this machine is configured with.

A package is pinned: its version, and the SHA-256 of its archive, which is checked before the archive is opened. Only
the members that are needed leave it. Nothing of a package is installed or run.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from mtz_core.errors import MtzError
from tasks.files import sha256, whole_folder


class UnusablePackage(MtzError):
    """A package cannot be fetched, or is not the one that is pinned."""


@dataclass(frozen=True)
class Package:
    """One release of a package.

    Attributes:
        registry: Where it is published.
        name: Its name there.
        version: The release.
        licence: The licence that the package states.
        archive: Name of the archive's file.
        sha256: Digest of the archive, hexadecimal.
        members: The members of the archive that are needed.
        statement: The member that states the licence.
    """

    registry: Literal["npm", "PyPI"]
    name: str
    version: str
    licence: str
    archive: str
    sha256: str
    members: tuple[str, ...]
    statement: str

    @property
    def title(self) -> str:
        """Name, version and registry in words."""
        return f"{self.name} {self.version} ({self.registry})"

    @property
    def folder(self) -> str:
        """Name of the folder for its members."""
        return f"{self.name.rpartition('/')[2]}-{self.version}"


FACES = Package(
    registry="npm",
    name="@vladmandic/face-api",
    version="1.7.15",
    licence="MIT",
    archive="vladmandic-face-api-1.7.15.tgz",
    sha256="0d77fffeef362ef9c0939cf6c567f3a2e8e177f114fa257a3270cbd2e509b031",
    members=tuple(
        f"package/model/{model}_model{end}"
        for model in ("face_expression", "face_landmark_68")
        for end in ("-weights_manifest.json", ".bin")
    ),
    statement="package/LICENSE",
)

MAGIKA_0_6 = Package(
    registry="PyPI",
    name="magika",
    version="0.6.1",
    licence="Apache-2.0",
    archive="magika-0.6.1-py3-none-manylinux_2_28_x86_64.whl",
    sha256="133c0e1a844361de86ca2dd7c530e38b324e86177d30c52e36fd82101c190b5c",
    members=("magika/models/standard_v3_2/model.onnx",),
    statement="magika-0.6.1.dist-info/METADATA",
)

MAGIKA_1_0 = Package(
    registry="PyPI",
    name="magika",
    version="1.0.3",
    licence="Apache-2.0",
    archive="magika-1.0.3-py3-none-manylinux_2_28_x86_64.whl",
    sha256="3e9b49134e8116ee40b431664dcbed9e199413efddcce1a173c734b4e0521529",
    members=("magika/models/standard_v3_3/model.onnx",),
    statement="magika-1.0.3.dist-info/METADATA",
)

PICTURES = Package(
    registry="PyPI",
    name="scikit-image",
    version="0.26.0",
    licence="BSD-3-Clause",
    archive="scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    sha256="74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
    members=("skimage/data/lfw_subset.npy",),
    statement="scikit_image-0.26.0.dist-info/LICENSE.txt",
)

PACKAGES = (FACES, MAGIKA_0_6, MAGIKA_1_0, PICTURES)


def fetch(package: Package, folder: Path) -> Path:
    """Fetch a package, unless its archive is there already, and take out what is needed.

    Args:
        package: The package.
        folder: The folder to write to: archives into `archives`, members into a folder of the package's name.

    Returns:
        The folder with the members.

    Raises:
        UnusablePackage: The package cannot be fetched, or is not the one that is pinned.
    """
    archive = folder / "archives" / package.archive
    if not archive.is_file():
        _download(package, archive)
    members = folder / package.folder
    extract(package, archive, members)
    return members


def extract(package: Package, archive: Path, folder: Path) -> None:
    """Check an archive, and write the members that are needed to a folder, which is replaced.

    Args:
        package: The package.
        archive: The file of its archive.
        folder: The folder for the members.

    Raises:
        UnusablePackage: The archive is not the one that is pinned, lacks a member, or a member is no plain file or
            would lie outside of the folder.
    """
    found = sha256(archive)
    if found != package.sha256:
        raise UnusablePackage(
            f"{archive} is not {package.title}: its SHA-256 is {found}, not {package.sha256}. Delete it and run this "
            "again."
        )
    with whole_folder(folder) as partial, _opened(archive) as content:
        for member in (*package.members, package.statement):
            target = partial / _inside(member)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content.read(member))


def _inside(member: str) -> PurePosixPath:
    """Return the path of a member if it stays inside the folder that it is joined to."""
    path = PurePosixPath(member)
    if path.is_absolute() or ".." in path.parts or "\\" in member or not path.parts:
        raise UnusablePackage(f"the member {member!r} would leave its folder. Name one that does not.")
    return path


@dataclass(frozen=True)
class _Archive:
    """An archive that is open for reading.

    Attributes:
        path: Its file.
        content: The archive.
    """

    path: Path
    content: tarfile.TarFile | zipfile.ZipFile

    def read(self, member: str) -> bytes:
        """Return the content of a member that is a plain file."""
        try:
            if isinstance(self.content, zipfile.ZipFile):
                return self.content.read(member)
            entry = self.content.getmember(member)
        except KeyError:
            raise UnusablePackage(f"{self.path} has no member {member!r}. Name one that it has.") from None
        # A link could give the content of another file.
        file = self.content.extractfile(entry) if entry.isreg() else None
        if file is None:
            raise UnusablePackage(f"the member {member!r} of {self.path} is no plain file. Name one that is.")
        return file.read()


@contextmanager
def _opened(path: Path) -> Iterator[_Archive]:
    try:
        opened = zipfile.ZipFile(path) if path.suffix == ".whl" else tarfile.open(path)  # noqa: SIM115 - closed below
    except (zipfile.BadZipFile, tarfile.TarError, OSError) as error:
        raise UnusablePackage(f"{path} is no readable archive: {error}. Delete it and run this again.") from error
    with opened:
        yield _Archive(path, opened)


def _download(package: Package, archive: Path) -> None:
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
        command = _command(package, folder)
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise UnusablePackage(
                f"{package.title} cannot be fetched: there is no program {command[0]!r}. Install it, or put the "
                f"archive there: {archive}"
            ) from None
        fetched = Path(folder, archive.name)
        if done.returncode or not fetched.is_file():
            said = (done.stderr.strip() or done.stdout.strip() or "it gave no such archive").splitlines()[-1]
            raise UnusablePackage(
                f"{package.title} cannot be fetched by {' '.join(command)}: {said}. Check the network and the registry "
                f"that this machine is configured with, or put the archive there: {archive}"
            )
        fetched.replace(archive)


def _command(package: Package, folder: str) -> Sequence[str]:
    if package.registry == "npm":
        exact = f"{package.name}@{package.version}"
        return ("npm", "pack", "--silent", "--ignore-scripts", "--pack-destination", folder, exact)
    # The pinned wheels, whatever this machine is.
    tags = ("--python-version", "3.11", "--platform", "manylinux_2_28_x86_64", "--only-binary=:all:")
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps")
    return (*pip, *tags, "--dest", folder, f"{package.name}=={package.version}")
