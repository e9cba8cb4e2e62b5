"""The real networks compute what their packages do, can be zipped, and are those of the fleet."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

import mtz_core as mtz
from examples.real.networks import ContentType, SeparableConvolution, content_type, face, landmark_error
from flows.spec.fleet_file import read_fleet
from tasks.models.factories import build_network
from tasks.models.metrics import find_metrics


def test_padding_is_that_of_tensorflow() -> None:
    """Of even sizes, `same` pads at the end alone."""
    torch.manual_seed(0)
    part, x = SeparableConvolution(2, 3, stride=2), torch.randn(1, 2, 6, 6)
    windows = functional.pad(x, (0, 1, 0, 1)).unfold(2, 3, 2).unfold(3, 3, 2)
    expected = part.pointwise(torch.einsum("nchwij,cij->nchw", windows, part.depthwise.weight[:, 0]))
    assert torch.allclose(part(x), expected, atol=1e-6)


def test_content_types_are_told_as_magika_does() -> None:
    """Against the formula, with one-hot bytes and the variance as a difference of means."""
    torch.manual_seed(0)
    network, tokens = ContentType(5).eval(), torch.randint(257, (3, 2048)).float()
    one_hot = functional.one_hot(tokens.long(), 257).float()
    h = functional.gelu(one_hot @ network.embedding.weight, approximate="tanh").reshape(3, 512, 256)
    mean, square = h.mean(1, keepdim=True), h.square().mean(1, keepdim=True)
    h = (h - mean) / (square - mean**2 + 1e-6).sqrt()
    h = functional.gelu(network.convolution(h.transpose(1, 2)), approximate="tanh").amax(2)
    expected = network.types(functional.layer_norm(h, (512,), eps=1e-6))
    with torch.no_grad():
        assert torch.allclose(network(tokens), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("network", "example"),
    [(face(7), torch.rand(1, 3, 112, 112)), (content_type(5), torch.randint(257, (1, 2048)).float())],
    ids=["face", "content type"],
)
def test_they_can_be_zipped(network: nn.Module, example: torch.Tensor) -> None:
    mtz.trace(network.eval(), example)


def test_landmark_error_is_in_pixels() -> None:
    truth = torch.rand(4, 136)
    moved = truth.reshape(4, 68, 2) + torch.tensor([3, 4]) / 112
    assert landmark_error(moved.reshape(4, 136), truth) == pytest.approx(5, abs=1e-3)


def test_the_fleet_can_be_built() -> None:
    fleet = read_fleet(Path("params.yaml"), Path("examples/real/fleet.yaml"))
    groups = {plan.name: plan.params for plan in fleet.explicit_groups()}
    assert {name: list(params.models) for name, params in groups.items()} == {
        "faces": ["expression", "landmarks"],
        "files": ["magika-3-2", "magika-3-3"],
    }
    for params in groups.values():
        assert params.match.budget is not None
        for model in params.models:
            build_network(params, model)
            (_, metric), *_ = find_metrics(params, model, (), None).values()
            assert metric.reads == "outputs"
