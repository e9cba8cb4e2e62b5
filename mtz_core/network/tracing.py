"""Trace any ``nn.Module`` into a `Network`: its operators, its tensors, and which neurons are tied.

Tracing goes through ``torch.export``. It sees the operators that really run, however the module is written, knows every
shape, and needs no specification by hand. Where numbers in the graph may count examples, the module is exported for a
second batch size: those that differ between the two do. What the graph cannot express is refused, with the module's
path and the operator. Nothing is guessed, and every graph is checked by permuting its neurons (see
`mtz_core.network.selfcheck`).
"""

from __future__ import annotations

import keyword
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial, wraps
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy

from mtz_core.batches import (
    Batch,
    Form,
    NamedTensors,
    arguments_of,
    bound,
    call,
    concatenated,
    is_positional,
    mapped,
    needs_several,
    one_or_named,
    opened,
    signature_of,
    tensors_of,
)
from mtz_core.errors import InvalidCalibration, InvalidWeights, UnsupportedModule
from mtz_core.network.exported import SIZES, ProgramReader, constants_of, counts_examples
from mtz_core.network.folding import Program, fold_constants, fold_weights
from mtz_core.network.graph import Network, Node, inputs_of
from mtz_core.network.groups import analyse, remember
from mtz_core.network.layers import LAYERS
from mtz_core.network.operations import operation_of
from mtz_core.network.rewriting import rewrite
from mtz_core.network.selfcheck import TOLERANCE, Reference, check, compare, distance

CHECKED_SIZE = 5
"""The batch size that the graph is checked with. A formula that fits the exported sizes by chance fails here."""


def trace(
    module: nn.Module,
    example: Batch | Mapping[str, Tensor] | Sequence[Tensor],
    keep_separate: Sequence[str] = (),
    only: Sequence[str] = (),
) -> Network:
    """Trace a module by exporting it on an example input. The module is not modified.

    Args:
        module: The module.
        example: A batch of its input, ``[batch, …]``; of several, a dict by name, or a tuple in the module's order.
        keep_separate: Paths of submodules, or names of operators, that will not be shared and need no rule.
        only: Paths of submodules that take part in sharing; everything else is kept separate. If there are none,
            everything takes part.

    Returns:
        The module's graph and tensors.

    Raises:
        UnsupportedModule: If the module, or a part of it, cannot be zipped.
        InvalidWeights: If weights or buffers are not finite.
        InvalidCalibration: If the module does not accept the example.
    """
    module = as_module(module)
    example = _given(module, example)
    if not len(example):
        raise InvalidCalibration(f"{type(module).__name__} is given an empty batch as its example. Give one example.")
    if isinstance(example, Tensor) and example.ndim < 2:
        raise InvalidCalibration(
            f"an example of shape {list(example.shape[1:])} has no features for a network to read. Give a batch of "
            "examples, [n, …]."
        )
    _check_names(module)
    check_paths({"keep_separate": keep_separate, "zip": only}, module)
    _check_weights(module)
    with evaluation_mode(module), _buffers_kept(module), _plain_attention(), _without_stack_traces():
        examples, expected, form = _accepted(module, example)
        alone = _alone(module, examples)
        independent = _is_independent(module, examples, expected)
        keeps_one = alone is None or _same_form(alone, expected)
        with nullcontext() if form == 0 else _returning_tensors(module):
            programs = _exported(module, examples, independent, keeps_one)
    reader = ProgramReader(module, programs, tuple(inputs_of(examples)), (tuple(expected), form))
    nodes, output = reader.nodes()
    nodes = _reachable(nodes, output)
    parameters = frozenset(dict(module.named_parameters()))
    nodes, state = fold_constants(nodes, output, reader.state(), parameters)
    used = {name for node in nodes for name in node.state}
    unused = {name: own.nbytes for name, own in module.named_parameters() if name not in used}
    parameters -= unused.keys()
    program = fold_weights(Program(_mark_separate(nodes, keep_separate, only), output, state, parameters))
    used = {name for node in program.nodes for name in node.state}
    state = {name: program.state[name] for name in program.state if name in used}
    program = replace(program, nodes=_mark_layers(program, keep_separate), state=state)
    carried = {*programs[0].graph_signature.non_persistent_buffers, *constants_of(programs[0])}
    passing = frozenset(name for name in carried if name in state)
    references = [
        Reference(given, one_or_named(found), partial(_in_double, module, given))
        for given, found in ((examples, expected), (examples[:1], alone))
        if found is not None
    ]
    network = _analysed(program, example, passing, unused, references)
    if not network.graph.layers:
        raise UnsupportedModule(f"{type(module).__name__} has no layer with weights to share.")
    return network


def as_module(given: object) -> nn.Module:
    """Return a network as the module that computes it.

    Args:
        given: A module, as it is or in the wrappers of `torch.compile`, `DataParallel` or `DistributedDataParallel`.

    Returns:
        The module without wrappers.

    Raises:
        UnsupportedModule: If it is no module.
    """
    if isinstance(given, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return as_module(given.module)
    if isinstance(given, nn.Module):
        compiled = type(given).__name__ == "OptimizedModule"  # its own module takes seconds to import
        return as_module(given._orig_mod) if compiled else given
    if isinstance(given, type):
        found, remedy = f"the class {given.__name__}", "Give an instance of it, with its trained weights."
    elif isinstance(given, Mapping):
        found, remedy = (
            f"of type {type(given).__name__}",
            "If it is a state_dict, build the module, load it with `load_state_dict`, and give the module.",
        )
    else:
        found, remedy = f"of type {type(given).__name__}", "Give the module itself."
    raise UnsupportedModule(f"it is {found}, not a torch.nn.Module. {remedy}")


def _analysed(
    program: Program,
    example: Batch,
    non_persistent: frozenset[str],
    unused: Mapping[str, int],
    references: Sequence[Reference],
) -> Network:
    """Find the neuron groups, and check them.

    Operators that are kept separate keep their rules if the check agrees with these, so that neurons are known behind
    them. If it does not, what meets these operators belongs to its place.

    Args:
        program: The network's nodes and tensors.
        example: A batch of its inputs.
        non_persistent: The names of the tensors that a ``state_dict`` leaves out.
        unused: The parameters that are no part of the network, and their bytes.
        references: What the module computes, to check with.

    Returns:
        The network.

    Raises:
        UnsupportedModule: If a part cannot be zipped.
    """
    entry = program.state, program.parameters, inputs_of(example)
    opaque = [replace(node, opaque=node.separate and not node.is_layer) for node in program.nodes]
    for nodes in (program.nodes, opaque):
        analysis = analyse(nodes, program.output, *entry)
        network = Network(analysis.graph, *entry, non_persistent, unused=unused)
        try:
            check(network, analysis, references[0])
            break
        except UnsupportedModule:
            if nodes == opaque:
                raise
    for reference in references[1:]:
        compare(network, analysis, reference)
    remember(network, analysis)
    return network


def _given(module: nn.Module, example: Any) -> Batch:
    """What a module is given as an example."""
    taken, name = signature_of(module), type(module).__name__
    if isinstance(example, (NamedTensors, Mapping)) or is_positional(example, taken):
        return bound(example, taken, f"the inputs of {name}")
    if not isinstance(example, Tensor):
        raise InvalidCalibration(
            f"{name} is given a {type(example).__name__} as its input. Give a tensor; of several inputs, a dict by "
            "their names in its forward pass."
        )
    if needs_several(taken):
        raise InvalidCalibration(
            f"{name} is given one tensor, but needs several inputs. Give a dict by their names in its forward pass: "
            f"{', '.join(taken.parameters)}."
        )
    return example


def _generic(example: Shaped[Tensor, "batch ..."], count: int) -> Shaped[Tensor, "count ..."]:
    """The first example, and others near it: inputs that are all zero, or all alike, would prove little."""
    given, generator = example.detach().cpu(), torch.Generator().manual_seed(0)
    shape = (count - 1, *example.shape[1:])
    if not example.is_floating_point():  # tokens or masks: such as occur in the examples
        drawn = torch.randint(given.numel(), shape, generator=generator)
        return torch.cat([given[:1], given.flatten()[drawn]]).to(example.device)
    deviation = float(given[:1].std()) if given[:1].numel() > 1 else 0.0
    noise = torch.randn(shape, generator=generator, dtype=given.dtype)
    return torch.cat([given[:1], given[:1] + noise * (deviation or 1.0)]).to(example.device)


def _accepted(module: nn.Module, example: Batch) -> tuple[Batch, dict[str, Tensor], Form]:
    """Find examples that the module accepts: generic ones if it does, copies of the first one otherwise.

    Returns:
        The examples, the module's outputs by name, and what holds these.

    Raises:
        InvalidCalibration: If the module accepts neither.
    """
    examples = mapped(lambda own: _generic(own, CHECKED_SIZE), example)
    try:
        return examples, *_outputs(module, examples)
    except InvalidCalibration:
        examples = concatenated([example[:1]] * CHECKED_SIZE)
    try:
        return examples, *_outputs(module, examples)
    except InvalidCalibration as error:
        remedy = "Check that the calibration data are meant for this network."
        if "same dtype" in str(error):
            remedy = "Convert the calibration data to the dtype of the weights, as `.float()` does for float32."
        if isinstance(module, fx.GraphModule):
            remedy += (
                f" {_ANY_NUMBER}, and is given several inputs as it was when it was exported: a tuple by position, a "
                "dict by name; all in one of these ways."
            )
        raise InvalidCalibration(
            f"{type(module).__name__} does not accept an input of {_in_words(example)}: {str(error).rstrip('.')}. "
            f"{remedy}"
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


def _in_words(example: Batch) -> str:
    shapes = {name: f"shape {list(own.shape)} ({own.dtype})" for name, own in tensors_of(example).items()}
    return ", ".join(f"{name} of {shape}" if name else shape for name, shape in shapes.items())


def _outputs(module: nn.Module, examples: Batch) -> tuple[dict[str, Tensor], Form]:
    try:
        output = call(module, mapped(torch.clone, examples))
    except Exception as error:  # whatever a user's forward raises means the same: this input does not fit it
        raise InvalidCalibration(_first_line(error)) from error
    try:
        tensors, form = opened(output)
    except UnsupportedModule as error:
        raise UnsupportedModule(f"{type(module).__name__}: {error}") from error
    for name, tensor in tensors.items():
        for_each = bool(tensor.ndim) and len(tensor) == len(examples)
        squeezed = form == 0 and len(examples) == 1
        if not (for_each or squeezed) or (form != 0 and not tensor.is_floating_point()):
            raise UnsupportedModule(
                f"{type(module).__name__}: its output{f' {name!r}' if name else ''} has shape {list(tensor.shape)} and "
                f"dtype {tensor.dtype} for {len(examples)} examples, not numbers for each. If it is a loss, leave "
                "labels out of the inputs; otherwise wrap the network in a module that leaves it out."
            )
    if not tensors:
        raise UnsupportedModule(f"{type(module).__name__} returns no tensor but {type(output).__name__}.")
    return tensors, form


def _in_double(module: nn.Module, examples: Batch) -> Batch | None:
    """A module's outputs in double precision; None if it cannot compute them."""
    held = (*module.named_parameters(), *module.named_buffers())
    wide = {name: tensor.double() if tensor.is_floating_point() else tensor.clone() for name, tensor in held}
    given = mapped(lambda own: own.double() if own.is_floating_point() else own.clone(), examples)
    with evaluation_mode(module), _plain_attention():
        _forget(module)
        try:
            return one_or_named(opened(functional_call(module, wide, *arguments_of(given)))[0])
        except Exception:  # whatever a user's forward raises in a precision that it was not written for
            return None
        finally:
            _forget(module)


@contextmanager
def _returning_tensors(module: nn.Module) -> Iterator[None]:
    """Let a module return the tensors that it returns, in a tuple without what holds them."""
    own, forward = vars(module).get("forward"), module.forward

    @wraps(forward)
    def tensors(*arguments: Any, **named: Any) -> tuple[Tensor, ...]:
        return tuple(opened(forward(*arguments, **named))[0].values())

    vars(tensors).pop("__signature__", None)  # that of a method names `self`
    module.forward = tensors
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _exported(
    module: nn.Module, examples: Batch, independent: bool, keeps_one: bool
) -> tuple[torch.export.ExportedProgram, torch.export.ExportedProgram]:
    """Export a module for the batch sizes `SIZES`; for the first alone if its program is right for all.

    Args:
        module: The module.
        examples: A batch of its inputs.
        independent: Whether it computes the same for an example, whatever others there are.
        keeps_one: Whether its outputs keep the axis of the examples where there is but one.

    Returns:
        Both programs, or the first one twice.
    """
    several, few = SIZES
    export = partial(_export, module, keeps_one=keeps_one)
    # Of examples to export with, only the shape matters.
    first = export(mapped(lambda own: own.new_empty((several, *own.shape[1:])), examples))
    if independent and not counts_examples(first):
        return first, first
    return first, export(mapped(torch.clone, examples[:few]))


def _is_independent(module: nn.Module, examples: Batch, expected: Mapping[str, Tensor]) -> bool:
    """Whether a module computes the same for the first examples where there are no others."""
    count = SIZES[1]
    try:
        found, _ = _outputs(module, examples[:count])
    except (InvalidCalibration, UnsupportedModule):
        return False
    first = {name: tensor[:count] if tensor.ndim else tensor for name, tensor in expected.items()}
    return distance(found, first) <= TOLERANCE


def _alone(module: nn.Module, examples: Batch) -> dict[str, Tensor] | None:
    """A module's outputs for the first example without others; None if it needs several."""
    try:
        return _outputs(module, examples[:1])[0]
    except (InvalidCalibration, UnsupportedModule):
        return None


def _same_form(alone: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Whether outputs for one example have as many axes as those for several."""
    return alone.keys() == expected.keys() and all(own.ndim == expected[name].ndim for name, own in alone.items())


def _export(module: nn.Module, examples: Batch, keeps_one: bool) -> torch.export.ExportedProgram:
    _forget(module)
    try:
        with warnings.catch_warnings():  # some modules set their weights anew in every forward pass
            warnings.filterwarnings("ignore", "The tensor attribute", UserWarning)
            program = torch.export.export(module, *arguments_of(examples), strict=False)
    except Exception as error:
        if isinstance(module, fx.GraphModule):
            remedy = f"{_ANY_NUMBER}."
        elif scripted := [path for path, part in module.named_modules() if isinstance(part, torch.jit.ScriptModule)]:
            remedy = (
                f"Give the module from which the TorchScript {f'at {scripted[0]!r} ' if scripted[0] else ''}was made."
            )
        else:
            remedy = (
                "Control flow that depends on data cannot be zipped; make it independent of the data, or leave this "
                "network out of the group."
            )
        raise UnsupportedModule(
            f"{type(module).__name__} cannot be exported by torch.export: {_first_line(error)} {remedy}"
        ) from error
    finally:
        _forget(module)
    return rewrite(program, keeps_one)


def _forget(module: nn.Module) -> None:
    """Have a module drop what it has computed from its parameters for good, as long as it is in evaluation mode.

    Otherwise the graph would have that table in place of the parameters, and the module a table of the export.
    """
    for part in module.modules():
        if type(part).train is not nn.Module.train and not isinstance(part, fx.GraphModule):
            part.train()
            part.eval()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


_ANY_NUMBER = "A program must be exported for any number of examples, with dynamic_shapes=({0: Dim('batch')},)"

_RESERVED = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph())))
"""Names that parts of a module built from a graph cannot have."""


def _check_names(module: nn.Module) -> None:
    for name, _ in (*module.named_parameters(), *module.named_buffers()):
        for part in name.split("."):
            if part in _RESERVED or keyword.iskeyword(part):
                raise UnsupportedModule(
                    f"{name!r}: {part!r} is a name that torch modules use themselves. Rename that part of the network."
                )


def check_paths(settings: Mapping[str, Sequence[str]], *modules: nn.Module) -> None:
    """Check that settings name submodules that at least one module has; names of operators are looked up later.

    Args:
        settings: The paths by the name of the setting.
        modules: The modules.

    Raises:
        UnsupportedModule: If there is no such submodule.
    """
    known = dict.fromkeys(name for module in modules for name, _ in module.named_modules())
    for setting, paths in settings.items():
        for path in paths:
            if ":" not in path and path not in known:
                near = ", ".join(name for name in known if name) or "none"
                operators = " A single operator goes by its name, as errors show it, such as 'add.Tensor:3'."
                raise UnsupportedModule(
                    f"{setting}: there is no submodule {path!r}. Submodules: {near}."
                    f"{operators if setting == 'keep_separate' else ''}"
                )


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
    try:
        module.eval()
    except NotImplementedError:  # the module of an exported program has one mode for ever
        for part in module.modules():
            part.training = False
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


@contextmanager
def _without_stack_traces() -> Iterator[None]:
    """Do not record for each operator where it was called, which takes a fifth of an export's time."""
    before = fx.config.do_not_emit_stack_traces
    fx.config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        fx.config.do_not_emit_stack_traces = before


def _reachable(nodes: list[Node], output: str) -> list[Node]:
    """The nodes that the output depends on."""
    wanted = {output}
    for node in reversed(nodes):
        if node.name in wanted:
            wanted |= set(node.sources)
    return [node for node in nodes if node.name in wanted]


def lies_in(module: str, paths: Iterable[str]) -> bool:
    """Whether a module is one of these, or inside one; `""` is the network's own forward pass."""
    return any(module == path or (path and module.startswith(f"{path}.")) for path in paths)


def _mark_separate(nodes: Sequence[Node], keep_separate: Sequence[str], only: Sequence[str]) -> list[Node]:
    """Mark the nodes of the modules that are listed, or of all but those that take part."""
    return [
        replace(node, separate=lies_in(node.module, keep_separate) or (bool(only) and not lies_in(node.module, only)))
        for node in nodes
    ]


def _mark_layers(program: Program, keep_separate: Sequence[str]) -> list[Node]:
    """Mark the layers: nodes that zipping can see as a matrix and whose parameters no other node reads.

    Args:
        program: The network.
        keep_separate: Names of operators that are kept separate, beside those that are marked already.

    Returns:
        The nodes, marked.

    Raises:
        UnsupportedModule: If there is no operator of a name.
    """
    names = {node.name for node in program.nodes}
    for name in keep_separate:
        if ":" in name and name not in names:
            raise UnsupportedModule(
                f"keep_separate: there is no operator {name!r}. Operators: {', '.join(sorted(names))}."
            )
    uses: dict[str, int] = {}
    for node in program.nodes:
        for name in node.state:
            uses[name] = uses.get(name, 0) + 1
    return [
        replace(
            node,
            is_layer=_is_layer(node, program.parameters, uses),
            separate=node.separate or node.name in keep_separate,
        )
        for node in program.nodes
    ]


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
