"""Outcomes of snapshots, stored under their fingerprints: a group with a known outcome needs no work."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tasks.storage.s3 import Storage


@dataclass(frozen=True)
class Outcome:
    """The outcome of a group, or of a model's statistics.

    Attributes:
        status: `merged` or `refused` for a group, `measured` or `refused` for a model.
        group: Name of the group or model.
        reason: Why it was refused.
        model: Name of the registered model; empty if the pipeline registers nothing.
        content_digest: SHA-256 of the registered content; empty if the pipeline registers nothing.
        release: Folder of the bundle in the storage; empty if the pipeline registers nothing.
        metrics: The content of `metrics.json`, if there is one.
        statistics: SHA-256 of a model's statistics.
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
    """Store the outcome of a fingerprint.

    Args:
        store: The storage.
        fingerprint: The snapshot's fingerprint.
        outcome: The outcome.

    Raises:
        StorageError: The storage cannot be used.
    """
    store.put(_key(fingerprint), (json.dumps(asdict(outcome), indent=2) + "\n").encode())


def recall(store: Storage, fingerprints: Iterable[str]) -> dict[str, Outcome]:
    """Read the outcomes of those fingerprints that have one, all at once.

    Args:
        store: The storage.
        fingerprints: The fingerprints of snapshots.

    Returns:
        The known outcomes by fingerprint.

    Raises:
        StorageError: The storage cannot be used.
    """
    keys = {_key(fingerprint): fingerprint for fingerprint in fingerprints}
    found = store.read_many(keys)
    return {keys[key]: Outcome(**json.loads(content)) for key, content in found.items() if content is not None}


def _key(fingerprint: str) -> str:
    return f"outcomes/{fingerprint}.json"
