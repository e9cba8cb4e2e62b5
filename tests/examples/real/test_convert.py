"""Weights come out of the packages' formats as they went in, under the names of the modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from examples.real.convert import UnreadableWeights, content_type_state, face_state, read_onnx, read_tensorflow_js
from examples.real.networks import content_type, face

SCALED = {"name": "a", "shape": [2, 2], "dtype": "float32", "quantization": {"dtype": "uint8", "scale": 0.5, "min": -1}}
PLAIN = {"name": "b/c", "shape": [3], "dtype": "float32"}
CONTENT = bytes([0, 1, 2, 255]) + np.array([1.5, -2, 0], "<f4").tobytes()


def manifest(folder: Path, *weights: dict[str, Any], content: bytes = CONTENT, path: str = "net.bin") -> Path:
    (folder / "net.bin").write_bytes(content)
    file = folder / "net.json"
    file.write_text(json.dumps([{"paths": [path], "weights": weights}]))
    return file


def test_tensorflow_js(tmp_path: Path) -> None:
    found = read_tensorflow_js(manifest(tmp_path, SCALED, PLAIN))
    assert found["a"].tolist() == [[-1, -0.5], [0, 126.5]]
    assert found["b/c"].tolist() == [1.5, -2, 0]
    assert {values.dtype for values in found.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"content": CONTENT[:-1]}, "buffer is smaller"),
        ({"content": CONTENT + b"x"}, "16 bytes, and its files have 17"),
        ({"path": "../net.bin"}, "does not lie beside it"),
        ({"path": "other.bin"}, "No such file"),
    ],
)
def test_damaged_files_of_tensorflow_js_are_refused(tmp_path: Path, changed: dict[str, Any], why: str) -> None:
    with pytest.raises(UnreadableWeights, match=why):
        read_tensorflow_js(manifest(tmp_path, SCALED, PLAIN, **changed))


def test_unknown_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableWeights, match="is int32 stored as int32"):
        read_tensorflow_js(manifest(tmp_path, {**PLAIN, "dtype": "int32"}))


def shaken(network: nn.Module) -> nn.Module:
    """The network with random numbers in every parameter, so that no two are equal."""
    generator = torch.Generator().manual_seed(0)
    for values in network.parameters():
        values.data.normal_(generator=generator)
    return network.eval()


def as_in_face_api(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A face network's state, channels last and with the package's names."""
    found = {}
    for name, values in state.items():
        *path, kind = name.split(".")
        if name == "mean":
            continue
        if kind == "bias":
            found["/".join(part for part in (*path, "bias") if part != "pointwise")] = values
        elif path == ["fc"]:
            found["fc/weights"] = values.T
        elif path[-1] == "depthwise":
            found["/".join((*path[:-1], "depthwise_filter"))] = values.permute(2, 3, 0, 1)
        elif path[-1] == "pointwise":
            found["/".join((*path[:-1], "pointwise_filter"))] = values.permute(2, 3, 1, 0)
        else:
            found["/".join((*path, "filters"))] = values.permute(2, 3, 1, 0)
    return found


def test_face_state_is_the_modules_own() -> None:
    state = shaken(face(7)).state_dict()
    found = face_state(as_in_face_api(state))
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state if name != "mean")
    assert (255 * found["mean"]).flatten().tolist() == pytest.approx([122.782, 117.001, 104.298])


def test_an_unknown_kind_of_weight_is_refused() -> None:
    with pytest.raises(UnreadableWeights, match="'dense0/gamma' is of an unknown kind"):
        face_state({"dense0/gamma": torch.ones(3)})


def varint(number: int) -> bytes:
    more, least = divmod(number, 128)
    return bytes([least | 128]) + varint(more) if more else bytes([least])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def initialiser(name: str, values: np.ndarray[Any, Any], kind: int = 1, together: bool = False) -> bytes:
    sizes = field(1, b"".join(map(varint, values.shape))) if together else b"".join(field(1, n) for n in values.shape)
    return field(5, sizes + field(2, kind) + field(8, name.encode()) + field(9, values.tobytes()))


def onnx(folder: Path, *parts: bytes) -> Path:
    file = folder / "model.onnx"
    file.write_bytes(field(1, 8) + field(2, b"producer") + field(7, field(2, b"graph") + b"".join(parts)))
    return file


@pytest.mark.parametrize("together", [False, True])
def test_onnx(tmp_path: Path, together: bool) -> None:
    weights = np.arange(600, dtype="<f4").reshape(3, 200)
    shape = initialiser("shape", np.array([3, 200], "<i8"), kind=7)
    fixed = varint(90 << 3 | 5) + b"four" + varint(91 << 3 | 1) + b"eight.by"
    found = read_onnx(onnx(tmp_path, initialiser("dense", weights, together=together), shape, fixed))
    assert found.keys() == {"dense"}
    assert np.array_equal(found["dense"].numpy(), weights)


def test_damaged_onnx_is_refused(tmp_path: Path) -> None:
    file = onnx(tmp_path, initialiser("dense", np.ones((3, 2), "<f4")))
    whole = file.read_bytes()
    for end in range(len(whole)):
        file.write_bytes(whole[:end])
        with pytest.raises(UnreadableWeights):
            read_onnx(file)


def test_onnx_with_numbers_elsewhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableWeights, match="dense is not stored in its raw form"):
        read_onnx(onnx(tmp_path, field(5, field(1, 2) + field(2, 1) + field(8, b"dense"))))


def as_in_magika(state: dict[str, Tensor], bias: Tensor) -> dict[str, Tensor]:
    """A content-type network's state as initialisers, with a bias that the embedding has in every row."""
    return {
        "get_logits_/Const:0": state["embedding.weight"] - bias,
        "MagikaV2/Dense_0/Reshape:0": bias.reshape(1, 1, 64),
        "MagikaV2/LayerNorm_0/Reshape_2:0": state["position_norm.weight"].reshape(1, 512, 1),
        "MagikaV2/LayerNorm_0/Reshape_3:0": state["position_norm.bias"].reshape(1, 512, 1),
        "MagikaV2/Conv_0/transpose_3:0": state["convolution.weight"].unsqueeze(3),
        "const_fold_opt__210": state["convolution.bias"].reshape(1, 512, 1),
        "const_fold_opt__212": torch.ones(1, 1, 1),
        "MagikaV2/LayerNorm_1/Reshape_2:0": state["norm.weight"].reshape(1, 512),
        "MagikaV2/LayerNorm_1/Reshape_3:0": state["norm.bias"].reshape(1, 512),
        "get_logits_/Const_24:0": state["types.weight"].T,
        "MagikaV2/Dense_1/Reshape:0": state["types.bias"].reshape(1, 9),
    }


def test_content_type_state_is_the_modules_own() -> None:
    state = shaken(content_type(9)).state_dict()
    bias = torch.linspace(-1, 1, 64)
    found = content_type_state(as_in_magika(state, bias))
    assert found.keys() == state.keys()
    for name, values in state.items():
        assert (
            torch.allclose(found[name], values, atol=1e-6)
            if name == "embedding.weight"
            else torch.equal(found[name], values)
        )


def test_missing_and_doubtful_weights_are_refused() -> None:
    tensors = as_in_magika(shaken(content_type(9)).state_dict(), torch.zeros(64))
    with pytest.raises(UnreadableWeights, match="2 weights are called 'Dense_1/Reshape'"):
        content_type_state({**tensors, "other/Dense_1/Reshape": torch.ones(1, 9)})
    del tensors["const_fold_opt__210"]
    with pytest.raises(UnreadableWeights, match="0 weights are called 'const_fold'"):
        content_type_state(tensors)
