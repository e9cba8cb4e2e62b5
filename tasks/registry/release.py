"""The release of one group: the zipped network, its sources, and what was measured.

The content digest covers the network, its source networks, the data and the metrics: the same content has the same
digest, whenever and wherever it was made. All other digests describe how it was made.
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
    """Everything that the storage and the registry record about one zipped network.

    Attributes:
        group: The group's name.
        model: Name of the registered model.
        content_digest: Digest of the content.
        network: The folder of the zipped network.
        sources: SHA-256 of each task's original weights.
        data: Digest of each task's data.
        data_paths: Where each task's data lies.
        tags: Tags of the registered version.
        parameters: Parameters of the run.
        metrics: Figures of the run.
        layers: One row per layer.
        learning_curve: One row per validation, with its `step`.
        files: The bundle, each file's name with its source file or its content.
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
        """The folder of the bundle in the storage."""
        return f"releases/{self.model}/{self.content_digest}"

    def registration(self) -> dict[str, Any]:
        """Return the content of `registration.json`, which is the same for every registry and at any time."""
        return {
            "group": self.group,
            "model": self.model,
            "content_digest": self.content_digest,
            "release": self.folder,
            "sources": dict(self.sources),
            "data": dict(self.data),
        }
