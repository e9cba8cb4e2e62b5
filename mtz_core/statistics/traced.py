"""One task on its way into a zipped network: its traced original, and what was measured of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jaxtyping import Shaped
from torch import Tensor

from mtz_core.network.graph import Network
from mtz_core.settings import ZipConfig
from mtz_core.statistics.calibration import original_moments
from mtz_core.statistics.moments import Moments
from mtz_core.statistics.sensitivity import Sensitivities, sensitivities


@dataclass(frozen=True, eq=False)
class Traced:
    """A traced network with its statistics. What a step does not need may be left out.

    Attributes:
        network: The traced network.
        moments: The second moments of each layer's input in it; matching needs them.
        sensitivity: The sensitivity of its loss to each layer's rows; if no task has them, tasks weigh alike.
        batches: Its calibration data; merging needs them.
    """

    network: Network
    moments: Mapping[str, Moments] = field(default_factory=dict)
    sensitivity: Sensitivities | None = None
    batches: Sequence[Shaped[Tensor, "_ ..."]] = ()

    @classmethod
    def measured(cls, network: Network, batches: Sequence[Shaped[Tensor, "_ ..."]], config: ZipConfig) -> Traced:
        """Measure a network on its calibration data.

        Args:
            network: The traced network.
            batches: Its calibration data.
            config: How many rows are sampled, and from which seed.

        Returns:
            The network with all statistics.
        """
        moments = original_moments(network, list(batches), config)
        return cls(network, moments, sensitivities(network, list(batches), config.seed), batches)
