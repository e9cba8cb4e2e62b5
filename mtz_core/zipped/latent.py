"""A zipped network in training: rounded weights are held as floating-point numbers; every pass sees them rounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from mtz_core.zipped.codes import codes_of, nearest, pack
from mtz_core.zipped.module import ZippedNetwork, attribute
from mtz_core.zipped.ownership import Segment
from mtz_core.zipped.structure import block_name, scale_name


class LatentNetwork(ZippedNetwork):
    """A copy of a zipped network whose rounded weights learn.

    A pass rounds them to the nearest level. Gradients go straight through the rounding (Bengio, Leonard and Courville
    2013), to the weights behind it. Scales stay as they are.
    """

    def __init__(self, zipped: ZippedNetwork) -> None:
        structure, tensors = zipped.structure, zipped.tensors()
        self._bits = structure.bits
        self._scales = {name: tensors.pop(name).clone() for name in structure.scale_shapes()}
        for layer in structure.nodes:
            for rows in structure.rows[layer].segments:
                for columns in structure.columns[layer].segments:
                    name = block_name(layer, rows.owners, columns.owners)
                    if name in self._bits:
                        tensors[name] = zipped.block(layer, rows, columns)
        super().__init__(
            replace(structure, bits={}), {name: tensor.detach().clone() for name, tensor in tensors.items()}
        )
        self.train(zipped.training)

    def block(self, layer: str, rows: Segment, columns: Segment) -> Float[Tensor, "rows columns"]:
        """Return the values of one block, rounded; gradients are those of the weights behind them."""
        latent, bits = (
            super().block(layer, rows, columns),
            self._bits.get(block_name(layer, rows.owners, columns.owners)),
        )
        if bits is None:
            return latent
        scales = self._scales[scale_name(layer, rows.owners)][:, None].to(latent.device)
        return nearest(latent.detach(), scales, bits) + (latent - latent.detach())

    def rounded(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Turn a state of this network into one of the network that it was made of.

        Args:
            state: As from ``state_dict``.

        Returns:
            The same state with codes and scales in place of weights that are rounded.
        """
        found = {name: tensor.clone() for name, tensor in state.items()}
        for name, bits in self._bits.items():
            layer, rows, _ = name.rsplit("/", 2)
            scale = scale_name(layer.removesuffix("/weight"), tuple(rows.split("+")))
            found[attribute(name)] = pack(codes_of(found[attribute(name)], self._scales[scale], bits), bits)
            found[attribute(scale)] = self._scales[scale].clone()
        return found
