"""What a release of one group consists of: the zipped network, where it comes from, and what was measured.

The content digest covers the network, its source networks, the data and the metrics: the same content has the same
digest, whenever and wherever it was made. All other digests say how it was made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DIGEST_TAG = "mtz.content_digest"
"""The tag by which a registered version is found again."""


@dataclass(frozen=True)
class Release:
    """Everything that the storage and the registry shall know about one zipped network.

    `sources` and `data` hold a digest per task, `data_paths` where that data lies; `layers` has one row per layer,
    `learning_curve` one per validation with its `step`; `files` are kept as they are, name → file or content.
    """

    group: str
    model: str
    content_digest: str
    network: Path
    sources: Mapping[str, str]
    data: Mapping[str, str]
    data_paths: Mapping[str, str]
    tags: Mapping[str, str]
    parameters: Mapping[str, object]
    metrics: Mapping[str, float]
    layers: Sequence[Mapping[str, object]]
    learning_curve: Sequence[Mapping[str, float]]
    files: Mapping[str, Path | bytes]

    @property
    def folder(self) -> str:
        """Where the bundle lies in the storage."""
        return f"releases/{self.model}/{self.content_digest}"

    def registration(self) -> dict[str, Any]:
        """What `registration.json` holds: nothing that differs between registries or moments."""
        return {
            "group": self.group,
            "model": self.model,
            "content_digest": self.content_digest,
            "release": self.folder,
            "sources": dict(self.sources),
            "data": dict(self.data),
        }
