"""The folder in which one group's pipeline runs, and the paths of its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Workspace:
    """Paths of everything that the stages read and write.

    Attributes:
        root: The folder in which the pipeline runs.
    """

    root: Path

    @property
    def params(self) -> Path:
        """The parameters of all stages."""
        return self.root / "params.yaml"

    def activations(self, model: str) -> Path:
        """Return the folder of a model's activations and sensitivities, which `collect` writes."""
        return self.root / "activations" / model

    def hessians(self, model: str) -> Path:
        """Return the file of a model's second moments and sensitivities, which `hessians` writes."""
        return self.root / "hessians" / f"{model}.safetensors"

    @property
    def pairing(self) -> Path:
        """The pairings and the plan, which `match` writes."""
        return self.root / "pairing" / "pairing.json"

    @property
    def curves(self) -> Path:
        """The table of what sharing costs in each neuron group, which `match` writes."""
        return self.root / "pairing" / "curves.csv"

    @property
    def search(self) -> Path:
        """The table of the candidates tried for a budget, which `match` writes."""
        return self.root / "pairing" / "search.csv"

    @property
    def merged(self) -> Path:
        """The folder of the zipped network before light retraining."""
        return self.root / "merged"

    @property
    def retrained(self) -> Path:
        """The folder of the zipped network after light retraining."""
        return self.root / "retrained"

    @property
    def plots(self) -> Path:
        """The folder of tables for plots."""
        return self.root / "plots"

    @property
    def metrics(self) -> Path:
        """The errors and sizes, which `evaluate` writes."""
        return self.root / "metrics.json"

    @property
    def pareto(self) -> Path:
        """The folder of the comparison that `pareto` writes."""
        return self.root / "pareto"

    @property
    def registration(self) -> Path:
        """The record of the registered release, which `register` writes."""
        return self.root / "registration.json"
