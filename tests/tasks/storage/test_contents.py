"""Tests of the store of contents: what is read, what is sent, what is fetched, and what is refused."""

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tasks import files
from tasks.storage import contents
from tasks.storage.contents import Contents, MissingContent, SourceChanged, stored_key
from tasks.storage.s3 import Storage, StorageError

ROOT = Path(__file__).resolve().parents[3]


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def local(tmp_path: Path) -> Contents:
    return Contents(tmp_path / "contents")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file that is old enough for its timestamp to be believed."""
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(3 << 20))
    os.utime(file, (0, 0))
    return file


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the store copies and hashes while the test runs."""
    done: list[str] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            done.append(name)
            return function(*arguments)

        return call

    monkeypatch.setattr(contents, "_copy", counted("copy", contents._copy))
    monkeypatch.setattr(contents, "sha256", counted("hash", files.sha256))
    return done


def test_a_file_is_kept_by_its_content_and_read_only(local: Contents, source: Path) -> None:
    digest = local.add(source)
    assert digest == digest_of(source.read_bytes())
    path = local.path(digest)
    assert path.parts[-2:] == (digest[:2], digest)
    assert path.read_bytes() == source.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o444
    assert local.add_bytes(b"small") == digest_of(b"small")
    assert local.read(digest_of(b"small")) == b"small"


def test_an_unchanged_file_is_read_once(local: Contents, source: Path, tmp_path: Path, reads: list[str]) -> None:
    digest = local.add(source)
    assert reads == ["copy"]
    assert local.add(source) == digest
    assert Contents(tmp_path / "contents").add(source) == digest
    assert Contents(tmp_path / "contents").path(digest).exists()
    assert reads == ["copy"]


@pytest.mark.parametrize("same_size", [True, False])
def test_a_changed_file_is_read_again(local: Contents, source: Path, same_size: bool) -> None:
    first = local.add(source)
    source.write_bytes(os.urandom(3 << 20) if same_size else b"shorter")
    assert local.add(source) == digest_of(source.read_bytes()) != first


def test_a_file_that_was_just_written_is_not_trusted(
    local: Contents, tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "young"
    file.write_bytes(b"1")
    for age, expected in ((0, 1), (contents._SETTLED_NS, 2), (contents._SETTLED_NS + 1, 3), (contents._SETTLED_NS, 3)):
        monkeypatch.setattr(time, "time_ns", lambda age=age: file.stat().st_mtime_ns + age)
        local.add(file)
        assert reads == expected * ["copy"]


def changing(monkeypatch: pytest.MonkeyPatch, source: Path, times: int) -> None:
    """Have the source written to just after it was copied, so many times."""
    copy, left = contents._copy, [times]

    def disturbed(read: Any, write: Any) -> str:
        digest = copy(read, write)
        if left[0]:
            left[0] -= 1
            with source.open("ab") as file:
                file.write(b"more")
        return digest

    monkeypatch.setattr(contents, "_copy", disturbed)


def test_a_file_that_changes_meanwhile_is_read_again(
    local: Contents, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changing(monkeypatch, source, times=2)
    assert local.path(local.add(source)).read_bytes() == source.read_bytes()


def test_a_file_that_keeps_changing_is_refused(
    local: Contents, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changing(monkeypatch, source, times=9)
    with pytest.raises(SourceChanged, match=r"weights changes while it is read.*renaming"):
        local.add(source)
    assert [file for file in (tmp_path / "contents").rglob("*") if file.is_file() and file.name != "index.db"] == []


def test_a_damaged_file_is_fetched_again(store: Storage, source: Path, tmp_path: Path, reads: list[str]) -> None:
    backed = Contents(tmp_path / "contents", store)
    digest = backed.add(source)
    assert backed.upload([digest]) == 1
    path = backed.path(digest)
    path.chmod(0o644)
    path.write_bytes(b"damaged")
    assert backed.path(digest).read_bytes() == source.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o444
    reads.clear()
    backed.path(digest)
    assert reads == []


def test_a_damaged_file_without_a_storage_is_missing(local: Contents) -> None:
    digest = local.add_bytes(b"1")
    path = local.path(digest)
    path.chmod(0o644)
    path.write_bytes(b"2")
    with pytest.raises(MissingContent, match=r"is not in .*contents"):
        local.path(digest)
    assert not path.exists()


def test_another_machine_gets_what_was_uploaded(store: Storage, source: Path, tmp_path: Path) -> None:
    here, there = (Contents(tmp_path / name, store) for name in ("here", "there"))
    digests = [here.add(source), here.add_bytes(b""), *(here.add_bytes(f"{i}".encode()) for i in range(40))]
    assert here.upload(digests) == 42
    assert here.upload(digests) == 0
    assert there.upload(digests) == 0
    assert [there.read(digest) for digest in digests] == [here.read(digest) for digest in digests]
    assert list((tmp_path / "there" / "incoming").iterdir()) == []


def test_only_what_the_storage_lacks_is_sent_in_few_calls(
    store: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Contents(tmp_path / "contents", store)
    digests = [first.add_bytes(f"{i}".encode()) for i in range(30)]
    first.upload(digests[:25])
    asked: list[str] = []
    store.client.meta.events.register("before-call.s3", lambda model, **_: asked.append(model.name))
    assert Contents(tmp_path / "contents", store).upload(digests) == 5
    assert sorted(asked) == ["ListObjectsV2", *["PutObject"] * 5]


def test_what_is_nowhere(store: Storage, tmp_path: Path) -> None:
    with pytest.raises(MissingContent, match=r"neither in .* nor at s3://.*not there.*mtz run"):
        Contents(tmp_path / "contents", store).path("0" * 64)


def test_a_damaged_object_is_refused(store: Storage, tmp_path: Path) -> None:
    digest = digest_of(b"as it was")
    store.put(stored_key(digest), b"as it is")
    backed = Contents(tmp_path / "contents", store)
    with pytest.raises(StorageError, match="damaged"):
        backed.path(digest)
    assert list((tmp_path / "contents").rglob(f"*{digest[:8]}*")) == []


def test_places_are_remembered_while_their_content_is_to_be_had(store: Storage, tmp_path: Path) -> None:
    first = Contents(tmp_path / "contents", store)
    kept, lost = first.add_bytes(b"kept"), first.add_bytes(b"lost")
    first.remember("s3://bucket/kept 1", kept)
    first.remember("s3://bucket/lost 1", lost)
    first.upload([kept])
    for digest in (kept, lost):
        first.path(digest).unlink()
    later = Contents(tmp_path / "contents", store)
    assert later.recall("s3://bucket/kept 1") == kept
    assert later.recall("s3://bucket/lost 1") is None
    assert later.recall("s3://bucket/kept 2") is None


def test_a_damaged_index_costs_only_work(local: Contents, source: Path, tmp_path: Path) -> None:
    digest = local.add(source)
    (tmp_path / "contents" / "index.db").write_bytes(b"no database" * 1000)
    again = Contents(tmp_path / "contents")
    assert again.path(digest).exists()
    assert again.add(source) == digest


def test_what_killed_writers_left_is_removed(local: Contents, tmp_path: Path) -> None:
    old, young = (tmp_path / "contents" / "incoming" / name for name in ("old", "young"))
    for file in (old, young):
        file.write_bytes(b"half")
    os.utime(old, (0, 0))
    Contents(tmp_path / "contents")
    assert not old.exists()
    assert young.exists()


MANY = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tasks.storage.contents import Contents
folder, files = Path(sys.argv[1]), [Path(file) for file in sys.argv[2:]]
with ThreadPoolExecutor(4) as pool:
    print(*pool.map(Contents(folder).add, files * 3))
"""


def test_threads_and_processes_at_once(tmp_path: Path) -> None:
    sources = [tmp_path / f"{i}" for i in range(6)]
    for i, file in enumerate(sources):
        file.write_bytes(bytes([i]) * (1 << 20))
    command = [sys.executable, "-c", MANY, str(tmp_path / "contents"), *map(str, sources)]

    def run(_: int) -> str:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    with ThreadPoolExecutor(2) as pool:
        said = set(pool.map(run, range(2)))
    assert said == {" ".join(3 * [digest_of(file.read_bytes()) for file in sources]) + "\n"}
    kept = [file for file in (tmp_path / "contents").rglob("*") if file.is_file() and file.name != "index.db"]
    assert sorted(file.name for file in kept) == sorted(digest_of(file.read_bytes()) for file in sources)
