"""Rewrite exported programs into the operators that zipping knows, before they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from math import prod
from string import ascii_letters
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from mtz_core.network.writing import write_out_of_place


def rewrite(program: ExportedProgram, keeps_one: bool = False) -> ExportedProgram:
    """Rewrite an exported program; it computes the same.

    Args:
        program: The program, which may change.
        keeps_one: Whether it is to keep the axis of the examples where there is but one, whatever it squeezes.

    Returns:
        The program without regions, without `einsum` where that is a product of matrices, and without writing into
        views of what is read afterwards.
    """
    if any(_changes_precision(node) for part in _graphs(program) for node in part.graph.nodes):
        program = program.run_decompositions({})  # writes out what is converted to another precision
    _inline_regions(program.graph_module)
    write_out_of_place(program)
    _spell_out_products(program)
    if keeps_one:
        _name_squeezed_axes(program)
    return program


def _graphs(program: ExportedProgram) -> list[fx.GraphModule]:
    return [part for part in program.graph_module.modules() if isinstance(part, fx.GraphModule)]


_REGIONS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
"""Operators that run a part of the graph in another mode, and where that part is among their arguments."""


def _region(node: fx.Node) -> str | None:
    """The kind of region that a node is; None if it is none."""
    kind = node.target.name() if isinstance(node.target, torch._ops.HigherOrderOperator) else None
    return kind if kind in _REGIONS else None


def _changes_precision(node: fx.Node) -> bool:
    """Whether a node is a region that autocast runs in half precision, where networks are traced."""
    if _region(node) != "wrap_with_autocast":
        return False
    device, _, enabled, *_ = node.args
    return device == "cpu" and bool(enabled)


def _inline_regions(module: fx.GraphModule) -> None:
    """Replace regions with a mode of their own, as of `torch.no_grad` and `torch.autocast`, by the operators in them.

    What learns is decided where a network is trained, and autocast that is switched off changes nothing.
    """
    graph = module.graph
    for node in list(graph.nodes):
        kind = _region(node)
        if kind is None:
            continue
        body, *arguments = node.args[_REGIONS[kind] :]
        region: fx.GraphModule = getattr(module, body.target)
        _inline_regions(region)
        known: dict[fx.Node, Any] = dict(zip(region.graph.find_nodes(op="placeholder"), arguments, strict=True))
        with graph.inserting_before(node):
            outputs: Any = graph.graph_copy(region.graph, known)
        for user in list(node.users):  # a region's values are got one by one
            user.replace_all_uses_with(outputs[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)
        if not body.users:
            graph.erase_node(body)


def _name_squeezed_axes(program: ExportedProgram) -> None:
    """Have operators that squeeze all axes of one entry name those, among which the axis of the examples is not."""
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.squeeze.default):
        shape = node.args[0].meta["val"].shape
        node.target = torch.ops.aten.squeeze.dims
        node.args = (node.args[0], [axis for axis, size in enumerate(shape) if size == 1])


def path_of(node: fx.Node) -> str:
    """The path of the module that a node of an exported graph comes from."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack else ""


def _spell_out_products(program: ExportedProgram) -> None:
    """Replace every `einsum` that is a matrix product by one, or by a linear layer if one operand is a parameter."""
    graph, inputs = program.graph_module.graph, program.graph_signature.user_inputs
    fed: set[fx.Node] = set()
    """The nodes that depend on the network's input."""
    for node in list(graph.nodes):
        if node.name in inputs or any(operand in fed for operand in node.all_input_nodes):
            fed.add(node)
        if node.target is torch.ops.aten.einsum.default and len(node.args[1]) == 2:
            found = _spelt_out(node, fed)
            if found is not None:
                fed.add(found)
                found.meta = node.meta
                node.replace_all_uses_with(found)
                graph.erase_node(node)


def _spelt_out(node: Any, fed: Set[fx.Node]) -> fx.Node | None:
    """Spell out an `einsum` of two tensors as a product of matrices.

    Args:
        node: The `einsum`.
        fed: The nodes before it that depend on the network's input.

    Returns:
        The last of the new nodes before it; None if it is no product of matrices.
    """
    equation, (first, second) = node.args
    terms = _terms(equation, [operand.meta["val"].ndim for operand in (first, second)])
    if terms is None:
        return None
    a, b, result = terms
    if first not in fed:
        first, second, a, b = second, first, b, a
    sizes: dict[str, int] = {}
    for letters, operand in ((a, first), (b, second)):
        for letter, size in zip(letters, operand.meta["val"].shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                return None
    batch = "".join(letter for letter in result if letter in a and letter in b)
    summed = "".join(letter for letter in b if letter in a and letter not in result)
    rows, columns = ("".join(letter for letter in result if letter in own and letter not in batch) for own in (a, b))
    if not summed or {*a} != {*batch, *summed, *rows} or {*b} != {*batch, *summed, *columns}:
        return None
    layer = first in fed and second not in fed and not batch
    if layer and not rows:
        return None
    with node.graph.inserting_before(node):
        left = _arranged(first, a, [*batch, rows, summed] if batch else [*rows, summed], sizes, node)
        right = _arranged(second, b, [columns, summed] if layer else [*batch, summed, columns], sizes, node)
        product = _new(node, torch.ops.aten.linear if layer else torch.ops.aten.matmul, left, right)
        parts = batch + rows + columns
        if len(columns) != 1 or (batch and len(rows) != 1):
            product = _new(node, torch.ops.aten.reshape, product, [sizes[letter] for letter in parts])
        return _arranged(product, parts, [*result], sizes, node)


def _terms(equation: str, axes: Sequence[int]) -> tuple[str, str, str] | None:
    """The letters of both operands and of the result, one for each axis; None if one occurs twice in an operand."""
    given, arrow, result = equation.replace(" ", "").partition("->")
    terms = given.split(",")
    counts = [n - len(term.replace("...", "")) for term, n in zip(terms, axes, strict=True)]
    free = [letter for letter in ascii_letters if letter not in equation]
    most = free[: max(counts)]
    a, b = (term.replace("...", "".join(most[len(most) - n :])) for term, n in zip(terms, counts, strict=True))
    if not arrow:
        result = "..." + "".join(sorted(letter for letter in {*given} - {*".,"} if given.count(letter) == 1))
    result = result.replace("...", "".join(most))
    return None if any(len({*term}) < len(term) for term in (a, b, result)) else (a, b, result)


def _arranged(value: fx.Node, letters: str, parts: Sequence[str], sizes: Mapping[str, int], origin: fx.Node) -> fx.Node:
    """Permute and reshape a value so that it has one axis for each part, of all that part's letters."""
    wanted = "".join(parts)
    if wanted != letters:
        value = _new(origin, torch.ops.aten.permute, value, [letters.index(letter) for letter in wanted])
    if any(len(part) != 1 for part in parts):
        shape = [prod(sizes[letter] for letter in part) for part in parts]
        value = _new(origin, torch.ops.aten.reshape, value, shape)
    return value


def _new(origin: fx.Node, packet: Any, *arguments: Any) -> fx.Node:
    node = origin.graph.call_function(packet.default, arguments)
    node.meta = {"nn_module_stack": origin.meta.get("nn_module_stack", {})}
    return node
