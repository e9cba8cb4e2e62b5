"""What came of a snapshot, kept in the storage under its fingerprint: a group that has an outcome needs no work."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tasks.storage.s3 import Storage


@dataclass(frozen=True)
class Outcome:
    """The end of a group, `merged` or `refused` (`reason` says why), or of a model, `measured`.

    `release` is the folder of the bundle and `content_digest` what was registered as a version of `model`; all three
    are empty where the pipeline registers nothing. `statistics` is the SHA-256 of a model's statistics.
    """

    status: Literal["merged", "refused", "measured"]
    group: str
    reason: str = ""
    model: str = ""
    content_digest: str = ""
    release: str = ""
    metrics: dict[str, Any] | None = None
    statistics: str = ""


def record(store: Storage, fingerprint: str, outcome: Outcome) -> None:
    """Keep the outcome of a fingerprint. Raises `StorageError`."""
    store.put(_key(fingerprint), (json.dumps(asdict(outcome), indent=2) + "\n").encode())


def recall(store: Storage, fingerprints: Iterable[str]) -> dict[str, Outcome]:
    """The outcomes of those fingerprints that have one, all read at once. Raises `StorageError`."""
    keys = {_key(fingerprint): fingerprint for fingerprint in fingerprints}
    found = store.read_many(keys)
    return {keys[key]: Outcome(**json.loads(content)) for key, content in found.items() if content is not None}


def _key(fingerprint: str) -> str:
    return f"outcomes/{fingerprint}.json"
