"""Networks from exported programs: files that `torch.export.save` wrote, with a first dimension of any batch size.

`torch.export.load` unpickles parts of such a file and evaluates texts in it. This reader does neither: it takes the
operators from the file's JSON and the tensors from its raw bytes, runs operators of ATen only, and refuses a file that
needs more. Sample inputs, which are always pickled, are never opened.

The layout, in a zip archive of uncompressed files, below one folder:

    models/NAME.json                            the operators in order, and what their inputs are
    data/weights/NAME_weights_config.json       parameters and persistent buffers: name → file, sizes, strides, …
    data/constants/NAME_constants_config.json   the same of all other tensors
    data/weights/…, data/constants/…            the tensors' bytes
"""

from __future__ import annotations

import json
import math
import operator
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import Parameter, Signature
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn

from mtz_core.batches import Form, formed
from mtz_core.errors import MtzError

_KEYWORD = 2
_STRIDED = 7
_SCHEMA = 8
"""Major version of the layout that this reader knows."""

_EXPORT_AGAIN = (
    "Export it again with torch.export.export(network.eval(), (example,), dynamic_shapes=({0: Dim('batch')},)) and "
    "torch.export.save."
)

_DTYPES: dict[int, torch.dtype] = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}
_MEMORY_FORMATS: dict[int, torch.memory_format] = {
    1: torch.contiguous_format,
    2: torch.channels_last,
    3: torch.channels_last_3d,
    4: torch.preserve_format,
}
_ARITHMETIC: dict[str, Callable[..., Any]] = {
    **{f"_operator.{name}": getattr(operator, name) for name in ("getitem", "add", "sub", "mul", "floordiv", "mod")},
    "torch.sym_max": max,
    "torch.sym_min": min,
}
# An operator with any other text among its arguments may name a file.
_WORDS = frozenset({"approximate", "rounding_mode", "mode", "equation", "indexing", "reduce", "padding"})


_TRAINING = ("train", "training")
"""Names that operators use for the argument that switches them to training."""


class InvalidProgram(MtzError):
    """A file contains no exported program that can be used."""


def exported(program: str) -> nn.Module:
    """Build the network of an exported program; a factory for `models.NAME.network`.

    Args:
        program: Path of the file in the project.

    Returns:
        The network; its state is what `extract_weights` returns.

    Raises:
        InvalidProgram: The file is missing, or contains no program that can be used.
    """
    path = Path(program)
    with _readable(path), zipfile.ZipFile(path) as archive:
        found = _parsed(archive)
        return _taking(found.names)(found)


def extract_weights(program: Path) -> dict[str, Tensor]:
    """Return the state of an exported program: its parameters and persistent buffers.

    Args:
        program: The file.

    Returns:
        The `state_dict` of the network that `exported` builds.

    Raises:
        InvalidProgram: The file is missing, or contains no program that can be used.
    """
    return {name: tensor.detach().clone() for name, tensor in exported(str(program)).state_dict().items()}


@dataclass(frozen=True)
class _Archive:
    """The content of a file.

    Attributes:
        graph: The operators and values of the program.
        inputs: The kind of each input of the graph.
        names: The names of the inputs that the program is given, in its order.
        form: What holds the outputs, see `mtz_core.batches.Form`.
        tensors: All tensors by name.
        parameters: Names of the tensors that are parameters.
        persistent: Names of the tensors that are persistent buffers.
    """

    graph: Mapping[str, Any]
    inputs: Sequence[Mapping[str, Any]]
    names: Sequence[str]
    form: Form
    tensors: Mapping[str, Tensor]
    parameters: frozenset[str]
    persistent: frozenset[str]


class Program(nn.Module):
    """A module that runs the operators of an exported program.

    Parameters and buffers have the same names as in the original network.
    """

    def __init__(self, archive: _Archive) -> None:
        super().__init__()
        # A node without outputs only asserts something about the place of export.
        self._steps = [_step(node) for node in archive.graph["nodes"] if node["outputs"]]
        self._outputs = [output.get("as_tensor", {}).get("name") for output in archive.graph["outputs"]]
        self._form = archive.form
        self._given: list[str] = []
        self._held: dict[str, str] = {}
        for argument, spec in zip(archive.graph["inputs"], archive.inputs, strict=True):
            value = argument["as_tensor"]["name"]
            (kind, held), *_ = spec.items()
            if kind == "user_input":
                self._given.append(value)
            else:
                self._held[value] = held[_NAMED[kind]]
        shared: dict[int, nn.Parameter] = {}
        for name, tensor in archive.tensors.items():
            self._register(archive, name, tensor, shared)

    def forward(self, *given: Tensor) -> Any:
        """Return what the program puts out for its inputs, in its order."""
        return self.run(given)

    def run(self, given: Sequence[Tensor]) -> Any:
        """Run the program.

        Args:
            given: Its inputs, in its order.

        Returns:
            A tensor, or tensors in dicts, lists and tuples.
        """
        values: dict[str, Any] = {value: self._tensor(name) for value, name in self._held.items()}
        values |= zip(self._given, given, strict=True)
        for step in self._steps:
            step.run(values)
        return formed(self._form, [None if output is None else values[output] for output in self._outputs])

    def _tensor(self, name: str) -> Tensor:
        path, _, last = name.rpartition(".")
        tensor: Tensor = getattr(self.get_submodule(path), last)
        return tensor

    def _register(self, archive: _Archive, name: str, tensor: Tensor, shared: dict[int, nn.Parameter]) -> None:
        part: nn.Module = self
        *path, last = name.split(".")
        try:
            for step in path:
                if step not in part._modules:
                    part.add_module(step, nn.Module())
                part = part.get_submodule(step)
            if name in archive.parameters:
                parameter = shared.setdefault(id(tensor), nn.Parameter(tensor))
                part.register_parameter(last, parameter)
            else:
                part.register_buffer(last, tensor, persistent=name in archive.persistent)
        except (KeyError, AttributeError) as error:
            raise InvalidProgram(
                f"{name!r} is no name that a tensor of a network can have: {error}. {_EXPORT_AGAIN}"
            ) from error


def _taking(names: Sequence[str]) -> type[Program]:
    """Return programs whose forward pass takes inputs by these names, or in this order."""
    own = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names]

    def forward(self: Program, *given: Tensor, **named: Tensor) -> Any:
        arguments = Signature(own).bind(*given, **named).arguments
        return self.run([arguments[name] for name in names])

    vars(forward)["__signature__"] = Signature([Parameter("self", Parameter.POSITIONAL_ONLY), *own])
    return type("Program", (Program,), {"forward": forward})


_NAMED = {"parameter": "parameter_name", "buffer": "buffer_name", "tensor_constant": "tensor_constant_name"}
"""The kinds of inputs that are tensors of the program, and the keys of their names."""


@dataclass(frozen=True)
class _Step:
    """One operator.

    Attributes:
        function: The operator.
        positional: Its positional arguments.
        keyword: Its keyword arguments.
        results: Names of its results.
    """

    function: Callable[..., Any]
    positional: Sequence[Any]
    keyword: Mapping[str, Any]
    results: Sequence[str]

    def run(self, values: dict[str, Any]) -> None:
        given = [_value(argument, values) for argument in self.positional]
        result = self.function(*given, **{name: _value(argument, values) for name, argument in self.keyword.items()})
        results = result if isinstance(result, tuple | list) else (result,)
        values.update(zip(self.results, results, strict=False))


@dataclass(frozen=True)
class _Reference:
    """A reference to the value of an earlier step, or of an input.

    Attributes:
        name: Name of the value.
    """

    name: str


def _value(argument: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(argument, _Reference):
        return values[argument.name]
    return [_value(entry, values) for entry in argument] if isinstance(argument, list) else argument


def _step(node: Mapping[str, Any]) -> _Step:
    function = _function(str(node["target"]))
    positional: list[Any] = []
    keyword: dict[str, Any] = {}
    for entry in node["inputs"]:
        if entry.get("kind") == _KEYWORD:
            keyword[entry["name"]] = _argument(entry["arg"])
        else:
            positional.append(_argument(entry["arg"]))
    names = [argument.name for argument in function._schema.arguments] if hasattr(function, "_schema") else []
    given = dict(zip(names, positional, strict=False)) | keyword
    if any(given.get(name) is True for name in _TRAINING):
        raise InvalidProgram(f"operator {node['target']} runs as in training. {_EXPORT_AGAIN}")
    results: list[str] = []
    for output in node["outputs"]:
        ((kind, value),) = output.items()
        results += [str(one.get("name", one.get("as_name"))) for one in (value if kind == "as_tensors" else [value])]
    return _Step(function, positional, keyword, results)


def _function(target: str) -> Callable[..., Any]:
    if target in _ARITHMETIC:
        return _ARITHMETIC[target]
    parts = target.split(".")
    if len(parts) == 5 and parts[:3] == ["torch", "ops", "aten"]:
        function = getattr(getattr(torch.ops.aten, parts[3], None), parts[4], None)
        if isinstance(function, torch._ops.OpOverload) and function.namespace == "aten":
            arguments = function._schema.arguments
            if all(argument.name in _WORDS for argument in arguments if "str" in str(argument.type)):
                return function
    raise InvalidProgram(f"operator {target} is none of those of ATen that may be run. Write the network without it.")


def _argument(argument: Mapping[str, Any]) -> Any:
    ((kind, value),) = argument.items()
    if kind in _PLURALS:
        return [_argument({_PLURALS[kind]: entry}) for entry in value]
    if kind in ("as_optional_tensor", "as_sym_int", "as_sym_float", "as_sym_bool") and "as_name" not in value:
        return _argument(value)
    if kind not in _KINDS:
        raise InvalidProgram(f"an argument of the kind {kind} cannot be read. Write the network without it.")
    return _KINDS[kind](value)


_KINDS: dict[str, Callable[[Any], Any]] = {
    "as_none": lambda _: None,
    "as_tensor": lambda value: _Reference(value["name"]),
    "as_sym_int": lambda value: _Reference(value["as_name"]),
    "as_sym_float": lambda value: _Reference(value["as_name"]),
    "as_sym_bool": lambda value: _Reference(value["as_name"]),
    "as_int": int,
    "as_float": float,
    "as_bool": bool,
    "as_string": str,
    "as_scalar_type": lambda value: _DTYPES[value],
    "as_memory_format": lambda value: _MEMORY_FORMATS[value],
    "as_layout": lambda value: {_STRIDED: torch.strided}[value],
    # The device of the export does not matter here.
    "as_device": lambda value: torch.device("cpu"),
}
"""Readers of arguments, by the name of the argument's kind."""

_PLURALS = {
    **{f"{kind}s": kind for kind in ("as_tensor", "as_int", "as_float", "as_bool", "as_sym_int", "as_sym_float")},
    "as_optional_tensors": "as_optional_tensor",
    "as_int_lists": "as_ints",
}


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise `InvalidProgram`, with the path, for any file that is not an exported program."""
    try:
        yield
    except InvalidProgram as error:
        raise InvalidProgram(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise InvalidProgram(f"{path}: there is no such file. Put it there, or correct the path.") from error
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise InvalidProgram(f"{path} is no whole archive of torch.export.save: {error}. {_EXPORT_AGAIN}") from error
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise InvalidProgram(f"{path} holds no program that can be read: {error!r}. {_EXPORT_AGAIN}") from error


def _parsed(archive: zipfile.ZipFile) -> _Archive:
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
        raise InvalidProgram(f"it is a compressed archive, which torch.export.save does not write. {_EXPORT_AGAIN}")
    models = [name for name in archive.namelist() if PurePosixPath(name).match("*/models/*.json")]
    if len(models) != 1:
        raise InvalidProgram(f"it holds {len(models)} programs, not one. {_EXPORT_AGAIN}")
    root, model = PurePosixPath(models[0]).parents[1], PurePosixPath(models[0]).stem
    program = json.loads(archive.read(models[0]))
    major = program["schema_version"]["major"]
    if major != _SCHEMA:
        raise InvalidProgram(
            f"its layout has version {major}, not {_SCHEMA}. Export it with torch {torch.__version__}."
        )
    graph, signature = program["graph_module"]["graph"], program["graph_module"]["signature"]
    _check_signature(graph, signature)
    called = program["graph_module"]["module_call_graph"][0]["signature"]
    given = [
        spec["user_input"]["arg"]["as_tensor"]["name"] for spec in signature["input_specs"] if "user_input" in spec
    ]
    names = called.get("forward_arg_names") or given
    if len(names) != len(given):
        raise InvalidProgram(
            f"it is given tensors inside of others. Wrap the network so that each has a name. {_EXPORT_AGAIN}"
        )
    weights = _tensors(archive, root / "data/weights", f"{model}_weights_config.json")
    constants = _tensors(archive, root / "data/constants", f"{model}_constants_config.json")
    parameters = frozenset(name for name, (_, is_parameter) in weights.items() if is_parameter)
    return _Archive(
        graph=graph,
        inputs=signature["input_specs"],
        names=names,
        form=_form(json.loads(called["out_spec"])[1], count(0)),
        tensors={name: tensor for name, (tensor, _) in (weights | constants).items()},
        parameters=parameters,
        persistent=frozenset(weights) - parameters,
    )


def _check_signature(graph: Mapping[str, Any], signature: Mapping[str, Any]) -> None:
    inputs = [kind for spec in signature["input_specs"] for kind in spec]
    outputs = [kind for spec in signature["output_specs"] for kind in spec]
    if unknown := set(inputs) - {"user_input", *_NAMED}:
        raise InvalidProgram(f"it has an input of the kind {min(unknown)}, which may be pickled. {_EXPORT_AGAIN}")
    if "buffer_mutation" in outputs:
        raise InvalidProgram(f"it changes its buffers, as in training. {_EXPORT_AGAIN}")
    given = [argument for kind, argument in zip(inputs, graph["inputs"], strict=True) if kind == "user_input"]
    tensors = all("as_tensor" in argument for argument in given)
    if not given or not tensors or {*outputs} != {"user_output"} or not all(map(_is_output, graph["outputs"])):
        raise InvalidProgram(f"it does not map tensors to tensors. Wrap the network so that it does. {_EXPORT_AGAIN}")
    for argument in given:
        sizes = graph["tensor_values"][argument["as_tensor"]["name"]]["sizes"]
        if not sizes or "as_expr" not in sizes[0]:
            raise InvalidProgram(f"it accepts batches of one size only. {_EXPORT_AGAIN}")


def _is_output(argument: Mapping[str, Any]) -> bool:
    return "as_tensor" in argument or "as_none" in argument


def _form(spec: Mapping[str, Any], numbers: Iterator[int]) -> Form:
    """Return what holds the outputs, of which each has a number."""
    kind = spec["type"]
    if kind is None:
        return next(numbers)
    parts = [_form(part, numbers) for part in spec["children_spec"]]
    if kind == "builtins.dict":
        keys = json.loads(spec["context"])
        if all(isinstance(key, str) for key in keys):
            return ["dict", *([key, part] for key, part in zip(keys, parts, strict=True))]
    if kind in ("builtins.tuple", "builtins.list"):
        return [kind.removeprefix("builtins."), *parts]
    raise InvalidProgram(
        f"it returns a {kind}, not tensors in tuples, lists or dicts with texts for keys. Wrap the network so that it "
        f"does. {_EXPORT_AGAIN}"
    )


def _tensors(archive: zipfile.ZipFile, folder: PurePosixPath, config: str) -> dict[str, tuple[Tensor, bool]]:
    """Return the tensors that a config names, each with whether it is a parameter; equal entries give one object."""
    if str(folder / config) not in archive.namelist():
        raise InvalidProgram(f"its tensors are pickled, as older versions of torch did. {_EXPORT_AGAIN}")
    entries = json.loads(archive.read(str(folder / config)))["config"]
    for name, entry in entries.items():
        if entry["use_pickle"] or entry["tensor_meta"] is None:
            raise InvalidProgram(f"{name!r} is pickled, and nothing is unpickled. Export the network without it.")
    tensors: dict[str, Tensor] = {}
    read: dict[str, tuple[Tensor, bool]] = {}
    for name, entry in entries.items():
        which = json.dumps([entry["path_name"], entry["tensor_meta"]])
        if which not in tensors:
            tensors[which] = _tensor(archive.read(str(folder / entry["path_name"])), entry["tensor_meta"])
        read[name] = tensors[which], bool(entry["is_param"])
    return read


def _tensor(content: bytes, meta: Mapping[str, Any]) -> Tensor:
    if meta["layout"] != _STRIDED:
        raise InvalidProgram(f"it holds a tensor that is sparse, or of another layout. {_EXPORT_AGAIN}")
    sizes, strides = ([int(size["as_int"]) for size in meta[key]] for key in ("sizes", "strides"))
    dtype = _DTYPES[meta["dtype"]]
    if math.prod(sizes) == 0:
        return torch.empty(sizes, dtype=dtype)
    values = torch.frombuffer(bytearray(content), dtype=dtype)
    return values.as_strided(sizes, strides, int(meta["storage_offset"]["as_int"])).clone()
