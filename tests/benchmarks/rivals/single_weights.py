"""Networks made small weight by weight, each alone and without data: the smallest are removed, or all are rounded.

Neurons stay, so the dense network is as large as before. Bytes are those of a file that holds what is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mtz_core.errors import InvalidConfig
from mtz_core.network.graph import Network
from mtz_core.zipped.module import ZippedNetwork
from tests.benchmarks.rivals.assemble import Matrices, assemble, matrices_of, traced

CLIPS = 40
"""How many ranges are tried for a row: from the largest weight down."""


@dataclass(frozen=True, eq=False)
class Compressed:
    """Networks in their dense form, and the bytes of a file that holds them."""

    zipped: ZippedNetwork
    bytes: int


def sparse(networks: Mapping[str, nn.Module], calibration: Mapping[str, Tensor], fraction: float) -> Compressed:
    """The smallest weights of each network become zero, until it has at most `fraction` of its bytes.

    Ranked over all layers (Han, Pool, Tran, Dally 2015). A file holds the weights that are left, one bit for each
    weight that says whether it is left, and everything else as it is. In light retraining zeros stay zeros. Raises
    `InvalidConfig` if the bits and the rest alone are too large.
    """
    originals = traced(networks, calibration)
    matrices: dict[str, dict[str, Tensor]] = {}
    total = 0
    for task, network in originals.items():
        count = _weights(network)
        fixed = network.bytes - _size(network) * count + (count + 7) // 8
        left = (int(fraction * network.bytes) - fixed) // _size(network)
        if left <= 0:
            raise InvalidConfig(f"{task!r} takes {fixed} bytes beside its weights, more than there may be.")
        left = min(left, count)
        dense = _dense(network)
        parts = {name: _part(network, name, matrix) for name, matrix in dense.items()}
        stays = torch.zeros(count, dtype=torch.bool)
        stays[torch.cat([part.abs().flatten() for part in parts.values()]).topk(left).indices] = True
        sizes = [part.numel() for part in parts.values()]
        for (name, part), own in zip(parts.items(), stays.split(sizes), strict=True):
            matrix = dense[name].clone()
            _part(network, name, matrix).mul_(own.reshape(part.shape))
            matrices.setdefault(task, {})[name] = matrix
        total += fixed + _size(network) * left
    zipped = assemble(originals, {}, matrices, "single weights removed")
    _hold_zeros(zipped)
    return Compressed(zipped, total)


def _hold_zeros(zipped: ZippedNetwork) -> None:
    """Weights that are zero get no gradient."""
    for parameter in zipped.parameters():
        if parameter.ndim > 1:
            parameter.register_hook((parameter.detach() != 0).to(parameter.dtype).mul)


def rounded(networks: Mapping[str, nn.Module], calibration: Mapping[str, Tensor], bits: int) -> Compressed:
    """All weights are rounded to the nearest of ``2^bits − 1`` values, evenly spaced in a range of its own per row.

    The range with the least squared error is taken. A file holds the codes, a scale of 16 bits for each row, and
    everything else as it is.
    """
    originals = traced(networks, calibration)
    matrices: dict[str, dict[str, Tensor]] = {}
    total = 0
    for task, network in originals.items():
        total += network.bytes - _size(network) * _weights(network)
        matrices[task] = {}
        for name, matrix in _dense(network).items():
            changed = matrix.clone()
            part = _part(network, name, changed)
            part.copy_(rounded_rows(part, bits))
            matrices[task][name] = changed
            total += (part.numel() * bits + 7) // 8 + 2 * len(part)
    return Compressed(assemble(originals, {}, matrices, f"{bits} bits"), total)


def rounded_rows(rows: Float[Tensor, "out in"], bits: int) -> Float[Tensor, "out in"]:
    """Rows rounded to the nearest of ``2^bits − 1`` evenly spaced values around zero."""
    most = 2 ** (bits - 1) - 1
    largest = rows.abs().amax(dim=1, keepdim=True)
    best, least = torch.zeros_like(rows), torch.full_like(largest, torch.inf)
    for number in range(CLIPS):
        scale = (largest * (1 - number / (2 * CLIPS)) / most).half().to(rows.dtype)
        codes = (rows / scale.clamp_min(torch.finfo(rows.dtype).tiny)).round().clamp(-most, most)
        error = (codes * scale - rows).square().sum(dim=1, keepdim=True)
        best = torch.where(error < least, codes * scale, best)
        least = torch.minimum(error, least)
    return best


def _dense(network: Network) -> Mapping[str, Tensor]:
    matrices: Matrices = matrices_of({"": network})
    return matrices[""]


def _part(network: Network, layer: str, matrix: Tensor) -> Tensor:
    """The weights of a layer's matrix, without its bias column."""
    node = network.graph.layers_by_name[layer]
    return matrix if node.bias is None else matrix[:, :-1]


def _weights(network: Network) -> int:
    return sum(_part(network, name, matrix).numel() for name, matrix in _dense(network).items())


def _size(network: Network) -> int:
    return next(iter(_dense(network).values())).element_size()
