"""A network as a plain torch module: standard submodules where there are such, ATen operators between them."""

from __future__ import annotations

import operator as python_operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from mtz_core.batches import formed
from mtz_core.network.graph import GETITEM, OUTPUTS, Network, Node, blank_values, given_name, leaves, operator, run_node

_NORMALISATIONS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_DROPOUTS: Mapping[str, type[nn.Module]] = {
    "dropout": nn.Dropout,
    "feature_dropout": nn.Dropout2d,
    "alpha_dropout": nn.AlphaDropout,
    "feature_alpha_dropout": nn.FeatureAlphaDropout,
}


@torch.no_grad()
def build_module(network: Network) -> fx.GraphModule:
    """Build a plain torch module from a graph and its tensors, which it takes over.

    Tensors are named as in the traced module. Linear layers, convolutions, embeddings, batch normalisations and
    dropouts are torch's own modules at their paths (layers with weights only where these are called `weight` and `bias`
    there).

    Args:
        network: The network.

    Returns:
        The module.
    """
    root = nn.Module()
    drawing = fx.Graph()
    drawn: dict[str, Any] = {name: drawing.placeholder(given_name(name) or "x") for name in network.inputs}
    x = next(iter(drawn.values()))
    shapes = blank_values(network.inputs, 2)
    metas = {name: tensor.to("meta") for name, tensor in network.state.items()}
    count: list[fx.Node] = []
    for node in network.graph.nodes:
        shapes[node.name] = run_node(node, shapes, metas, 2)
        if node.kind == OUTPUTS:
            drawn[node.name] = formed(network.graph.form, [drawn[source] for source in node.sources])
            continue
        module = _module(node, network, shapes)
        if module is not None:
            path, part = module
            _put(root, path, part)
            drawn[node.name] = drawing.call_module(path, (drawn[node.sources[0]],))
            continue
        if _counts(node) and not count:
            count.append(drawing.call_method("size", (x, 0)))

        def draw(argument: Any) -> Any:
            if isinstance(argument, list):
                return [draw(part) for part in argument]
            if not isinstance(argument, Mapping):
                return argument
            ((key, content),) = argument.items()
            if key == "value":
                return drawn[content]
            if key == "dtype":
                return getattr(torch, content)
            if key == "state":
                path = content.replace(":", "_")
                if content.startswith("constant:"):
                    path = path.replace(".", "_")
                _put(root, path, _held(network, content))
                return drawing.get_attr(path)
            slope, offset = content
            scaled = drawing.call_function(python_operator.mul, (count[0], slope))
            return drawing.call_function(python_operator.add, (scaled, offset)) if offset else scaled

        arguments = {name: draw(argument) for name, argument in node.arguments.items()}
        if node.kind == GETITEM:
            drawn[node.name] = drawing.call_function(python_operator.getitem, (arguments["value"], arguments["index"]))
        else:
            drawn[node.name] = drawing.call_function(operator(node.kind), (), arguments)
    drawing.output(drawn[network.graph.output])
    plain = fx.GraphModule(root, drawing)
    constants = {name for name, _ in root.named_buffers() if name.startswith("constant_")}
    for name in constants | (network.non_persistent & network.state.keys()):  # of the forward pass, not of a state
        path, _, leaf = name.rpartition(".")
        plain.get_submodule(path)._non_persistent_buffers_set.add(leaf)
    return plain


def _counts(node: Node) -> bool:
    return any(isinstance(leaf, Mapping) and "batch" in leaf for a in node.arguments.values() for leaf in leaves(a))


def _held(network: Network, name: str) -> Tensor:
    tensor = network.state[name]
    return nn.Parameter(tensor) if name in network.trainable else tensor


def _put(root: nn.Module, path: str, part: nn.Module | Tensor) -> None:
    *parents, leaf = path.split(".")
    for name in parents:
        if not hasattr(root, name):
            root.add_module(name, nn.Module())
        root = getattr(root, name)
    if isinstance(part, nn.Module):
        root.add_module(leaf, part)
    elif isinstance(part, nn.Parameter):
        root.register_parameter(leaf, part)
    elif not hasattr(root, leaf):
        root.register_buffer(leaf, part)


def _module(node: Node, network: Network, shapes: Mapping[str, Any]) -> tuple[str, nn.Module] | None:
    """The path and the standard module of a node; None if there is none."""
    kind = node.kind.partition(".")[0]
    if kind in _DROPOUTS:
        return node.name.replace(".", "_"), _DROPOUTS[kind](node.arguments["p"])
    if kind == "batch_norm":
        part: nn.Module = _NORMALISATIONS[shapes[node.sources[0]].ndim](
            shapes[node.sources[0]].shape[1],
            eps=node.arguments["eps"],
            momentum=node.arguments["momentum"],
            affine=node.arguments.get("weight") is not None,
            device="meta",
        )
        names = {
            n: node.arguments[n] for n in ("weight", "bias", "running_mean", "running_var") if node.arguments.get(n)
        }
        return _filled(part, names, network, {"num_batches_tracked": torch.zeros((), dtype=torch.int64)})
    if not node.is_layer:
        return None
    weight = network.state[node.weight]
    arguments = {name: value for name, value in node.arguments.items() if not isinstance(value, Mapping)}
    bias = node.bias is not None
    if kind == "linear":
        part = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, device="meta")
    elif kind == "embedding":
        padding = arguments["padding_idx"] if arguments.get("padding_idx", -1) >= 0 else None
        part = nn.Embedding(weight.shape[0], weight.shape[1], padding_idx=padding, device="meta")
    elif kind.startswith("conv"):
        transposed = "transpose" in kind
        groups = arguments.get("groups", 1)
        inputs, outputs = (
            (weight.shape[0], weight.shape[1]) if transposed else (weight.shape[1] * groups, weight.shape[0])
        )
        build = getattr(nn, f"Conv{'Transpose' if transposed else ''}{weight.ndim - 2}d")
        settings = {name: tuple(v) if isinstance(v, list) else v for name, v in arguments.items()}
        part = build(inputs, outputs, tuple(weight.shape[2:]), bias=bias, device="meta", **settings)
    else:
        return None
    names = {"weight": {"state": node.weight}} | ({"bias": {"state": node.bias}} if bias else {})
    return _filled(part, names, network, {})


def _filled(
    part: nn.Module, names: Mapping[str, Any], network: Network, extra: Mapping[str, Tensor]
) -> tuple[str, nn.Module] | None:
    """A module with the network's tensors, and the path where they come from; None if they come from several."""
    paths = {
        reference["state"].removesuffix(f".{name}") if reference["state"] != name else ""
        for name, reference in names.items()
    }
    if len(paths) != 1 or "" in paths or any(not r["state"].endswith(f".{name}") for name, r in names.items()):
        return None
    for name, reference in names.items():
        held = _held(network, reference["state"])
        if isinstance(held, nn.Parameter):
            part.register_parameter(name, held)
        else:
            part.register_buffer(name, held)
    for name, tensor in extra.items():
        part.register_buffer(name, tensor)
    return paths.pop(), part
