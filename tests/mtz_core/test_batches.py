"""Batches of several tensors: how they are named, cut and put together, and how outputs are taken apart."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtz_core.batches import (
    ANY_NAMES,
    NamedTensors,
    arguments_of,
    bound,
    call,
    concatenated,
    divided,
    flattened,
    formed,
    is_finite,
    is_positional,
    mapped,
    needs_several,
    opened,
    shapes_in_words,
    signature_of,
    tensors_of,
)
from mtz_core.errors import InvalidCalibration, UnsupportedModule

A, B = torch.arange(10.0).reshape(5, 2), torch.arange(5)


def batch() -> NamedTensors:
    return NamedTensors({"a": A, "b": B})


def test_a_batch_is_as_long_as_its_tensors_and_can_be_indexed() -> None:
    assert len(batch()) == 5
    some = batch()[torch.tensor([3, 0])]
    assert torch.equal(some.tensors["a"], A[[3, 0]])
    assert torch.equal(some.tensors["b"], B[[3, 0]])
    assert batch()[1:3].tensors["b"].tolist() == [1, 2]


@pytest.mark.parametrize("whole", [A, batch()], ids=["one tensor", "several"])
@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_parts_of_a_batch_make_the_whole(whole: Any, size: int) -> None:
    parts = divided(whole, size)
    assert [len(part) for part in parts] == [min(size, 5 - start) for start in range(0, 5, size)]
    for name, tensor in tensors_of(concatenated(parts)).items():
        assert torch.equal(tensor, tensors_of(whole)[name])


def test_an_empty_batch_has_one_empty_part() -> None:
    for empty in (A[:0], batch()[:0]):
        assert [len(part) for part in divided(empty, 3)] == [0]


def test_all_tensors_of_a_batch_are_looked_at() -> None:
    assert is_finite(batch())
    assert not is_finite(NamedTensors({"a": A, "b": A / 0}))
    assert shapes_in_words(batch()) == "a [2], b []"
    assert shapes_in_words(A) == "[2]"
    assert tensors_of(mapped(torch.neg, batch()))["b"].tolist() == [0, -1, -2, -3, -4]


def f(x: Tensor, mask: Tensor, /, scale: Tensor | None = None, *, bias: Tensor | None = None) -> str:
    return ",".join(str(own is not None) for own in (x, mask, scale, bias))


FORWARD: dict[str, tuple[Callable[..., Any], bool, int]] = {
    # a forward pass, whether it needs several inputs, and how many it takes by position
    "one": (lambda x: x, False, 0),
    "one and an option": (lambda x, mask=None: x, False, 0),
    "two": (lambda x, y: x, True, 2),
    "two and an option": (lambda x, y, mask=None: x, True, 3),
    "one by position, one by name": (lambda x, *, y: x, False, 0),
    "any number": (lambda *x: x, False, 0),
    "by name": (lambda **x: x, False, 0),
}


@pytest.mark.parametrize(("forward", "several", "most"), FORWARD.values(), ids=FORWARD.keys())
def test_a_tuple_is_one_batch_only_where_one_input_is_not_enough(
    forward: Callable[..., Any], several: bool, most: int
) -> None:
    taken = signature(forward)
    assert needs_several(taken) == several
    for count in range(5):
        assert (
            is_positional((A,) * count, taken) == is_positional([A] * count, taken) == (several and 2 <= count <= most)
        )
    assert not is_positional((A, "b"), taken)
    assert not is_positional({"x": A, "y": A}, taken)


def test_inputs_by_name_are_put_in_the_order_of_the_forward_pass() -> None:
    taken = signature(lambda first, second, **more: None)
    given = bound({"more": B, "second": B, "first": A}, taken, "here")
    assert list(given.tensors) == ["first", "second", "more"]
    assert arguments_of(given) == ((), dict(given.tensors))
    again = bound(given, taken, "here")
    assert list(again.tensors) == ["first", "second", "more"]


def test_inputs_by_position_are_named_and_called_by_position() -> None:
    given = bound((A, B, A), signature(f), "here")
    assert list(given.tensors) == ["x", "mask", "scale"]
    assert call(f, given) == "True,True,True,False"
    many = bound([A, B], signature(lambda *rows: None), "here")
    assert list(many.tensors) == ["rows_0", "rows_1"]
    assert call(lambda *rows: len(rows), many) == 2


def test_a_module_takes_what_its_forward_pass_declares() -> None:
    assert list(signature_of(nn.Bilinear(1, 2, 3)).parameters) == ["input1", "input2"]
    assert signature_of(3) == ANY_NAMES


TWO = signature(lambda ids, mask: None)
BAD: dict[str, tuple[Any, str]] = {
    "missing": (
        {"ids": A},
        r"here: missing a required argument: 'mask'\. The network takes: ids, mask\. Given are: ids\.",
    ),
    "unknown": ({"ids": A, "mask": A, "labels": B}, r"unexpected keyword argument 'labels'.*ids, mask"),
    "too many": ((A, A, A), r"too many positional"),
    "unequal": ({"ids": A, "mask": B[:4]}, r"unequal lengths \(ids has 5, mask has 4\)"),
    "none": ({"ids": A, "mask": None}, r"'mask' is no tensor of examples but NoneType.*leave it out"),
    "list": ({"ids": A, "mask": [A, A]}, r"'mask' is a list\. Wrap the network in a module whose forward pass"),
    "dict": ({"ids": A, "mask": {"own": A}}, r"'mask' is a dict\. Wrap the network"),
    "no examples": ({"ids": A, "mask": torch.tensor(1.0)}, r"'mask' is no tensor of examples"),
}


@pytest.mark.parametrize(("given", "message"), BAD.values(), ids=BAD.keys())
def test_inputs_that_do_not_fit_are_refused(given: Any, message: str) -> None:
    with pytest.raises(InvalidCalibration, match=message):
        bound(given, TWO, "here")


@pytest.mark.parametrize("name", ["not a name", "class", "1"])
def test_names_that_no_module_could_take_are_refused(name: str) -> None:
    with pytest.raises(InvalidCalibration, match="cannot name an input"):
        bound({name: A}, ANY_NAMES, "here")
    with pytest.raises(InvalidCalibration, match="none is given"):
        bound({}, ANY_NAMES, "here")


@dataclass
class Record:
    logits: Tensor
    loss: Tensor | None = None


OUTPUTS: dict[str, tuple[Any, list[str]]] = {
    # what a module returns, and the names of the tensors in it
    "tensor": (A, [""]),
    "tuple": ((A, B), ["0", "1"]),
    "list with nothing": ([A, None], ["0"]),
    "dict": ({"y": A, "z": B}, ["y", "z"]),
    "nested": ({"y": (A, [B, None]), "z": {"w": A}}, ["y.0", "y.1.0", "z.w"]),
    "dots": ({".y": A, "..": [B]}, [".y", "...0"]),
    "nothing": (None, []),
}


@pytest.mark.parametrize(("output", "names"), OUTPUTS.values(), ids=OUTPUTS.keys())
def test_outputs_are_taken_apart_and_put_together_again(output: Any, names: list[str]) -> None:
    tensors, form = opened(output)
    assert list(tensors) == names
    again = formed(form, list(tensors.values()))
    assert type(again) is type(output)
    assert opened(again)[1] == form
    assert all(a is b for a, b in zip(opened(again)[0].values(), tensors.values(), strict=True))


@pytest.mark.parametrize("output", [Record(A), OrderedDict(logits=A, loss=None)], ids=["dataclass", "mapping"])
def test_records_become_dicts(output: Any) -> None:
    tensors, form = opened(output)
    assert formed(form, list(tensors.values())) == {"logits": A, "loss": None}


@pytest.mark.parametrize(
    "output",
    [{"y": A, "cache": object()}, {0: A}, "text"],
    ids=["object", "key", "text"],
)
def test_other_outputs_are_refused(output: Any) -> None:
    with pytest.raises(UnsupportedModule, match=r"its output.*not tensors in tuples, lists or dicts"):
        opened(output)


def test_outputs_of_one_name_are_refused() -> None:
    with pytest.raises(UnsupportedModule, match=r"two of its outputs would be called 'a\.b'"):
        opened({"a.b": A, "a": {"b": A}})


def test_the_only_tensor_of_an_output_stands_for_it() -> None:
    assert flattened({"y": A, "z": None}) is A
    assert flattened(A) is A
    both = flattened((A, B))
    assert isinstance(both, NamedTensors)
    assert list(both.tensors) == ["0", "1"]
