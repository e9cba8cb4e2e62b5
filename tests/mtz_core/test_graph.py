"""Tracing: what is understood runs as the module does, what is not is refused by name."""

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtz_core.errors import InvalidCalibration, InvalidWeights, UnsupportedModule
from mtz_core.graph import INPUT, build_module, run_node, trace
from mtz_core.layers import from_matrix
from tests.mtz_core.networks import CASES, Case, Functional, hidden_layers, mlp


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_traced_network_runs_as_the_module_does(case: Case) -> None:
    module, x = case.network(1), case.examples(5)
    network = trace(module, x)
    value = x.clone()
    for node in network.graph.nodes:
        weights = from_matrix(network.weights[node.name], node.bias) if node.is_layer else (None, None)
        value = run_node(node, value, *weights)
    assert torch.equal(value, module(x))
    assert network.input_shape == case.input_shape
    assert network.parameters == sum(p.numel() for p in module.parameters())
    assert network.bytes == network.parameters * x.element_size()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_groups_form_a_chain_of_layers(case: Case) -> None:
    graph = trace(case.network(1), case.examples(5)).graph
    layers = [layer.name for layer in graph.layers]
    assert layers[:-1] == hidden_layers(case)
    assert [group.name for group in graph.groups] == [INPUT, *layers]
    assert [group.name for group in graph.hidden_groups] == layers[:-1]
    for before, after in itertools.pairwise(layers):
        assert graph.read_by(after) == graph.written_by(before)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_widths_and_columns(case: Case) -> None:
    module = case.network(1)
    network = trace(module, case.examples(5))
    width = case.input_shape[0]
    for node in network.graph.layers:
        layer = module.get_submodule(node.name)
        assert isinstance(layer, (nn.Linear, nn.Conv2d))
        assert network.width(network.graph.read_by(node.name)) == width
        assert network.columns_per_neuron(node) == layer.weight[0].numel() // width
        width = layer.weight.shape[0]
        assert network.width(network.graph.written_by(node.name)) == width


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_plain_module_is_built_again(case: Case, training: bool) -> None:
    module, x = case.network(1).train(training), case.examples(5)
    network = trace(module, x)
    again = build_module(network.graph, network.weights).train(training)
    assert {name: tuple(value.shape) for name, value in again.state_dict().items()} == {
        name: tuple(value.shape) for name, value in module.state_dict().items()
    }
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in again.state_dict().items())
    torch.manual_seed(4)
    expected = module(x.clone())
    torch.manual_seed(4)
    assert torch.equal(again(x.clone()), expected)
    assert {p.data_ptr() for p in again.parameters()}.isdisjoint({p.data_ptr() for p in module.parameters()})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_number_of_examples_makes_no_difference(case: Case) -> None:
    module = case.network(1)
    assert trace(module, case.examples(1)).graph == trace(module, case.examples(3)).graph


def test_tracing_changes_nothing() -> None:
    module = Functional((4, 8), 3)
    module.hidden.eval()
    module.train()
    module.conv.eval()
    module.conv.weight.requires_grad_(False)
    state = copy.deepcopy(module.state_dict())
    modes = [part.training for part in module.modules()]
    x = torch.randn(3, 1, 8, 8)
    before = x.clone()
    trace(module, x)
    assert modes == [part.training for part in module.modules()]
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert torch.equal(x, before)
    assert not module.conv.weight.requires_grad
    assert all(p.grad is None for p in module.parameters())


def test_modes_are_put_back_after_a_refusal() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).train()
    with pytest.raises(UnsupportedModule):
        trace(module, torch.randn(3, 4))
    assert all(part.training for part in module.modules())


class Written(nn.Module):
    """A network of two layers whose forward pass is given."""

    def __init__(self, run: Callable[["Written", Tensor], object], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = run

    def forward(self, x: Tensor) -> object:
        return self.run(self, x)


def attention() -> nn.Module:
    return Written(lambda m, x: m.second(torch.softmax(m.first(x), 1)))


def tied() -> nn.Module:
    module = Written(lambda m, x: m.second(torch.relu(m.first(x))))
    module.second.weight = module.first.weight
    return module


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "residual": (Written(lambda m, x: m.second(x + m.first(x))), r"aten\.add"),
    "residual behind": (Written(lambda m, x: m.second(h := torch.relu(m.first(x))) + h), r"aten\.add"),
    "concatenation": (Written(lambda m, x: torch.cat([m.first(x), m.second(x)], 1)), r"does not read the one value"),
    "scaled": (Written(lambda m, x: m.second(m.first(x) * 2)), r"aten\.mul.*does not know"),
    "batch norm": (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), r"'1' \(BatchNorm1d\).*batch_norm"),
    "layer norm": (nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.LayerNorm(4))), r"'1\.0' \(LayerNorm\).*layer_norm"),
    "prelu": (nn.Sequential(nn.Linear(4, 4), nn.PReLU()), r"'1' \(PReLU\).*prelu"),
    "hidden softmax": (attention(), r"softmax mixes the neurons of a hidden layer"),
    "shared submodule": (Written(lambda m, x: m.second(m.first(m.first(x)))), r"'first\.\w+' is used by several"),
    "tied weights": (tied(), r"ties one parameter to several layers.*untie"),
    "unused layer": (Written(lambda m, x: m.first(x)), r"'second\.\w+' is never used"),
    "unused parameter": (
        Written(lambda m, x: m.second(m.first(x)), scale=nn.Parameter(torch.ones(1))),
        r"'scale' is never used",
    ),
    "half": (nn.Linear(4, 4).half(), r"'weight' has dtype torch\.float16.*\.float\(\)"),
    "bfloat16": (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).bfloat16()), r"'1\.weight' has dtype torch\.bfloat16"),
    "data-dependent": (
        Written(lambda m, x: m.second(m.first(x)) if x.sum() > 0 else m.second(x)),
        r"Written cannot be exported.*depends on data",
    ),
    "computed weights": (Written(lambda m, x: m.second(F.linear(x, m.first.weight * 2))), r"aten\.mul"),
    "transposed weights": (Written(lambda m, x: m.second(F.linear(x, m.first.weight.t()))), r"aten\.t\b"),
    "two outputs": (Written(lambda m, x: (m.first(x), m.second(x))), r"cannot be zipped|does not return"),
    "dictionary": (Written(lambda m, x: {"y": m.second(m.first(x)), "x": 1}), r"does not return the one tensor"),
    "an earlier value": (Written(lambda m, x: (h := m.first(x), m.second(h))[0]), r"does not return the one tensor"),
    "no layer": (nn.ReLU(), r"ReLU has no layer with weights"),
    "other dtype": (
        Written(lambda m, x: F.softmax(m.second(m.first(x)), 1, dtype=torch.float64)),
        r"changes the dtype",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_zipping_cannot_follow_is_refused(name: str) -> None:
    module, message = REFUSED[name]
    with pytest.raises(UnsupportedModule, match=message):
        trace(module, torch.randn(3, 4))


IMAGES_REFUSED: dict[str, tuple[nn.Module, str]] = {
    "grouped": (nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=2)), r"'1' \(Conv2d\).*grouped.*2 groups"),
    "depthwise": (nn.Conv2d(2, 2, 3, groups=2), r"\(Conv2d\).*grouped convolution"),
    "one-sided padding": (nn.Conv2d(2, 2, 2, padding="same"), r"wider on one side"),
    "circular padding": (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), r"aten\.pad"),
    "transposed convolution": (nn.ConvTranspose2d(2, 2, 3), r"conv_transpose2d"),
    "linear on positions": (nn.Sequential(nn.Linear(6, 4)), r"'0' \(Linear\).*not \[batch, features\]"),
    "half a flatten": (nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(2)), r"'1' \(Flatten\).*reshapes"),
    "pixel shuffle": (nn.Sequential(nn.Conv2d(2, 4, 3), nn.PixelShuffle(2)), r"'1' \(PixelShuffle\)"),
}


@pytest.mark.parametrize("name", IMAGES_REFUSED)
def test_what_zipping_cannot_follow_in_images_is_refused(name: str) -> None:
    module, message = IMAGES_REFUSED[name]
    with pytest.raises(UnsupportedModule, match=message):
        trace(module, torch.randn(3, 2, 6, 6))


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Linear(4, 4), nn.AdaptiveMaxPool1d(2, return_indices=True)),
        Written(lambda m, x: m.second(torch.cat(list(m.first(x).chunk(2, 1)), 1))),
    ],
    ids=["pooling with indices", "chunks"],
)
def test_operations_with_several_outputs_are_refused(module: nn.Module) -> None:
    with pytest.raises(UnsupportedModule):
        trace(module, torch.randn(3, 4))


def test_a_refusal_tells_what_is_supported_and_what_to_do() -> None:
    with pytest.raises(
        UnsupportedModule, match=r"Supported are chains of linear, conv2d, .*relu.*layers\.py.*leave"
    ) as e:
        trace(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), torch.randn(3, 4))
    assert "BatchNorm1d" in str(e.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["2.weight", "4.bias"])
def test_weights_that_are_not_finite_are_refused_by_name(name: str, value: float) -> None:
    module = mlp((9, 7), 3)
    with torch.no_grad():
        module.get_parameter(name).view(-1)[1] = value
    with pytest.raises(InvalidWeights, match=rf"'{name}' has NaN or infinite"):
        trace(module, torch.randn(3, 12))


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (torch.randn(3, 11), r"Sequential does not accept an input of shape \[2, 11\]"),
        (torch.randn(3, 12, dtype=torch.float64), r"torch\.float64"),
        (torch.randn(3, 1, 4, 4), r"\[2, 1, 4, 4\].*calibration data"),
    ],
)
def test_an_input_that_does_not_fit_is_refused(example: Tensor, message: str) -> None:
    with pytest.raises(InvalidCalibration, match=message):
        trace(mlp((9, 7), 3), example)


class Layers(nn.Module):
    """Two linear layers with the given names."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        self.names = first, second
        self.add_module(first, nn.Linear(4, 6))
        self.add_module(second, nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.get_submodule(name) for name in self.names)
        out: Tensor = second(torch.relu(first(x)))
        return out


@pytest.mark.parametrize("name", ["input", "relu_1"])
def test_names_of_layers_do_not_collide_with_other_names(name: str) -> None:
    graph = trace(Layers(name, "last"), torch.randn(3, 4)).graph
    assert len({group.name for group in graph.groups}) == 3
    graph = trace(Layers("first", name), torch.randn(3, 4)).graph
    assert len({node.name for node in graph.nodes}) == 3


@pytest.mark.parametrize("name", ["code", "graph"])
def test_names_that_modules_of_torch_use_themselves_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModule, match=f"'{name}' is a name that modules of torch use themselves; rename"):
        trace(Layers(name, "last"), torch.randn(3, 4))


def test_a_bare_layer_gets_the_name_of_its_kind() -> None:
    module = nn.Linear(4, 3)
    network = trace(module, torch.randn(3, 4))
    assert list(build_module(network.graph, network.weights).state_dict()) == ["linear.weight", "linear.bias"]


def test_dropout_that_is_always_on_is_refused() -> None:
    with pytest.raises(UnsupportedModule, match="dropout"):
        trace(Written(lambda m, x: m.second(F.dropout(m.first(x)))), torch.randn(3, 4))


def test_spelling_makes_no_difference() -> None:
    spelled = nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2))

    class Function(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return F.max_pool2d(self[0](x), 2)

    x = torch.randn(2, 1, 8, 8)
    assert trace(spelled, x).graph == trace(Function(nn.Conv2d(1, 2, 3)), x).graph


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4, 3)), (5, 5)),
        (nn.Sequential(nn.Conv2d(2, 3, 3)), (6, 6)),
    ],
    ids=["pooled images without channels", "images without channels as a batch"],
)
def test_images_without_channels_are_followed_or_refused(module: nn.Module, shape: tuple[int, ...]) -> None:
    try:
        network = trace(module, torch.randn(3, *shape))
    except (UnsupportedModule, InvalidCalibration):
        return
    for node in network.graph.layers:
        columns = network.weights[node.name].shape[1] - node.bias
        assert network.columns_per_neuron(node) * network.width(network.graph.read_by(node.name)) == columns
    assert len(network.input_shape) > 2
