"""Trace any ``nn.Module`` into a `Network`: its operators, its tensors, and which neurons are tied.

Tracing goes through ``torch.export``. It sees the operators that really run, however the module is written, knows every
shape, and needs no specification by hand. The module is exported for two batch sizes; numbers that differ between the
two are numbers that count examples. What the graph cannot express is refused, with the module's path and the operator.
Nothing is guessed, and every graph is checked by permuting its neurons (see `mtz_core.network.selfcheck`).
"""

from __future__ import annotations

import keyword
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from mtz_core.errors import InvalidCalibration, InvalidWeights, UnsupportedModule
from mtz_core.network.exported import SIZES, ProgramReader
from mtz_core.network.graph import Network, Node, leaves, run_node
from mtz_core.network.groups import analyse
from mtz_core.network.layers import LAYERS
from mtz_core.network.operations import operation_of
from mtz_core.network.selfcheck import check

CHECKED_SIZE = 5
"""The batch size that the graph is checked with. A formula that fits the exported sizes by chance fails here."""


def trace(module: nn.Module, example: Shaped[Tensor, "batch ..."], keep_separate: Sequence[str] = ()) -> Network:
    """Trace a module by exporting it on an example input. The module is not modified.

    Args:
        module: The module.
        example: A batch of its inputs.
        keep_separate: Paths of submodules whose layers will not be shared and whose operators need no rule.

    Returns:
        The module's graph and tensors.

    Raises:
        UnsupportedModule: If the module, or a part of it, cannot be zipped.
        InvalidWeights: If weights or buffers are not finite.
        InvalidCalibration: If the module does not accept the example.
    """
    if not isinstance(module, nn.Module):
        raise UnsupportedModule(f"{module!r} is not a torch.nn.Module.")
    if example.ndim < 2:
        raise InvalidCalibration(
            f"an example of shape {list(example.shape[1:])} has no features for a network to read."
        )
    _check_names(module)
    _check_paths(module, keep_separate)
    _check_weights(module)
    with evaluation_mode(module), _buffers_kept(module), _plain_attention():
        examples, expected = _accepted(module, example)
        programs = [_export(module, examples[:size].clone()) for size in SIZES]
    reader = ProgramReader(module, programs)
    nodes, output = reader.nodes()
    nodes = _reachable(nodes, output)
    parameters = frozenset(dict(module.named_parameters()))
    nodes, state = _fold(nodes, output, reader.state(), parameters)
    used = {name for node in nodes for name in node.state}
    unused = sorted(parameters - used)
    if unused:
        raise UnsupportedModule(
            f"parameter {unused[0]!r} is never used when the network runs. Remove it, "
            "so that sizes before and after zipping speak of the same network."
        )
    state = {name: state[name] for name in state if name in used}
    trainable = parameters & used
    nodes = _mark_layers(nodes, trainable, keep_separate)
    analysis = analyse(nodes, output, state, trainable, tuple(example.shape[1:]), example.dtype)
    network = Network(analysis.graph, state, trainable, tuple(example.shape[1:]), example.dtype)
    check(network, analysis, examples, expected)
    if not network.graph.layers:
        raise UnsupportedModule(f"{type(module).__name__} has no layer with weights to share.")
    return network


def _generic(example: Shaped[Tensor, "batch ..."], count: int) -> Shaped[Tensor, "count ..."]:
    """The first example, and others near it: inputs that are all zero, or all alike, would prove little."""
    given, generator = example.detach().cpu(), torch.Generator().manual_seed(0)
    shape = (count - 1, *example.shape[1:])
    if not example.is_floating_point():  # tokens: such as occur in the examples
        drawn = torch.randint(given.numel(), shape, generator=generator)
        return torch.cat([given[:1], given.flatten()[drawn]]).to(example.device)
    deviation = float(given[:1].std()) if given[:1].numel() > 1 else 0.0
    noise = torch.randn(shape, generator=generator, dtype=given.dtype)
    return torch.cat([given[:1], given[:1] + noise * (deviation or 1.0)]).to(example.device)


def _accepted(module: nn.Module, example: Shaped[Tensor, "batch ..."]) -> tuple[Tensor, Tensor]:
    """Find examples that the module accepts: generic ones if it does, copies of the first one otherwise.

    Returns:
        The examples and the module's outputs.

    Raises:
        InvalidCalibration: If the module accepts neither.
    """
    examples = _generic(example, CHECKED_SIZE)
    try:
        return examples, _output(module, examples)
    except InvalidCalibration:
        examples = torch.cat([example[:1]] * CHECKED_SIZE)
    try:
        return examples, _output(module, examples)
    except InvalidCalibration as error:
        raise InvalidCalibration(
            f"{type(module).__name__} does not accept an input of shape {list(example.shape)} ({example.dtype}): "
            f"{error} Check that the calibration data are meant for this network."
        ) from error


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Restore the buffers that a forward pass writes into."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)


def _output(module: nn.Module, examples: Tensor) -> Tensor:
    try:
        output = module(examples.clone())
    except Exception as error:  # whatever a user's forward raises means the same: this input does not fit it
        raise InvalidCalibration(_first_line(error)) from error
    if not isinstance(output, Tensor):
        raise UnsupportedModule(
            f"{type(module).__name__} does not return one tensor but {type(output).__name__}. Wrap it in a module that "
            "returns the logits alone."
        )
    return output


def _export(module: nn.Module, examples: Tensor) -> torch.export.ExportedProgram:
    try:
        return torch.export.export(module, (examples,), strict=False)
    except Exception as error:
        raise UnsupportedModule(
            f"{type(module).__name__} cannot be exported by torch.export: {_first_line(error)} "
            "Control flow that depends on data cannot be zipped; make it independent of the data, or leave this "
            "network out of the group."
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


_RESERVED = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph())))
"""Names that parts of a module built from a graph cannot have."""


def _check_names(module: nn.Module) -> None:
    for name, _ in (*module.named_parameters(), *module.named_buffers()):
        for part in name.split("."):
            if part in _RESERVED or keyword.iskeyword(part):
                raise UnsupportedModule(
                    f"{name!r}: {part!r} is a name that torch modules use themselves. Rename that part of the network."
                )


def _check_paths(module: nn.Module, keep_separate: Sequence[str]) -> None:
    known = dict(module.named_modules())
    for path in keep_separate:
        if path not in known:
            near = ", ".join(name for name in known if name) or "none"
            raise UnsupportedModule(f"keep_separate: there is no submodule {path!r}. Submodules: {near}.")


def _check_weights(module: nn.Module) -> None:
    for path, part in module.named_modules():
        if "quantized" in type(part).__module__:
            raise UnsupportedModule(f"{path!r} ({type(part).__name__}) is quantised. Zip the network before it is.")
        if getattr(part, "track_running_stats", False) and getattr(part, "momentum", 0.0) is None:
            raise UnsupportedModule(
                f"{path!r} ({type(part).__name__}) averages its statistics over all batches (momentum=None), which a "
                "zipped network in training mode cannot. Set a momentum, such as 0.1: evaluation mode is the same."
            )
    devices = set()
    for name, tensor in module.named_parameters():
        if is_lazy(tensor):
            raise UnsupportedModule(
                f"parameter {name!r} has no shape yet (a lazy module). Run the network once on an example first."
            )
        if tensor.dtype not in (torch.float32, torch.float64):
            raise UnsupportedModule(
                f"parameter {name!r} has dtype {tensor.dtype}; zipping needs float32 or float64. "
                "Convert the network first, for example with `.float()`."
            )
        devices.add(tensor.device)
        if tensor.is_meta:
            raise UnsupportedModule(f"parameter {name!r} has no values (it is on the meta device). Load its weights.")
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidWeights(f"parameter {name!r} has NaN or infinite values. Train or export the network again.")
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point() and not buffer.is_meta and bool(torch.isnan(buffer).any()):
            raise InvalidWeights(f"buffer {name!r} has NaN values. Train or export the network again.")
    if len(devices) > 1:
        raise UnsupportedModule(
            f"the network is on several devices ({', '.join(sorted(map(str, devices)))}). Move it to one, with `.to()`."
        )


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, without gradients, and restore every submodule's own mode afterwards.

    Args:
        module: The module.

    Yields:
        Nothing; the mode holds inside the context.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Disable the fused operators that torch's attention modules use in evaluation mode only."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _reachable(nodes: list[Node], output: str) -> list[Node]:
    """The nodes that the output depends on."""
    wanted = {output}
    for node in reversed(nodes):
        if node.name in wanted:
            wanted |= set(node.sources)
    return [node for node in nodes if node.name in wanted]


def _has_batch(node: Node) -> bool:
    return any(
        isinstance(leaf, Mapping) and "batch" in leaf
        for argument in node.arguments.values()
        for leaf in leaves(argument)
    )


def _fold(
    nodes: list[Node], output: str, state: dict[str, Tensor], parameters: frozenset[str]
) -> tuple[list[Node], dict[str, Tensor]]:
    """Replace nodes that depend on neither input, parameters nor batch size by their values."""
    values: dict[str, Any] = {}
    kept: list[Node] = []
    for node in nodes:
        known = all(source in values for source in node.sources) and not parameters & set(node.state)
        if known and not _has_batch(node) and node.name != output:
            values[node.name] = run_node(node, values, state, batch=0)
        else:
            kept.append(node)
    folded = {source for node in kept for source in node.sources if source in values}
    names = {source: f"constant:{source}" for source in folded}
    for source, name in names.items():
        state[name] = values[source].clone()
    renamed = [
        replace(node, arguments={name: _renamed(argument, names) for name, argument in node.arguments.items()})
        for node in kept
    ]
    return renamed, state


def _renamed(argument: Any, names: Mapping[str, str]) -> Any:
    if isinstance(argument, list):
        return [_renamed(part, names) for part in argument]
    if isinstance(argument, Mapping) and argument.get("value") in names:
        return {"state": names[argument["value"]]}
    return argument


def _mark_layers(nodes: list[Node], trainable: frozenset[str], keep_separate: Sequence[str]) -> list[Node]:
    """Mark the layers: nodes that zipping can see as a matrix and whose parameters no other node reads."""
    uses: dict[str, int] = {}
    for node in nodes:
        for name in node.state:
            uses[name] = uses.get(name, 0) + 1
    marked = []
    for node in nodes:
        separate = any(node.module == path or node.module.startswith(f"{path}.") for path in keep_separate)
        marked.append(replace(node, is_layer=_is_layer(node, trainable, uses), separate=separate))
    return marked


def _is_layer(node: Node, trainable: frozenset[str], uses: Mapping[str, int]) -> bool:
    if node.kind not in LAYERS:
        return False
    layer = LAYERS[node.kind]
    weight, bias = node.arguments.get(layer.weight), node.arguments.get(layer.bias or "")
    if not isinstance(node.arguments.get(layer.input), Mapping) or "value" not in node.arguments[layer.input]:
        return False  # a table that is read at constant places
    for tensor in (weight, bias):
        if tensor is not None and (tensor.get("state") not in trainable or uses[tensor["state"]] > 1):
            return False
    scaled = {"alpha", "beta"} & node.arguments.keys()  # factors of addmm that a matrix does not have
    return not scaled and operation_of(node.kind) is None
