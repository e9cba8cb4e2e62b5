"""The folder in which one group's pipeline runs, and the places of its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Workspace:
    """Paths of everything that the stages read and write."""

    root: Path

    @property
    def params(self) -> Path:
        return self.root / "params.yaml"

    def activations(self, model: str) -> Path:
        return self.root / "activations" / model

    def hessians(self, model: str) -> Path:
        return self.root / "hessians" / f"{model}.safetensors"

    @property
    def pairing(self) -> Path:
        return self.root / "pairing" / "pairing.json"

    @property
    def curves(self) -> Path:
        return self.root / "pairing" / "curves.csv"

    @property
    def search(self) -> Path:
        return self.root / "pairing" / "search.csv"

    @property
    def merged(self) -> Path:
        return self.root / "merged"

    @property
    def retrained(self) -> Path:
        return self.root / "retrained"

    @property
    def plots(self) -> Path:
        return self.root / "plots"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.json"

    @property
    def pareto(self) -> Path:
        return self.root / "pareto"

    @property
    def registration(self) -> Path:
        return self.root / "registration.json"
