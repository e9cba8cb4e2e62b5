"""Tracing: what is understood runs as the module does, what is not is refused by name; never silently wrong."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtz_core.errors import InvalidCalibration, InvalidWeights, UnsupportedModule
from mtz_core.graph import INPUT, LayerGraph, Network, run
from mtz_core.tracing import evaluation_mode, trace
from tests.mtz_core.networks import CASES, Case, Functional, hidden_layers, mlp


def assert_runs_as(module: nn.Module, network: Network, shape: tuple[int, ...], scale: float = 1.0) -> None:
    """The traced network computes what the module does in evaluation mode, for batches of other sizes too."""
    for count in (1, 2, 5):
        x = scale * torch.randn(count, *shape, dtype=network.input_dtype)
        with evaluation_mode(module):
            expected = module(x.clone())
        torch.testing.assert_close(run(network.graph, network.state, x), expected)


def assert_same(a: LayerGraph, b: LayerGraph) -> None:
    assert (a.nodes, a.output, a.groups, a.widths) == (b.nodes, b.output, b.groups, b.widths)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_traced_network_runs_as_the_module_does(case: Case) -> None:
    module, x = case.network(1), case.examples(5)
    network = trace(module, x)
    assert torch.equal(run(network.graph, network.state, x), module(x.clone()))
    assert [layer.name for layer in network.graph.layers][:-1] == hidden_layers(case)
    assert (network.input_shape, network.input_dtype) == (case.input_shape, case.dtype)
    assert network.trainable == dict(module.named_parameters()).keys() == network.state.keys()
    assert network.parameters == sum(p.numel() for p in module.parameters())
    assert network.bytes == network.parameters * x.element_size()


@pytest.mark.parametrize("case", CASES[6:10], ids=lambda case: case.name)
def test_the_number_of_examples_makes_no_difference(case: Case) -> None:
    module = case.network(1)
    assert_same(trace(module, case.examples(1)).graph, trace(module, case.examples(7)).graph)


def test_tracing_changes_nothing() -> None:
    module = Functional((4, 8), 3)
    module.hidden.eval()
    module.train()
    module.conv.eval()
    module.conv.weight.requires_grad_(False)
    state = copy.deepcopy(module.state_dict())
    modes = [part.training for part in module.modules()]
    x = torch.randn(3, 1, 8, 8)
    before, generator = x.clone(), torch.get_rng_state()
    trace(module, x)
    assert modes == [part.training for part in module.modules()]
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), generator)
    assert not module.conv.weight.requires_grad
    assert all(p.grad is None for p in module.parameters())
    assert torch.backends.mha.get_fastpath_enabled()


def test_statistics_do_not_learn_from_being_traced() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).train()
    state = copy.deepcopy(module.state_dict())
    trace(module, torch.randn(3, 4))
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


class Written(nn.Module):
    """A network of two layers whose forward pass is given; further parts are submodules, parameters or buffers."""

    def __init__(self, run: Callable[[Any, Tensor], object], **parts: Any) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.run = run

    def forward(self, x: Tensor) -> object:
        return self.run(self, x)


def test_modes_are_put_back_after_a_refusal() -> None:
    module = Written(lambda m, x: m.second(m.first(x).cumsum(1))).train()
    with pytest.raises(UnsupportedModule):
        trace(module, torch.randn(3, 4))
    assert all(part.training for part in module.modules())


def quantised() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)), {nn.Linear}, dtype=torch.qint8
    )


def weight_norm() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 3))


def all_tied() -> nn.Module:
    module = Written(lambda m, x: m.second(torch.relu(m.first(x))))
    module.second.weight, module.second.bias = module.first.weight, module.first.bias
    return module


def parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=value.is_floating_point() or value.is_complex())


REMEDIES = r"Register what it does to neurons \(mtz_core\.register_operation\).*keep_separate"

REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    # control flow
    "data-dependent": (
        lambda: Written(lambda m, x: m.second(m.first(x)) if x.sum() > 0 else m.second(x)),
        r"Written cannot be exported.*depends on data",
    ),
    "other operators for other batches": (
        lambda: Written(lambda m, x: m.second(torch.relu(m.first(x)) if len(x) > 2 else m.first(x))),
        r"Written runs other operators for 2 examples than for 3.*independent of the size of the batch",
    ),
    "a factor that depends on the batch": (
        lambda: Written(lambda m, x: m.second(m.first(x)) * (1.0 / len(x))),
        r"mul\.Tensor.*computes with the size of the batch",
    ),
    "random values": (
        lambda: Written(lambda m, x: m.second(m.first(x) + torch.randn(4))),
        r"does not compute what the module does",
    ),
    "dropout that is always on": (
        lambda: Written(lambda m, x: m.second(F.dropout(m.first(x)))),
        r"does not compute what the module does",
    ),
    # parameters
    "unused layer": (lambda: Written(lambda m, x: m.first(x)), r"'second\.\w+' is never used"),
    "unused parameter": (
        lambda: Written(lambda m, x: m.second(m.first(x)), scale=nn.Parameter(torch.ones(1))),
        r"'scale' is never used when the network runs\. Remove it",
    ),
    "half": (lambda: nn.Linear(4, 4).half(), r"'weight' has dtype torch\.float16.*\.float\(\)"),
    "bfloat16": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).bfloat16()),
        r"'1\.weight' has dtype torch\.bfloat16",
    ),
    "complex": (
        lambda: Written(lambda m, x: m.second(m.first(x)) * m.k.real, k=parameter(torch.tensor([2 + 1j]))),
        r"'k' has dtype torch\.complex64",
    ),
    "integer": (
        lambda: Written(lambda m, x: m.second(m.first(x)) * m.k, k=parameter(torch.tensor([2]))),
        r"'k' has dtype torch\.int64",
    ),
    "quantised": (quantised, r"Sequential cannot be exported|dtype"),
    "lazy": (
        lambda: nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3)),
        r"'0\.weight' has no shape yet.*Run the network",
    ),
    "meta": (lambda: nn.Linear(4, 4, device="meta"), r"'weight' has no values.*meta device"),
    "several devices": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta")),
        r"'1\.weight' has no values|several devices",
    ),
    "weight norm": (weight_norm, rf"'0\.parametrizations\.weight\.0'.*_weight_norm.*{REMEDIES}"),
    "computed weights": (
        lambda: Written(lambda m, x: m.second(F.linear(x, m.first.weight * 2, m.first.bias))),
        r"operator linear cannot be zipped: its weights are computed",
    ),
    # outputs
    "two outputs": (lambda: Written(lambda m, x: (m.first(x), m.second(x))), r"does not return one tensor but tuple"),
    "dictionary": (lambda: Written(lambda m, x: {"y": m.second(m.first(x))}), r"does not return one tensor but dict"),
    "nothing to share": (nn.ReLU, r"ReLU has no layer with weights"),
    "everything tied": (all_tied, r"Written has no layer with weights to share"),
    # operators
    "cumulative sum over channels": (
        lambda: nn.Sequential(nn.Linear(4, 4), Apply(lambda x: x.cumsum(1)), nn.Linear(4, 3)),
        rf"'1'.*operator cumsum cannot be zipped.*{REMEDIES}",
    ),
    "linear algebra": (
        lambda: Written(lambda m, x: m.second(torch.linalg.qr(m.first(x).view(-1, 2, 2))[0].flatten(1))),
        rf"'the network itself'.*operator linalg_qr cannot be zipped.*{REMEDIES}",
    ),
    "sorted": (lambda: Written(lambda m, x: m.second(m.first(x).sort(1).values)), rf"operator sort .*{REMEDIES}"),
    "recurrent": (
        lambda: Written(lambda m, x: m.second(m.rnn(m.first(x)[:, None])[0][:, 0]), rnn=nn.GRU(4, 4, batch_first=True)),
        rf"'rnn'.*operator gru.*{REMEDIES}",
    ),
    "neurons that meet the batch": (
        lambda: Written(lambda m, x: m.second(m.first(x).t().reshape(x.shape))),
        r"neurons of group 'first' are not interchangeable.*keep_separate",
    ),
    "statistics of the batch": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)),
        r"'1'.*batch_norm",
    ),
    # writing in place
    "writing into a buffer": (
        lambda: Written(lambda m, x: m.second(m.first(x) + m.seen.add_(1)), seen=torch.zeros(4)),
        r"add_.*changes a tensor in place",
    ),
    "counting calls": (
        lambda: Written(lambda m, x: (m.seen.add_(1), m.second(m.first(x)))[1], seen=torch.zeros(())),
        r"add_.*changes a tensor in place",
    ),
    "writing into an output argument": (
        lambda: Written(lambda m, x: m.second(torch.add(h := m.first(x), 1, out=h))),
        r"add\.out.*changes a tensor in place",
    ),
}


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_what_zipping_cannot_follow_is_refused(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(UnsupportedModule, match=message):
        trace(make(), torch.randn(3, 4))


def tied() -> nn.Module:
    module = Written(lambda m, x: m.last(m.second(torch.relu(m.first(x)))), last=nn.Linear(4, 3))
    module.second.weight = module.first.weight
    return module


FOLLOWED: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    # a network, and the layers that zipping finds in it
    "residual": (lambda: Written(lambda m, x: m.second(x + m.first(x))), ["first", "second"]),
    "residual behind": (lambda: Written(lambda m, x: m.second(h := m.first(x).relu()) + h), ["first", "second"]),
    "concatenation": (lambda: Written(lambda m, x: torch.cat([m.first(x), m.second(x)], 1)), ["first", "second"]),
    "chunks": (
        lambda: Written(lambda m, x: m.second(torch.cat(m.first(x).chunk(2, 1), 1))),
        ["first", "second"],
    ),
    "scaled": (lambda: Written(lambda m, x: m.second(m.first(x) * 2)), ["first", "second"]),
    "hidden softmax": (lambda: Written(lambda m, x: m.second(torch.softmax(m.first(x), 1))), ["first", "second"]),
    "other dtype": (
        lambda: Written(lambda m, x: F.softmax(m.second(m.first(x)), 1, dtype=torch.float64)),
        ["first", "second"],
    ),
    "batch norm": (lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)), ["0", "2"]),
    "layer norm": (lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)), ["0", "2"]),
    "prelu": (lambda: nn.Sequential(nn.Linear(4, 5), nn.PReLU(5), nn.Linear(5, 3)), ["0", "2"]),
    "shared submodule": (
        lambda: Written(lambda m, x: m.second(torch.relu(m.first(torch.relu(m.first(x)))))),
        ["second"],
    ),
    "tied weights": (tied, ["last"]),
    "a weight that is also read elsewhere": (
        lambda: Written(lambda m, x: m.second(m.first(x)) + m.first.weight.mean()),
        ["second"],
    ),
    "a product with a parameter": (
        lambda: Written(
            lambda m, x: m.second(x @ m.matrix), matrix=nn.Parameter(torch.randn(4, 4)), first=nn.Identity()
        ),
        ["second"],
    ),
    "addmm": (
        lambda: Written(lambda m, x: m.second(torch.addmm(m.first.bias, x, m.first.weight))),
        ["first", "second"],
    ),
    "an extra layer at the end": (lambda: Written(lambda m, x: m.second(m.first(x)) + len(x)), ["first", "second"]),
    "folded constants": (
        lambda: Written(lambda m, x: m.second(m.first(x) * torch.arange(4).float().softmax(0))),
        ["first", "second"],
    ),
    "a mask": (
        lambda: Written(lambda m, x: m.second(m.first(x) * m.mask), mask=torch.tensor([1.0, 0, 2, 0])),
        ["first", "second"],
    ),
    "a bare layer": (lambda: nn.Linear(4, 3), ["linear"]),
    "a squeeze": (
        lambda: Written(lambda m, x: m.second(m.first(x[:, :, None].transpose(1, 2)).squeeze())),
        ["first", "second"],
    ),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_zipping_follows_runs_as_the_module(name: str) -> None:
    make, layers = FOLLOWED[name]
    module = make()
    network = trace(module, torch.randn(3, 4))
    assert [layer.name for layer in network.graph.layers] == layers
    assert_runs_as(module, network, (4,))


IMAGES: dict[str, Callable[[], nn.Module]] = {
    "one-sided padding": lambda: nn.Sequential(nn.Conv2d(2, 4, 2, padding="same"), nn.Conv2d(4, 3, 3)),
    "zero padding": lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ZeroPad2d((1, 0, 2, 0)), nn.Conv2d(4, 3, 3)),
    "grouped": lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(6, 3, 1)),
    "depthwise": lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 3, 1)),
    "depthwise first": lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Conv2d(4, 3, 1)),
    "transposed": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ConvTranspose2d(4, 5, 3, 2, 1, output_padding=1), nn.ReLU(), nn.Conv2d(5, 3, 1)
    ),
    "linear on positions": lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)),
    "half a flatten": lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(2), nn.Linear(16, 3)),
    "pixel shuffle": lambda: nn.Sequential(nn.Conv2d(2, 8, 3), nn.PixelShuffle(2), nn.Conv2d(2, 3, 1)),
    "channel shuffle": lambda: nn.Sequential(nn.Conv2d(2, 6, 3), nn.ChannelShuffle(2), nn.Conv2d(6, 3, 1)),
    "group norm": lambda: nn.Sequential(nn.Conv2d(2, 6, 3), nn.GroupNorm(3, 6), nn.Conv2d(6, 3, 1)),
    "softmax over channels": lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Softmax2d(), nn.Conv2d(4, 3, 1)),
    "global pooling and squeeze": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.AdaptiveAvgPool2d(1), Apply(lambda x: x.squeeze()), nn.Linear(4, 3)
    ),
}


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_images_are_followed_as_the_module_does(name: str) -> None:
    module = IMAGES[name]()
    shape = (2, 6, 6)
    network = trace(module, torch.randn(3, *shape))
    for count in (2, 5):
        x = torch.randn(count, *shape)
        torch.testing.assert_close(run(network.graph, network.state, x), module(x))


def in_place(write: Callable[[Tensor], object]) -> Callable[[], nn.Module]:
    """Something is written into what the first layer puts out, and the second layer reads that."""

    def forward(module: Written, x: Tensor) -> Tensor:
        hidden = module.first(x)
        write(hidden)
        out: Tensor = module.second(hidden)
        return out

    return lambda: Written(forward)


def write_first(h: Tensor) -> None:
    h[:, 0] = 0


def write_positive(h: Tensor) -> None:
    h[h < 0] = 0


def write_indexed(h: Tensor) -> None:
    h[:, [0, 2]] = 1.0


def write_from_itself(h: Tensor) -> None:
    h[:, :2] = h[:, 2:]


def add_to_a_part(h: Tensor) -> None:
    part = h[:, :2]
    part += 1


def read_an_old_view(m: Written, x: Tensor) -> Tensor:
    hidden = m.first(x)
    view = hidden[:, :2]
    hidden.relu_()
    out: Tensor = m.second(hidden) + view.sum(1, keepdim=True)
    return out


def read_an_old_alias(m: Written, x: Tensor) -> Tensor:
    hidden = m.first(x)
    other = hidden.view(hidden.shape).transpose(0, 1)
    hidden.mul_(2)
    out: Tensor = m.second(other.transpose(0, 1))
    return out


def write_through_a_transpose(m: Written, x: Tensor) -> Tensor:
    view = m.first(x).t()
    view.mul_(2)
    out: Tensor = m.second(view.t())
    return out


def write_into_new_zeros(m: Written, x: Tensor) -> Tensor:
    hidden = torch.zeros(len(x), 4)
    hidden[:, :2] = m.first(x)[:, :2]
    out: Tensor = m.second(hidden)
    return out


def add_in_place(m: Written, x: Tensor) -> Tensor:
    hidden = m.first(x)
    same = hidden
    hidden += x
    out: Tensor = m.second(same)
    return out


def write_into_the_input(m: Written, x: Tensor) -> Tensor:
    x.relu_()
    out: Tensor = m.second(m.first(x))
    return out


def write_into_a_view_of_the_input(m: Written, x: Tensor) -> Tensor:
    x.view(-1, 2, 2).relu_()
    out: Tensor = m.second(m.first(x))
    return out


def write_between_readers(m: Written, x: Tensor) -> Tensor:
    hidden = m.first(x)
    before = m.second(hidden)
    hidden.clamp_(-0.1, 0.1)
    out: Tensor = before + m.second(hidden)
    return out


def write_into_an_alias_of_dropout(m: Written, x: Tensor) -> Tensor:
    hidden = m.first(x)
    F.dropout(hidden, 0.5, m.training).clamp_(-6, 6)
    out: Tensor = m.second(hidden)
    return out


FOLLOWED_IN_PLACE: dict[str, Callable[[], nn.Module]] = {
    "relu": in_place(lambda h: h.relu_()),
    "scaled": in_place(lambda h: h.mul_(2)),
    "clamp": in_place(lambda h: h.clamp_(-0.1, 0.1)),
    "added in place": lambda: Written(add_in_place),
    "into the input": lambda: Written(write_into_the_input),
    "between readers": lambda: Written(write_between_readers),
    "through a transpose": lambda: Written(write_through_a_transpose),
}

WRITTEN_IN_PLACE = FOLLOWED_IN_PLACE | {
    "one neuron": in_place(write_first),
    "where negative": in_place(write_positive),
    "indexed": in_place(write_indexed),
    "from itself": in_place(write_from_itself),
    "a part": in_place(add_to_a_part),
    "a view": in_place(lambda h: h.view(-1, 2, 2).relu_()),
    "a reshape": in_place(lambda h: h.reshape(-1, 2, 2).relu_()),
    "a chunk": in_place(lambda h: h.chunk(2, 1)[0].relu_()),
    "one of all": in_place(lambda h: h.unbind(1)[0].relu_()),
    "detached": in_place(lambda h: h.detach().relu_()),
    "zeroed": in_place(lambda h: h.zero_()),
    "filled": in_place(lambda h: h.fill_(2.0)),
    "an old view": lambda: Written(read_an_old_view),
    "an old alias": lambda: Written(read_an_old_alias),
    "new zeros": lambda: Written(write_into_new_zeros),
    "a view of the input": lambda: Written(write_into_a_view_of_the_input),
}


@pytest.mark.parametrize("name", WRITTEN_IN_PLACE)
def test_writing_in_place_is_followed_or_refused(name: str) -> None:
    module = WRITTEN_IN_PLACE[name]().eval()
    try:
        network = trace(module, torch.randn(3, 4))
    except UnsupportedModule:
        assert name not in FOLLOWED_IN_PLACE
        return
    assert_runs_as(module, network, (4,), scale=30.0)


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
        (torch.randn(3, 11), r"Sequential does not accept an input of shape \[3, 11\]"),
        (torch.randn(3, 12, dtype=torch.float64), r"torch\.float64"),
        (torch.randn(3, 1, 4, 4), r"\[3, 1, 4, 4\].*calibration data"),
        (torch.randn(3), r"no features"),
    ],
)
def test_an_input_that_does_not_fit_is_refused(example: Tensor, message: str) -> None:
    with pytest.raises(InvalidCalibration, match=message):
        trace(mlp((9, 7), 3), example)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(UnsupportedModule, match=r"is not a torch\.nn\.Module"):
        trace(torch.relu, torch.randn(3, 4))  # type: ignore[arg-type]


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


@pytest.mark.parametrize("name", ["input", "relu", "relu_1", "linear", "x", "weight", "0", "class"])
def test_layers_are_called_by_their_path_whatever_it_is(name: str) -> None:
    for names in ((name, "last"), ("first", name)):
        graph = trace(Layers(*names), torch.randn(3, 4)).graph
        assert tuple(layer.name for layer in graph.layers) == names
        assert [group.name for group in graph.groups] == [INPUT, *names]
        assert len({node.name for node in graph.nodes}) == 3


def test_spelling_makes_no_difference() -> None:
    spelled = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AvgPool2d(2, 2), nn.ReLU())

    class Function(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return F.avg_pool2d(self[0](x), 2, 2).relu_()

    x = torch.randn(2, 1, 8, 8)
    plain, function = trace(spelled, x).graph, trace(Function(nn.Conv2d(1, 2, 3)), x).graph
    assert [(n.kind, dict(n.arguments)) for n in plain.nodes] == [(n.kind, dict(n.arguments)) for n in function.nodes]


def test_tied_weights_and_shared_submodules_are_stored_once() -> None:
    network = trace(tied(), torch.randn(3, 4))
    assert network.trainable == {"first.weight", "first.bias", "second.bias", "last.weight", "last.bias"}
    network = trace(FOLLOWED["shared submodule"][0](), torch.randn(3, 4))
    assert network.parameters == 2 * (16 + 4)


class Positions(nn.Module):
    """Tokens and their places; the table of places is read at places that are no input."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 6)
        self.places = nn.Embedding(5, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1]).expand(len(x), -1)
        out: Tensor = self.head(self.tokens(x) + self.places(places))
        return out


def test_tokens() -> None:
    module = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 4), Apply(lambda x: x.mean(1)), nn.Linear(4, 3))
    tokens = torch.randint(0, 7, (3, 5))
    network = trace(module, tokens)
    assert [layer.kind for layer in network.graph.layers] == ["embedding", "linear", "linear"]
    assert (network.input_shape, network.input_dtype) == ((5,), torch.int64)
    assert torch.equal(run(network.graph, network.state, tokens), module(tokens))


def test_a_tied_vocabulary_stays_one_table() -> None:
    module = nn.Sequential(Positions(), nn.Linear(7, 3))
    tokens = torch.randint(0, 7, (3, 5))
    network = trace(module, tokens)
    assert "0.tokens" not in [layer.name for layer in network.graph.layers]
    assert network.trainable == {"0.tokens.weight", "0.places.weight", "1.weight", "1.bias"}
    for count in (1, 4):
        x = torch.randint(0, 7, (count, 5))
        assert torch.equal(run(network.graph, network.state, x), module(x))


def separable() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 5), nn.Sequential(nn.Linear(5, 6), Apply(lambda x: x.cumsum(1))), nn.ReLU(), nn.Linear(6, 3)
    )


@pytest.mark.parametrize("paths", [["1"], ["1.1"], ["1.1", "3"], ("1", "0")])
def test_what_is_kept_separate_need_not_be_understood(paths: list[str]) -> None:
    module = separable()
    network = trace(module, torch.randn(3, 4), paths)
    assert_runs_as(module, network, (4,))
    separate = {layer.name for layer in network.graph.layers if layer.separate}
    assert separate == {layer.name for layer in network.graph.layers if {layer.name, layer.name[0]} & {*paths}}


def test_a_known_layer_can_be_kept_separate() -> None:
    network = trace(mlp((5, 6), 3, inputs=4), torch.randn(3, 4), ["2"])
    assert [layer.separate for layer in network.graph.layers] == [False, True, False]


def test_computed_weights_can_be_kept_separate() -> None:
    module = weight_norm()
    network = trace(module, torch.randn(3, 4), ["0"])
    assert [layer.name for layer in network.graph.layers] == ["2"]
    assert_runs_as(module, network, (4,))


def test_only_what_is_listed_is_separate() -> None:
    with pytest.raises(UnsupportedModule, match=r"'1\.1'.*cumsum"):
        trace(separable(), torch.randn(3, 4), ["0", "3"])


def test_paths_to_keep_separate_must_exist() -> None:
    with pytest.raises(UnsupportedModule, match=r"keep_separate: there is no submodule '4'\. Submodules: 0, 1, 1\.0"):
        trace(separable(), torch.randn(3, 4), ["4"])


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
    assert_runs_as(module, network, shape)
