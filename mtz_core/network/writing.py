"""Write what exported programs do in place as operators that make new values.

Writing into a view changes the tensor that it is a view of, and all other views of that. So the new value of the view
is put into a new value of the tensor, of which views that are read afterwards are taken anew.
"""

from __future__ import annotations

import operator as python_operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.fx.node import map_aggregate

aten = torch.ops.aten


def write_out_of_place(program: ExportedProgram) -> None:
    """Replace operators that write in place, if there is need to.

    There is if one writes into a tensor of which another view is read afterwards, or if one copies, as `copy` has no
    gradient. Those that cannot be replaced stay as they are.

    Args:
        program: The program, which is changed.
    """
    graph, inputs = program.graph_module.graph, {*program.graph_signature.user_inputs}
    writing = [node for node in graph.nodes if _writes(node)]
    if any(_copies(node) or seen_elsewhere(node) for node in writing):
        for node in _without_copies_of_themselves(writing):
            _replace(node, inputs)


def without_writing(node: fx.Node) -> torch._ops.OpOverload | None:
    """Find the operator that makes a new value where a node's operator writes into its first operand.

    Args:
        node: The node.

    Returns:
        The operator; None if there is none.
    """
    schema = _schema(node)
    name = _name(node)
    if schema is None or not name.endswith("_"):
        return None
    packet = getattr(aten, name.removesuffix("_"), None)
    overload = schema.overload_name or "default"
    return getattr(packet, overload) if packet is not None and overload in packet.overloads() else None


def seen_elsewhere(node: Any) -> bool:
    """Whether what a node writes into is read afterwards through another view than the one that it writes into."""
    written = node.args[0]
    same = {written}
    while _writes(written):  # what has been written into is what has come out
        written = written.args[0]
        same.add(written)
    return any(node < user for other in _aliases(written, node) if other not in same for user in other.users)


def _writes(node: fx.Node) -> bool:
    """Whether a node writes into its first operand."""
    schema = _schema(node)
    return schema is not None and schema.is_mutable and bool(node.args) and isinstance(node.args[0], fx.Node)


def _copies(node: fx.Node) -> bool:
    return _name(node) == "copy_"


def _schema(node: fx.Node) -> Any:
    return getattr(node.target, "_schema", None)


def _name(node: fx.Node) -> str:
    schema = _schema(node)
    return "" if schema is None else str(schema.name).removeprefix("aten::")


def _aliases(node: fx.Node, without: fx.Node | None = None) -> list[fx.Node]:
    """All nodes whose values share memory with a node's, in order; without those that derive from another one."""
    root = node
    while (before := _viewed(root)) is not None:
        root = before
    found, pending = {root}, [root]
    while pending:
        for user in pending.pop().users:
            if _viewed(user) in found and user not in found and user is not without:
                found.add(user)
                pending.append(user)
    return sorted(found)


def _viewed(node: Any) -> fx.Node | None:
    """The node that a node's value is a view of, or the same as."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if node.target is python_operator.getitem:
        return node.args[0] if _viewed(node.args[0]) is not None else None  # a piece of a split, or a value of its own
    if not _writes(node):
        aliasing = any(argument.alias_info is not None for argument in getattr(_schema(node), "arguments", ()))
        if not (aliasing or _name(node) in _MAY_PASS) or not _shares_memory(node):
            return None
    return node.args[0]


_MAY_PASS = frozenset(
    {"reshape", "contiguous", "flatten", "reshape_as", "unflatten", "broadcast_to", "ravel", "type_as", "movedim"}
    | {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}
)
"""Operators that may return their operand itself or a view of it, although their schema does not show it."""


def _shares_memory(node: fx.Node) -> bool:
    """Whether an operator that may return a view does, for tensors of these shapes and strides, if they are known."""
    if any("val" not in source.meta for source in node.all_input_nodes):
        return True
    target: Any = node.target
    args: Any = map_aggregate(node.args, _blank)
    kwargs: Any = map_aggregate(dict(node.kwargs), _blank)
    out = target(*args, **kwargs)
    out = out[0] if isinstance(out, (list, tuple)) else out
    return bool(out.untyped_storage()._cdata == args[0].untyped_storage()._cdata)


def _blank(argument: Any) -> Any:
    value = argument.meta["val"] if isinstance(argument, fx.Node) else argument
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _without_copies_of_themselves(writing: list[Any]) -> list[Any]:
    """Leave out what ``x[1:] += y`` does at last: it copies the part that it has changed into itself."""
    kept: list[Any] = []
    for node in writing:
        last = kept[-1] if kept else None
        if _copies(node) and node.args[1] is last and _place(node) == _place(last):
            node.replace_all_uses_with(last)
            node.graph.erase_node(node)
        else:
            kept.append(node)
    return kept


def _place(node: Any) -> list[Any]:
    """What a node writes into, as the steps from a tensor to that view."""
    steps = _steps(node)
    return [_parent(steps[-1]) if steps else node.args[0], *((step.target, step.args[1:]) for step in steps)]


def _steps(node: Any) -> list[Any]:
    """The views from what a node writes into up to the whole tensor; pieces of a split count as one."""
    steps = []
    view = node.args[0]
    while _viewed(view) is not None and not _writes(view):
        steps.append(view)
        view = _parent(view)
    return steps


def _parent(step: Any) -> Any:
    source = step.args[0]
    return source.args[0] if step.target is python_operator.getitem else source


_New = Callable[..., fx.Node]
_Put = Callable[[_New, Any, fx.Node, fx.Node], fx.Node]
"""Puts the new value of a view into what it is a view of: given how to make nodes, the view, that, and the value."""


def _replace(node: Any, inputs: set[str]) -> None:
    """Replace a node that writes in place, if there are operators that do the same out of place.

    Args:
        node: The node.
        inputs: The names of the network's inputs. What is written into other tensors that are given stays there.
    """
    target, written, steps = without_writing(node), node.args[0], _steps(node)
    root = _parent(steps[-1]) if steps else written
    stored = root.op == "placeholder" and root.name not in inputs
    puts = [_put_of(step) for step in steps]
    family = [other for other in _aliases(root, node) if other < node]
    if target is None or stored or None in puts or any(_writes(other) for other in family):
        return
    graph = node.graph

    def new(target: Any, *arguments: Any) -> fx.Node:
        made = graph.call_function(target, arguments)
        made.meta = {"nn_module_stack": node.meta.get("nn_module_stack", {})}
        return made

    with graph.inserting_before(node):
        value = _copied(new, node) if _copies(node) else new(target, *node.args, *node.kwargs.values())
        value.meta = dict(node.meta)
        whole = value
        for step, put in zip(steps, puts, strict=True):
            assert put is not None
            whole = put(new, step, _parent(step), whole)
            whole.meta["val"] = _parent(step).meta["val"]
        current = {root: whole}

        def renew(view: Any) -> fx.Node:
            if view not in current:
                source = view.args[0]
                renewed = {source: renew(source)}
                current[view] = graph.node_copy(view, lambda argument: renewed.get(argument, argument))
            return current[view]

        if any(_writes(other) and node < other for other in _aliases(root)):
            value = renew(written)  # a view again, that what is written next is seen in
        current[written] = value
        for other in family:
            if any(node < user for user in other.users):
                renew(other)
    for old, now in current.items():
        for user in list(old.users):
            if node < user:
                user.replace_input_with(old, now)
    node.replace_all_uses_with(value)
    graph.erase_node(node)


def _copied(new: _New, node: Any) -> fx.Node:
    """A copy of what a node writes, in the shape and dtype of what it writes into."""
    written, source = node.args[:2]
    into, value = written.meta["val"], source.meta["val"]
    if value.dtype != into.dtype:
        source = new(aten.to.dtype, source, into.dtype)
    if value.shape != into.shape:
        source = new(aten.expand_as.default, source, written)
    return new(aten.clone.default, source)


def _put_of(step: Any) -> _Put | None:
    """How to put the new value of a view into what it is a view of; None if it is not known."""
    if step.target is python_operator.getitem:
        return _piece
    put = _PUT.get(_name(step))
    same = step.meta["val"].dtype == _parent(step).meta["val"].dtype
    fixed = put is _reshape or not any(isinstance(argument, fx.Node) for argument in step.args[1:])
    return put if same and fixed else None


def _slice(new: _New, step: Any, whole: fx.Node, value: fx.Node) -> fx.Node:
    return new(aten.slice_scatter.default, whole, value, *step.args[1:])


def _narrow(new: _New, step: Any, whole: fx.Node, value: fx.Node) -> fx.Node:
    axis, start, length = step.args[1:]
    start %= whole.meta["val"].shape[axis]
    return new(aten.slice_scatter.default, whole, value, axis, start, start + length)


def _select(new: _New, step: Any, whole: fx.Node, value: fx.Node) -> fx.Node:
    return new(aten.select_scatter.default, whole, value, *step.args[1:])


def _piece(new: _New, step: Any, whole: fx.Node, value: fx.Node) -> fx.Node:
    split, number = step.args
    name = _name(split)
    if name == "unbind":
        return new(aten.select_scatter.default, whole, value, *(split.args[1:] or (0,)), number)
    axis = split.args[2] if len(split.args) > 2 else 0
    sizes = [piece.shape[axis] for piece in split.meta["val"]]
    start = sum(sizes[:number])
    return new(aten.slice_scatter.default, whole, value, axis, start, start + sizes[number])


def _again(new: _New, step: Any, whole: fx.Node, value: fx.Node) -> fx.Node:
    """Turn back what swaps two axes."""
    return new(step.target, value, *step.args[1:])


def _permute(new: _New, step: Any, whole: fx.Node, value: fx.Node) -> fx.Node:
    order = [axis % len(step.args[1]) for axis in step.args[1]]
    return new(aten.permute.default, value, [order.index(axis) for axis in range(len(order))])


def _movedim(new: _New, step: Any, whole: fx.Node, value: fx.Node) -> fx.Node:
    source, destination = step.args[1:]
    return new(step.target, value, destination, source)


def _reshape(new: _New, step: Any, whole: fx.Node, value: fx.Node) -> fx.Node:
    return new(aten.reshape_as.default, value, whole)


_PUT: Mapping[str, _Put] = {
    "slice": _slice,
    "narrow": _narrow,
    "select": _select,
    "permute": _permute,
    "movedim": _movedim,
    **dict.fromkeys(("transpose", "swapaxes", "swapdims", "t", "mT", "numpy_T"), _again),
    **dict.fromkeys(("view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "ravel"), _reshape),
    **dict.fromkeys(("squeeze", "unsqueeze", "contiguous", "detach", "alias", "dropout"), _reshape),
}
