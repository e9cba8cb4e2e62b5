"""Drop neurons: the network that is left without some neurons of its groups, in all layers that write and read them.

A dropped neuron's rows, columns and parameters leave every tensor, and operators that take sizes as arguments (a view,
a depthwise convolution) get the new ones. Which groups allow that is found by trying: the narrower network must compute
what the whole one does when nothing reads the dropped neurons and layer normalisations leave them out. Such a
normalisation has other statistics then; the layers behind it are fitted to what it gives. Another normalisation across
neurons fails the test, so its neurons can be shared but not dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mtz_core.batches import Batch, tensors_of
from mtz_core.errors import MtzError
from mtz_core.network.graph import (
    FIXED,
    Axis,
    Network,
    Node,
    blank_values,
    free_unused,
    input_values,
    operator,
    resolve,
    run,
    run_node,
)
from mtz_core.network.groups import Analysis, analysis_of
from mtz_core.network.operations import Value
from mtz_core.network.selfcheck import TOLERANCE
from mtz_core.network.topology import SPLITS

Keep = Mapping[str, Int64[np.ndarray, " _kept"]]
"""For neuron groups that lose some, the neurons that stay, ascending."""

LEAST = 2
"""The least number of neurons that a group keeps."""


class CannotDrop(MtzError):
    """An operator does not work with fewer neurons of a group."""


@dataclass(frozen=True, eq=False)
class Reduced:
    """A network without some of its neurons, and the network that it comes from.

    Attributes:
        original: The whole network.
        network: The network without the dropped neurons.
        keep: For groups that lose neurons, those that stay.
    """

    original: Network
    network: Network
    keep: Keep

    @classmethod
    def whole(cls, network: Network) -> Reduced:
        """The network that keeps everything."""
        return cls(network, network, {})

    def touches(self, node: Node) -> bool:
        """Whether a node's own tensors have become smaller."""
        return any(self.network.state[name] is not self.original.state[name] for name in node.state)

    def kept_rows(self, layer: Node) -> Int64[Tensor, " kept"] | None:
        """Which of the original's rows of a layer's matrix are left; None if all are."""
        return self._kept(self.original.graph.rows[layer.name])

    def kept_positions(self, layer: Node) -> dict[int, Int64[Tensor, " kept"]]:
        """Which positions that a layer mixes are left, by their axis, if they are neurons and some of them are gone."""
        analysis = analysis_of(self.original)
        if not self.keep or layer.name not in analysis.labels.reasons:
            return {}
        stays = ~_dropped(analysis.labels.values[layer.name].labels, _gone(analysis, self.keep))
        axes = [axis for axis, size in enumerate(stays.shape) if size > 1 and not bool(stays.all())]
        return {axis: torch.nonzero(stays.movedim(axis, 0).flatten(1).any(dim=1))[:, 0] for axis in axes}

    def _kept(self, axis: Axis) -> Int64[Tensor, " kept"] | None:
        if not any(name in self.keep for name in axis.groups):
            return None
        return torch.from_numpy(np.flatnonzero(_stays(axis, self.keep)))


class Dropper:
    """Drops neurons from one network.

    Attributes:
        network: The network.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self._analysis = analysis_of(network)

    def narrow(self, keep: Keep) -> Reduced:
        """Drop neurons.

        Args:
            keep: For groups that lose neurons, those that stay, ascending.

        Returns:
            The network without all other neurons of these groups.

        Raises:
            CannotDrop: If `keep` is no choice of a hidden group's neurons, or if an operator does not work with fewer.
        """
        keep = self._checked(keep)
        if not keep:
            return Reduced.whole(self.network)
        state, whole = {name: self._cut(name, keep) for name in self.network.state}, self.network.graph
        graph = replace(
            whole,
            nodes=tuple(self._resized(keep, state)),
            widths={**whole.widths, **{name: len(kept) for name, kept in keep.items()}},
            rows={name: _left(axis, keep) for name, axis in whole.rows.items()},
            columns={name: _left(axis, keep) for name, axis in whole.columns.items()},
        )
        return Reduced(self.network, replace(self.network, graph=graph, state=state), keep)

    def _checked(self, keep: Keep) -> Keep:
        """Find the groups that lose neurons.

        Args:
            keep: The neurons that stay, by group.

        Returns:
            `keep` without groups that keep all neurons.

        Raises:
            CannotDrop: If `keep` is no choice of a hidden group's neurons.
        """
        fewer = {}
        hidden = {group.name for group in self.network.graph.hidden_groups}
        for name, kept in keep.items():
            width = self.network.graph.widths[name] if name in hidden else 0
            rising = len(kept) == 0 or bool((np.diff(kept) > 0).all() and kept[0] >= 0 and kept[-1] < width)
            if not rising or len(kept) < min(LEAST, width) or name not in hidden:
                raise CannotDrop(
                    f"{name!r} cannot keep {len(kept)} neurons: give at least {LEAST} of a hidden group, ascending"
                )
            if len(kept) < width:
                fewer[name] = kept
        return fewer

    def droppable(self, examples: Batch) -> tuple[str, ...]:
        """Find the hidden groups that can lose neurons, any of them and however many others lose, by trying.

        All groups lose neurons at once; if that fails, each alone, and then as many as can together.

        Args:
            examples: A batch of inputs to compare outputs on.

        Returns:
            The names of the groups.
        """
        trial = self._trial()
        if self._agrees(trial, examples):
            return tuple(trial)
        alone = {name: kept for name, kept in trial.items() if self._agrees({name: kept}, examples)}
        if not alone or self._agrees(alone, examples):
            return tuple(alone)
        together: dict[str, Int64[np.ndarray, " _kept"]] = {}
        for name, kept in alone.items():
            if self._agrees({**together, name: kept}, examples):
                together[name] = kept
        return tuple(together)

    def _trial(self) -> dict[str, Int64[np.ndarray, " _kept"]]:
        """Choose a third to a half of each group's neurons to drop: other ones, and another number, in every group.

        Groups that must lose the same neurons, or equally many, do not pass such a trial. Nor do groups with a neuron
        that is treated like no other and cannot go: such neurons are dropped first.

        Returns:
            The neurons that stay, for every group that can spare some.
        """
        generator = np.random.default_rng(0)
        trial = {}
        for number, group in enumerate(self.network.graph.hidden_groups):
            width = self.network.graph.widths[group.name]
            least = max(1, width // 3)
            most = max(least, min(width // 2, width - LEAST))
            dropped = least + number % (most - least + 1)
            if width - dropped >= LEAST:
                order, classes = generator.permutation(width), self._analysis.classes[group.name]
                unlike_others = (np.bincount(classes)[classes] == 1)[order]
                order = np.concatenate([order[unlike_others], order[~unlike_others]])
                trial[group.name] = np.sort(order[dropped:])
        return trial

    @torch.no_grad()
    def _agrees(self, keep: Keep, examples: Batch) -> bool:
        """Whether the narrower network computes what the whole one does when nothing reads the dropped neurons."""
        try:
            narrow = self.narrow(keep).network
        except CannotDrop:
            return False
        if analysis_of(narrow).graph.widths != narrow.graph.widths:  # its groups change when neurons are dropped
            return False
        state = dict(self.network.state)
        unread = True
        for node in self.network.graph.nodes:
            axis = self._analysis.columns.get(node.name)
            if axis is not None and not _stays(axis, keep).all():
                layer, weight = node.layer, state[node.weight]
                matrix = layer.matrix(weight).clone()
                matrix[:, torch.from_numpy(~_stays(axis, keep))] = 0
                state[node.weight] = layer.from_matrix(matrix, tuple(weight.shape))
                unread = False
        if unread:
            return False
        whole = tensors_of(self._run_kept(state, examples, _gone(self._analysis, keep)))
        fewer = tensors_of(run(narrow.graph, narrow.state, examples))
        return all(_near(fewer[name], output) for name, output in whole.items())

    def _run_kept(self, state: Mapping[str, Tensor], x: Batch, gone: Bool[Tensor, " labels"]) -> Any:
        """The outputs of the whole network, where normalisations across neurons leave the dropped ones out."""
        graph = self.network.graph
        values = input_values(x)
        for node in graph.nodes:
            if _is_across_neurons(node):
                stays = ~_dropped(self._analysis.labels.values[node.name].everywhere, gone)
                arguments = {name: resolve(own, values, state, len(x)) for name, own in node.arguments.items()}
                values[node.name] = _normalised(node.kind, arguments, stays)
            else:
                values[node.name] = run_node(node, values, state, len(x))
            free_unused(graph, values, node)
        return values[graph.output]

    def _cut(self, name: str, keep: Keep) -> Tensor:
        """A stored tensor without the dropped neurons' part; the tensor itself if nothing of it belongs to them."""
        tensor = self.network.state[name]
        for node in self.network.graph.nodes:
            if node.name in self._analysis.rows and name in (node.weight, node.bias):
                stay = [_stays(axes[node.name], keep) for axes in (self._analysis.rows, self._analysis.columns)]
                rows, columns = (torch.from_numpy(np.flatnonzero(one)) for one in stay)
                if name == node.bias:
                    return tensor if stay[0].all() else tensor[rows].clone()
                if stay[0].all() and stay[1].all():
                    return tensor
                matrix = node.layer.matrix(tensor)[rows[:, None], columns]
                return node.layer.from_matrix(matrix, tuple(tensor.shape)).clone(memory_format=torch.contiguous_format)
        axis = self._analysis.constants.get(name)
        if axis is None or _stays(axis, keep).all():
            return tensor
        return _take(tensor, torch.from_numpy(_stays(axis, keep)).reshape(tensor.shape))

    def _resized(self, keep: Keep, state: Mapping[str, Tensor]) -> list[Node]:
        """Give the nodes the new sizes, and try each on shapes alone.

        Args:
            keep: For groups that lose neurons, those that stay.
            state: The tensors without the dropped neurons.

        Returns:
            The nodes.

        Raises:
            CannotDrop: If an operator does not work with fewer neurons.
        """
        network = self.network
        metas = {name: tensor.to("meta") for name, tensor in state.items()}
        values = blank_values(network.inputs, 1)
        nodes, gone = [], _gone(self._analysis, keep)
        for node in network.graph.nodes:
            known = self._analysis.labels.values[node.name]
            expected = [self._expected(node, value, gone) for value in (known if isinstance(known, list) else [known])]
            node = self._retold(node, expected, gone, metas)
            try:
                values[node.name] = run_node(node, values, metas, 1)
            except (RuntimeError, ValueError, IndexError) as error:
                raise CannotDrop(
                    f"operator {node.kind} of {node.module!r} is bound to the number of neurons"
                ) from error
            found = values[node.name]
            parts = found if isinstance(found, (list, tuple)) else tensors_of(found).values()
            if [tuple(one.shape) for one in parts] != expected:
                raise CannotDrop(f"operator {node.kind} of {node.module!r} is bound to the number of neurons")
            nodes.append(node)
        return nodes

    def _retold(
        self, node: Node, shapes: Sequence[tuple[int, ...]], gone: Bool[Tensor, " labels"], state: Mapping[str, Tensor]
    ) -> Node:
        """Adapt a node's arguments to the shapes that its outputs are to have, and to the neurons that are left."""
        arguments = dict(node.arguments)
        expected = shapes[0]
        for name in _SIZES & arguments.keys():
            given, sizes = arguments[name], expected
            if name == "normalized_shape":
                sizes = sizes[len(sizes) - len(given) :]
            if isinstance(given, list) and len(given) == len(sizes):
                arguments[name] = [_size(old, new) for old, new in zip(given, sizes, strict=True)]
        if node.is_layer and node.layer.conv_groups(arguments) > 1:
            per_group = len(self.network.state[node.weight]) // arguments["groups"]
            arguments["groups"] = len(state[node.weight]) // per_group
        stays = self._kept_along(node, gone)
        if stays is None:
            return replace(node, arguments=arguments)
        if node.kind in SPLITS:
            axis = _cut_axis(node)
            pieces = {"self": arguments["self"], "split_sizes": [shape[axis] for shape in shapes], "dim": axis}
            return replace(node, kind="split_with_sizes", arguments=pieces)
        place = [0, *stays.cumsum(0).tolist()]
        if node.kind in _SLICES:
            first, end, step = slice(*(arguments.get(name) for name in ("start", "end", "step"))).indices(len(stays))
            if step != 1:
                raise CannotDrop(f"operator {node.kind} of {node.module!r} skips neurons")
            if end - first == len(stays):
                return replace(node, arguments=arguments)
            arguments |= {"start": place[first], "end": place[end]}
        if node.kind == "narrow":
            first = arguments["start"] % len(stays)
            end = first + arguments["length"]
            arguments |= {"start": place[first], "length": place[end] - place[first]}
        return replace(node, arguments=arguments)

    def _kept_along(self, node: Node, gone: Bool[Tensor, " labels"]) -> Bool[Tensor, " n"] | None:
        """Which neurons are left along the axis that a node cuts; None if it cuts none, or if all are left."""
        if node.kind not in _CUTS or "value" not in node.arguments["self"]:
            return None
        value = self._analysis.labels.values[node.arguments["self"]["value"]]
        axis = _cut_axis(node) % value.labels.ndim
        dropped = _dropped(value.labels, gone).movedim(axis, 0).flatten(1).all(dim=1)
        return ~dropped if len(dropped) > 1 and bool(dropped.any()) else None

    def _expected(self, node: Node, value: Value, gone: Bool[Tensor, " labels"]) -> tuple[int, ...]:
        """Find the shape of a node's value, or of one of them, without the dropped neurons, for one example.

        Args:
            node: The node.
            value: What is known of the value.
            gone: Which labels belong to dropped neurons.

        Returns:
            The shape.

        Raises:
            CannotDrop: If the value mixes kept and dropped neurons.
        """
        dropped = _dropped(value.labels, gone)
        if not bool(dropped.any()):
            return tuple(value.meta.shape)
        mask = ~dropped
        sizes = []
        outer = torch.ones(1, dtype=torch.bool)
        for axis, size in enumerate(mask.shape):
            other = [a for a in range(mask.ndim) if a != axis]
            stays = mask.any(dim=other) if other else mask
            sizes.append(int(stays.sum()) if size > 1 else value.meta.shape[axis])
            outer = (outer[:, None] & stays).flatten()
        if not torch.equal(outer, mask.flatten()):
            raise CannotDrop(f"operator {node.kind} of {node.module!r} mixes kept and dropped neurons")
        return tuple(sizes)


def _gone(analysis: Analysis, keep: Keep) -> Bool[Tensor, " labels"]:
    """Which labels belong to dropped neurons."""
    ties, members = analysis.labels.ties, analysis.members
    neurons = [np.delete(np.array(members[name]), kept) for name, kept in keep.items()]
    return torch.isin(ties.resolve(torch.arange(ties.count)), torch.from_numpy(np.concatenate(neurons)))


def _dropped(labels: Int64[Tensor, "..."], gone: Bool[Tensor, " labels"]) -> Bool[Tensor, "..."]:
    """Where labels belong to dropped neurons."""
    return (labels >= 0) & gone[labels.clamp(min=0)]


def _stays(axis: Axis, keep: Keep) -> Bool[np.ndarray, " n"]:
    """Which positions of an axis stay."""
    stays = np.ones(len(axis.group), dtype=bool)
    for number, name in enumerate(axis.groups):
        if name in keep:
            own = axis.group == number
            stays[own] = np.isin(axis.neuron[own], keep[name])
    return stays


def _left(axis: Axis, keep: Keep) -> Axis:
    """An axis without the dropped neurons; those that stay are numbered anew, groups listed as they first occur."""
    stays = _stays(axis, keep)
    group, neuron = axis.group[stays], axis.neuron[stays]
    for number, name in enumerate(axis.groups):
        if name in keep:
            own = group == number
            neuron[own] = np.searchsorted(keep[name], neuron[own])
    numbers, first = np.unique(group, return_index=True)
    order = [number for number in numbers[np.argsort(first)].tolist() if number >= 0]
    places = np.full(len(axis.groups) + 1, FIXED)  # the last place is that of `FIXED`
    places[order] = np.arange(len(order))
    return Axis(tuple(axis.groups[number] for number in order), places[group], neuron)


def _take(tensor: Tensor, stays: Bool[Tensor, "..."]) -> Tensor:
    """A tensor without the slices of which nothing stays."""
    for axis in range(tensor.ndim):
        other = [a for a in range(stays.ndim) if a != axis]
        kept = torch.nonzero(stays.any(dim=other) if other else stays)[:, 0]
        if len(kept) < tensor.shape[axis]:
            tensor, stays = tensor.index_select(axis, kept), stays.index_select(axis, kept)
    return tensor.clone()


_SIZES = frozenset({"size", "shape", "sizes", "normalized_shape"})
"""Arguments that list the sizes of an operator's output, or of its last axes."""


_SLICES = frozenset({"slice.Tensor", "slice_scatter"})
_CUTS = SPLITS | _SLICES | {"narrow"}
"""Operators that cut an axis at given places, or put something between these."""


def _cut_axis(node: Node) -> int:
    """The axis that such an operator cuts: the one that it is given, or that it has its name from."""
    named = {"vsplit": 0, "hsplit": 1, "dsplit": 2}
    axis: int = node.arguments.get("dim", named.get(node.kind.partition(".")[0], 0))
    return axis


def _is_across_neurons(node: Node) -> bool:
    """Whether a node normalises all neurons by common statistics, which are others without some of the neurons."""
    return node.kind in ("layer_norm", "rms_norm") or (node.kind == "group_norm" and node.arguments["num_groups"] == 1)


def _normalised(kind: str, arguments: Mapping[str, Any], stays: Bool[Tensor, "..."]) -> Float[Tensor, "..."]:
    """What a normalisation across neurons makes of those that stay; the others become 0."""
    x = arguments["input"]
    found = torch.zeros_like(x, memory_format=torch.contiguous_format)  # so that flattened axes are a view
    if kind == "group_norm":
        kept = stays.transpose(0, 1).flatten(1).any(dim=1)
        constants = {name: arguments[name][kept] for name in ("weight", "bias") if arguments.get(name) is not None}
        found[:, kept] = operator(kind)(**{**arguments, **constants, "input": x[:, kept]})
        return found
    axes = len(arguments["normalized_shape"])
    kept = stays.flatten(-axes).flatten(0, -2).any(dim=0)
    fewer = {name: own.flatten(-axes)[..., kept] for name, own in arguments.items() if isinstance(own, Tensor)}
    found.flatten(-axes)[..., kept] = operator(kind)(**{**arguments, **fewer, "normalized_shape": [int(kept.sum())]})
    return found


def _near(found: Tensor, expected: Tensor) -> bool:
    scale = max(float(expected.abs().max()), 1e-30)
    return found.shape == expected.shape and bool((found - expected).abs().max() <= TOLERANCE * scale)


def _size(old: Any, new: int) -> Any:
    """A size in the form in which it was given: open, a multiple of the batch, or a number."""
    if isinstance(old, Mapping) and "batch" in old:
        slope, offset = old["batch"]
        return {"batch": [new, 0]} if offset == 0 else {"batch": [slope, offset]}
    return old if old == -1 or not isinstance(old, int) else new
