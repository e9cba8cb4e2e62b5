"""Networks of one topology that do not correspond everywhere: other inputs, kernels, heads, parts kept separate."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mtz_core
from mtz_core import ZipConfig, ZippedNetwork, zip_networks
from mtz_core.errors import IncompatibleNetworks, InvalidConfig, UnsupportedModule
from tests.support.networks import Residual, mlp

pytestmark = pytest.mark.slow


def convolutional(channels: int = 1, kernel: int = 3, flat: int | None = None, groups: int = 1) -> nn.Module:
    """Two convolutions and two linear layers, behind global pooling or a flatten."""
    return nn.Sequential(
        nn.Conv2d(channels, 4, kernel),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, groups=groups),
        nn.ReLU(),
        *([nn.AdaptiveAvgPool2d(1)] if flat is None else []),
        nn.Flatten(),
        nn.Linear(6 * (flat or 1), 5),
        nn.ReLU(),
        nn.Linear(5, 3),
    ).eval()


def residual(channels: int = 1) -> nn.Module:
    network = Residual((5, 4, 6), 3)
    network.stem[0] = nn.Conv2d(channels, 5, 3, padding=1)
    return network.eval()


def zipped_of(
    networks: Mapping[str, nn.Module], shapes: Mapping[str, tuple[int, ...]], **settings: object
) -> ZippedNetwork:
    return zip_networks(networks, inputs(shapes), ZipConfig(patches=9, **settings))  # type: ignore[arg-type]


def inputs(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {task: torch.randn(20, *shape) for task, shape in shapes.items()}


def check(zipped: ZippedNetwork, shapes: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """It runs, is as large as it says, and survives the disk."""
    x = inputs(shapes)
    zipped.save(folder)
    again = mtz_core.load(folder)
    for task in zipped.tasks:
        expected = zipped(x[task], task)
        assert bool(torch.isfinite(expected).all())
        assert torch.equal(again(x[task], task), expected)
        torch.testing.assert_close(zipped.network(task)(x[task]), expected, rtol=1e-5, atol=1e-5)
    report = zipped.report
    assert report.stored_bytes == sum(t.numel() * t.element_size() for t in zipped.tensors().values())


def notes(zipped: ZippedNetwork) -> dict[str, str]:
    """The layers that could not be shared; nothing of them is."""
    found = {layer.layer: layer for layer in zipped.report.layers if layer.note}
    for layer in found.values():
        assert layer.shared == 0
        assert layer.parameters == sum(layer.original_parameters.values())
    return {name: layer.note for name, layer in found.items()}


def shared(zipped: ZippedNetwork) -> dict[str, int]:
    return {layer.layer: layer.shared for layer in zipped.report.layers}


PER_NEURON = "it has {} and {} values per neuron read in different networks"


def test_other_input_channels_keep_the_first_layer_separate(tmp_path: Path) -> None:
    shapes = {"grey": (1, 9, 8), "colour": (3, 9, 8)}
    zipped = zipped_of({"grey": convolutional(1), "colour": convolutional(3)}, shapes)
    assert notes(zipped) == {"0": PER_NEURON.format(9, 27)}
    assert shared(zipped) == {"0": 0, "2": 6, "6": 5, "8": 0}
    check(zipped, shapes, tmp_path)


def test_other_input_channels_of_a_residual_network(tmp_path: Path) -> None:
    """The stream's neurons are shared for the sake of the branches; the stem, which also writes them, is not."""
    shapes = {"grey": (1, 7, 6), "colour": (3, 7, 6)}
    zipped = zipped_of({"grey": residual(1), "colour": residual(3)}, shapes)
    check(zipped, shapes, tmp_path)
    assert notes(zipped) == {"stem.0": PER_NEURON.format(9, 27)}
    assert {name: count for name, count in shared(zipped).items() if name != "stem.0"} == {
        "branches.0.0": 4,
        "branches.0.3": 5,
        "branches.1.0": 6,
        "branches.1.3": 5,
        "head": 0,
    }


def test_other_numbers_of_inputs(tmp_path: Path) -> None:
    shapes = {"a": (12,), "b": (8,)}
    zipped = zipped_of({"a": mlp((9, 7), 3), "b": mlp((9, 7), 4, inputs=8)}, shapes)
    assert notes(zipped) == {"0": PER_NEURON.format(8, 12)}
    assert shared(zipped) == {"0": 0, "2": 7, "4": 0}
    check(zipped, shapes, tmp_path)


def test_other_image_sizes_with_global_pooling_share_everything(tmp_path: Path) -> None:
    shapes = {"small": (1, 7, 8), "large": (1, 12, 9)}
    zipped = zipped_of({"small": convolutional(), "large": convolutional()}, shapes)
    assert notes(zipped) == {}
    assert shared(zipped) == {"0": 4, "2": 6, "6": 5, "8": 0}
    check(zipped, shapes, tmp_path)
    zipped = zipped_of({"small": residual(), "large": residual()}, shapes)
    assert notes(zipped) == {}
    assert [layer.shared for layer in zipped.report.layers] == [5, 4, 5, 6, 5, 0]
    check(zipped, shapes, tmp_path)


def test_other_image_sizes_with_a_flatten_keep_the_layer_behind_it_separate(tmp_path: Path) -> None:
    shapes = {"small": (1, 7, 6), "large": (1, 8, 7)}
    zipped = zipped_of({"small": convolutional(flat=6), "large": convolutional(flat=12)}, shapes)
    assert notes(zipped) == {"5": PER_NEURON.format(6, 12)}
    assert shared(zipped) == {"0": 4, "2": 6, "5": 0, "7": 0}
    check(zipped, shapes, tmp_path)


def test_other_kernels_keep_the_layer_separate(tmp_path: Path) -> None:
    shapes = {"a": (1, 9, 9), "b": (1, 9, 9)}
    zipped = zipped_of({"a": convolutional(kernel=3), "b": convolutional(kernel=5)}, shapes)
    assert list(notes(zipped)) == ["0"]
    assert "kernels" in notes(zipped)["0"]
    assert shared(zipped) == {"0": 0, "2": 6, "6": 5, "8": 0}
    check(zipped, shapes, tmp_path)


def test_a_convolution_in_groups_beside_one_without_is_another_topology() -> None:
    message = r"a has neuron group '0' written by 0 and .* where b has neuron group '0' written by 0, 2 and"
    with pytest.raises(IncompatibleNetworks, match=message):
        zipped_of({"a": convolutional(groups=1), "b": convolutional(groups=2)}, {"a": (1, 9, 9), "b": (1, 9, 9)})


def test_other_numbers_of_groups_keep_the_layers_around_separate(tmp_path: Path) -> None:
    def grouped(groups: int) -> nn.Module:
        first, last = nn.Conv2d(1, 4, 3), nn.Linear(8, 3)
        middle = nn.Conv2d(4, 8, 3, groups=groups)
        return nn.Sequential(first, nn.ReLU(), middle, nn.AdaptiveAvgPool2d(1), nn.Flatten(), last).eval()

    shapes = {"a": (1, 9, 9), "b": (1, 9, 9)}
    zipped = zipped_of({"a": grouped(4), "b": grouped(2)}, shapes)
    assert "groups" in notes(zipped)["2"]
    assert set(shared(zipped).values()) == {0}
    check(zipped, shapes, tmp_path)


def test_the_odd_one_of_three_keeps_a_layer_separate_for_all(tmp_path: Path) -> None:
    shapes = {"a": (1, 9, 8), "b": (3, 9, 8), "c": (1, 9, 8)}
    zipped = zipped_of({task: convolutional(shape[0]) for task, shape in shapes.items()}, shapes)
    assert notes(zipped) == {"0": PER_NEURON.format(9, 27)}
    assert shared(zipped) == {"0": 0, "2": 6, "6": 5, "8": 0}
    check(zipped, shapes, tmp_path)
    data = inputs(shapes)
    before = {task: zipped(x, task) for task, x in data.items()}
    for odd in shapes:
        left = zipped.without(odd)
        assert all(torch.equal(left(data[task], task), before[task]) for task in left.tasks)


@pytest.mark.parametrize("paths", [["2"], ["0", "6"]])
def test_what_is_kept_separate_stays_the_originals(paths: list[str], tmp_path: Path) -> None:
    shapes = {"a": (1, 9, 8), "b": (1, 9, 8)}
    networks = {"a": convolutional(), "b": convolutional()}
    zipped = zipped_of(networks, shapes, keep_separate=paths)
    assert list(notes(zipped)) == paths
    assert all("keep_separate" in note for note in notes(zipped).values())
    check(zipped, shapes, tmp_path)
    if "0" in paths:
        for task, network in networks.items():
            assert torch.equal(zipped.network(task).get_parameter("0.weight"), network.get_parameter("0.weight"))


def test_keep_separate_names_a_submodule() -> None:
    with pytest.raises(UnsupportedModule, match=r"no submodule 'nope'"):
        zipped_of({"a": mlp((9,), 3), "b": mlp((9,), 3)}, {"a": (12,), "b": (12,)}, keep_separate=["nope"])


def test_counts_for_layers_that_cannot_be_shared_are_refused() -> None:
    networks, shapes = {"a": mlp((9, 7), 3), "b": mlp((9, 7), 3, inputs=8)}, {"a": (12,), "b": (8,)}
    with pytest.raises(InvalidConfig, match=r"share\.0: impossible, as no layer that writes these neurons can be"):
        zipped_of(networks, shapes, share={"0": 3})
    assert shared(zipped_of(networks, shapes, share={"0": 0, "2": 3})) == {"0": 0, "2": 3, "4": 0}
