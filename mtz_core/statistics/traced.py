"""One task on its way into a zipped network: its traced original, and what was measured of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from mtz_core.batches import Batch
from mtz_core.network.graph import Network
from mtz_core.settings import Outputs, ZipConfig
from mtz_core.statistics.calibration import LayerOutputs, cut, original_moments
from mtz_core.statistics.moments import Moments
from mtz_core.statistics.sensitivity import Sensitivities, loss_of, sensitivities
from mtz_core.task_loss import Loss


@dataclass(frozen=True, eq=False)
class Traced:
    """A traced network with its statistics. What a step does not need may be left out.

    Attributes:
        network: The traced network.
        moments: The second moments of each layer's input in it; matching needs them.
        sensitivity: The sensitivity of its loss to each layer's rows; if no task has them, tasks weigh alike.
        batches: Its calibration data; merging needs them.
        output: What the network's outputs mean; guessed if it is left out.
        known_loss: The loss of its task, if it is made already.
        targets: What every layer puts out at the sampled positions, batch by batch; merging takes it from the network
            if it is left out.
    """

    network: Network
    moments: Mapping[str, Moments] = field(default_factory=dict)
    sensitivity: Sensitivities | None = None
    batches: Sequence[Batch] = ()
    output: Outputs | None = None
    known_loss: Loss | None = None
    targets: LayerOutputs | None = None

    @classmethod
    def measured(
        cls,
        network: Network,
        batches: Sequence[Batch],
        config: ZipConfig,
        output: Outputs | None = None,
    ) -> Traced:
        """Measure a network on its calibration data.

        Args:
            network: The traced network.
            batches: Its calibration data.
            config: How many rows are sampled, and from which seed.
            output: What its outputs mean; guessed if it is left out.

        Returns:
            The network with all statistics.

        Raises:
            InvalidCalibration: If a layer's output is not finite, or outputs contradict what is declared.
        """
        batches = cut(network, batches)
        moments = original_moments(network, batches, config)
        loss = loss_of(network, batches, output)
        sensitivity = sensitivities(network, batches, config.seed, loss)
        return cls(network, moments, sensitivity, batches, output, loss)

    @property
    def responds(self) -> bool:
        """Whether small changes of its layers change its outputs, so far as the data show."""
        return self.sensitivity is None or any(bool(rows.any()) for rows in self.sensitivity.values())

    @cached_property
    def loss(self) -> Loss:
        """The loss of its task, made on its calibration data."""
        return self.known_loss or loss_of(self.network, self.batches, self.output)
