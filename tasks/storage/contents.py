"""A content-addressed store of source files: every file that a group's pipeline reads, by its SHA-256.

    FOLDER/ab/abcdef…   locally, read-only, and `contents/ab/abcdef…` in the storage
    FOLDER/index.db     what need not be read again: files by their stat, and known digests of remote places
    FOLDER/incoming/    files that are being written, each with a name of its own

The index only saves work: without it, everything is read again.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from mtz_core.errors import MtzError
from tasks.files import sha256
from tasks.storage.s3 import NoSuchObject, Storage

FOLDER = "contents"
"""Name of the folder, both below the home and below the storage's prefix."""

_BLOCK_BYTES = 1 << 20
_ATTEMPTS = 3
_THREADS = 16
_READ_ONLY = 0o444
# Timestamps of files advance in steps of up to 10 ms; a younger file could change again and look the same.
_SETTLED_NS = 50_000_000
_ABANDONED_SECONDS = 24 * 3600

_TABLES = """
CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, size INT, modified INT, inode INT, digest TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS places (key TEXT PRIMARY KEY, digest TEXT NOT NULL);
"""


class MissingContent(MtzError):
    """A content is neither here nor in the storage."""


class SourceChanged(MtzError):
    """A file kept changing while it was read."""


class Contents:
    """The store in a folder, backed by a storage if there is one.

    Several threads and processes may use it at once. All digests are SHA-256, hexadecimal.

    Args:
        folder: The local folder, `HOME/contents`.
        store: The storage; None for a store that is local only.
    """

    def __init__(self, folder: Path, store: Storage | None = None) -> None:
        self._folder = folder
        self._store = store
        self._stored: set[str] | None = None
        self._incoming = folder / "incoming"
        self._incoming.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(self._incoming)
        self._index = _Index(folder / "index.db")

    def add(self, file: Path) -> str:
        """Copy a file into the store; an unchanged file that was added before is not read again.

        Args:
            file: The file.

        Returns:
            Its digest.

        Raises:
            SourceChanged: The file changes each time it is copied.
            OSError: The file cannot be read.
        """
        status = _status(file)
        known = self._index.digest(file, status)
        if known is not None and self._is_sound(known):
            return known
        for _ in range(_ATTEMPTS):
            with self._partial() as partial:
                with file.open("rb") as source, partial.open("wb") as target:
                    digest = _copy(source, target)
                if (after := _status(file)) == status:
                    self._take(partial, digest)
                    if time.time_ns() - status[1] > _SETTLED_NS:
                        self._index.record(file, status, digest)
                    return digest
                status = after
        raise SourceChanged(f"{file} changes while it is read. Put a finished file there by renaming, then run again.")

    def add_bytes(self, content: bytes) -> str:
        """Store a small content; return its digest."""
        digest = hashlib.sha256(content).hexdigest()
        if not self._is_sound(digest):
            with self._partial() as partial:
                partial.write_bytes(content)
                self._take(partial, digest)
        return digest

    def add_made(self, make: Callable[[Path], None]) -> str:
        """Store the file that a function writes.

        Args:
            make: Writes the file at the path that it is given.

        Returns:
            The file's digest.
        """
        with self._partial() as partial:
            make(partial)
            digest = sha256(partial)
            self._take(partial, digest)
        return digest

    def path(self, digest: str) -> Path:
        """Return the local, read-only file of a content; fetch it from the storage if it is missing or damaged.

        Args:
            digest: The content's digest.

        Returns:
            The file.

        Raises:
            MissingContent: The content is neither here nor in the storage.
            StorageError: The storage cannot be used.
        """
        if not self._is_sound(digest):
            self._fetch(digest)
        return self._place(digest)

    def read(self, digest: str) -> bytes:
        """Read a small content; errors are those of `path`."""
        return self.path(digest).read_bytes()

    def has(self, digest: str) -> bool:
        """Return whether a content is here or in the storage.

        Args:
            digest: The content's digest.

        Returns:
            True if it can be read.

        Raises:
            StorageError: The storage cannot be used.
        """
        if self._is_sound(digest):
            return True
        if self._stored is not None:
            return digest in self._stored
        return self._store is not None and self._store.exists(stored_key(digest))

    def recall(self, key: str) -> str | None:
        """Return the digest remembered for a key, such as an object and its version, if its content still exists."""
        digest = self._index.place(key)
        return digest if digest is not None and self.has(digest) else None

    def remember(self, key: str, digest: str) -> None:
        """Remember, for later processes too, that a key stands for this content."""
        self._index.record_place(key, digest)

    def upload(self, digests: Iterable[str]) -> int:
        """Send the contents that the storage lacks.

        Args:
            digests: The contents that the storage should have.

        Returns:
            How many were sent.

        Raises:
            MissingContent: A content is not here, or there is no storage.
            StorageError: The storage cannot be used.
        """
        store = self._storage()
        missing = sorted(set(digests) - self._listed(store))

        def send(digest: str) -> None:
            store.put(stored_key(digest), self.path(digest), digest)

        with ThreadPoolExecutor(_THREADS) as pool:
            for digest, _ in zip(missing, pool.map(send, missing), strict=True):
                self._listed(store).add(digest)
        return len(missing)

    def _place(self, digest: str) -> Path:
        return self._folder / digest[:2] / digest

    @contextmanager
    def _partial(self) -> Iterator[Path]:
        """Yield a path of its own for each writer, removed at the end."""
        partial = self._incoming / uuid.uuid4().hex
        try:
            yield partial
        finally:
            partial.unlink(missing_ok=True)

    def _take(self, partial: Path, digest: str) -> None:
        place = self._place(digest)
        place.parent.mkdir(exist_ok=True)
        partial.chmod(_READ_ONLY)
        partial.replace(place)
        self._index.record(place, _status(place), digest)

    def _is_sound(self, digest: str) -> bool:
        """Return whether the content is here, read and compared once; a damaged file is removed."""
        place = self._place(digest)
        try:
            status = _status(place)
            if self._index.digest(place, status) == digest:
                return True
            found = sha256(place)
        except FileNotFoundError:
            return False
        if found != digest:
            place.unlink(missing_ok=True)
            return False
        self._index.record(place, status, digest)
        return True

    def _fetch(self, digest: str) -> None:
        if self._store is None:
            raise MissingContent(
                f"Content {digest} is not in {self._folder}. Resolve its source again, or name the storage that has it."
            )
        try:
            with self._partial() as partial:
                self._store.get(stored_key(digest), partial, digest)
                self._take(partial, digest)
        except NoSuchObject as error:
            raise MissingContent(
                f"Content {digest} is neither in {self._folder} nor at {self._store.url(stored_key(digest))}: {error} "
                "Run `mtz run` where its source is, which stores it again."
            ) from error

    def _listed(self, store: Storage) -> set[str]:
        """Return the digests of all contents in the storage, listed once."""
        if self._stored is None:
            self._stored = {name.rpartition("/")[2] for name in store.names(FOLDER)}
        return self._stored

    def _storage(self) -> Storage:
        if self._store is None:
            raise MissingContent(f"There is no storage to send contents of {self._folder} to. Set the block storage.")
        return self._store


def stored_key(digest: str) -> str:
    """Return the key of a content, below the storage's prefix."""
    return f"{FOLDER}/{digest[:2]}/{digest}"


_Status = tuple[int, int, int]


def _status(file: Path) -> _Status:
    """Return size, time of change in nanoseconds and inode, which differ when a file was written anew."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def _copy(source: IO[bytes], target: IO[bytes]) -> str:
    """Copy block by block; return the digest of what was copied."""
    running = hashlib.sha256()
    while block := source.read(_BLOCK_BYTES):
        running.update(block)
        target.write(block)
    return running.hexdigest()


def _remove_abandoned(incoming: Path) -> None:
    """Remove what killed writers have left."""
    oldest = time.time() - _ABANDONED_SECONDS
    for partial in incoming.iterdir():
        try:
            if partial.stat().st_mtime < oldest:
                partial.unlink()
        except FileNotFoundError:  # its writer has just finished
            continue


class _Index:
    """The persistent index: one SQLite file, opened for each access, so that any thread and process may use it."""

    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            self._create()
        except sqlite3.DatabaseError:  # damaged, and not indispensable
            file.unlink(missing_ok=True)
            self._create()

    def digest(self, path: Path, status: _Status) -> str | None:
        """Return the digest of the file at a path, if the file has not changed since."""
        question = "SELECT digest FROM files WHERE path = ? AND size = ? AND modified = ? AND inode = ?"
        return self._find(question, (str(path.absolute()), *status))

    def record(self, path: Path, status: _Status, digest: str) -> None:
        """Remember the digest of a file."""
        self._write("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)", (str(path.absolute()), *status, digest))

    def place(self, key: str) -> str | None:
        """Return the digest recorded for a key."""
        return self._find("SELECT digest FROM places WHERE key = ?", (key,))

    def record_place(self, key: str, digest: str) -> None:
        """Remember the digest of a key."""
        self._write("INSERT OR REPLACE INTO places VALUES (?, ?)", (key, digest))

    def _create(self) -> None:
        with self._opened() as database:
            if database.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                raise sqlite3.DatabaseError
            database.executescript(_TABLES)

    def _find(self, question: str, values: tuple[object, ...]) -> str | None:
        with self._opened() as database:
            row = database.execute(question, values).fetchone()
        return None if row is None else str(row[0])

    def _write(self, statement: str, values: tuple[object, ...]) -> None:
        with self._opened() as database:
            database.execute(statement, values)

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        database = sqlite3.connect(self._file, timeout=300, isolation_level=None)
        try:
            # A crash of the machine may lose the last entries, which are then computed again.
            database.execute("PRAGMA synchronous = OFF")
            yield database
        finally:
            database.close()
