"""Tracing: what is understood runs as the module does, what is not is refused by name; never silently wrong."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtz_core.batches import opened, tensors_of
from mtz_core.errors import InvalidCalibration, InvalidWeights, UnsupportedModule
from mtz_core.network.graph import INPUT, LayerGraph, run
from mtz_core.network.selfcheck import distance
from mtz_core.network.tracing import trace
from tests.support.networks import CASES, Case, Functional, hidden_layers, mlp
from tests.support.written import Apply, Written, assert_runs_as


def assert_same(a: LayerGraph, b: LayerGraph) -> None:
    assert (a.nodes, a.output, a.groups, a.widths) == (b.nodes, b.output, b.groups, b.widths)


@pytest.mark.parametrize("case", CASES[4:], ids=lambda case: case.name)
def test_a_traced_network_runs_as_the_module_does(case: Case) -> None:
    module, x = case.network(1), case.examples(5)
    network = trace(module, x)
    assert torch.equal(run(network.graph, network.state, x), module(x.clone()))
    assert [layer.name for layer in network.graph.layers][:-1] == hidden_layers(case)
    assert (network.input_shape, network.input_dtype) == (case.input_shape, case.dtype)
    assert network.trainable == dict(module.named_parameters()).keys() == network.state.keys()
    assert network.parameters == sum(p.numel() for p in module.parameters())
    assert network.bytes == network.parameters * x.element_size()


def test_the_number_of_examples_makes_no_difference() -> None:
    module = Functional((4, 8), 3)
    one, seven = (trace(module, torch.randn(count, 1, 8, 8)).graph for count in (1, 7))
    assert_same(one, seven)


@torch.no_grad()
@pytest.mark.parametrize(
    ("forward", "exports"),
    [
        (lambda m, x: m.second(torch.relu(m.first(x))), 1),
        (lambda m, x: m.second(m.first(x).view(len(x), 2, 2).relu().flatten(1)), 2),
        (
            lambda m, x: m.second(torch.relu(m.first(x))).repeat(1, 109),
            2,
        ),  # looks like a number of examples, and is none
        (lambda m, x: m.second(torch.cat([torch.relu(m.first(x)), x[: len(x) - 1]])[: len(x)]), 2),
        (lambda m, x: (m.second(x), m.first(x)), 1),
        (lambda m, x: m.second(m.first(x) + 0 * x[:1]), 2),
        (lambda m, x: m.second(m.first(x) + torch.zeros(109)[:4]), 2),
    ],
    ids=[
        *("no number", "of examples", "of outputs", "of examples less one", "several outputs", "of one example alone"),
        "of a constant",
    ],
)
def test_a_module_is_exported_again_only_where_it_may_count_examples(
    forward: Callable[[Any, Tensor], Tensor], exports: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, export = [], torch.export.export

    def counted(module: nn.Module, given: tuple[Tensor, ...], *more: Any, **options: Any) -> Any:
        sizes.append(len(given[0]))
        return export(module, given, *more, **options)

    monkeypatch.setattr(torch.export, "export", counted)
    module = Written(forward)
    network, x = trace(module, torch.randn(3, 4)), torch.randn(5, 4)
    found, expected = run(network.graph, network.state, x), opened(module(x))[0]
    assert distance(tensors_of(found), expected) < 1e-6
    assert len(sizes) == len({*sizes}) == exports


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


def test_modes_are_put_back_after_a_refusal() -> None:
    module = Written(lambda m, x: m.second(m.first(x).cumsum(1))).train()
    with pytest.raises(UnsupportedModule):
        trace(module, torch.randn(3, 4))
    assert all(part.training for part in module.modules())


def quantised() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)), {nn.Linear}, dtype=torch.qint8
    )


def all_tied() -> nn.Module:
    module = Written(lambda m, x: m.second(torch.relu(m.first(x))))
    module.second.weight, module.second.bias = module.first.weight, module.first.bias
    return module


def parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=value.is_floating_point() or value.is_complex())


def written_by_a_mask(m: Any, x: Tensor) -> Tensor:
    h = m.first(x)
    h[h < 0] *= 0.1
    out: Tensor = m.second(h)
    return out


REMEDIES = r"Register what it does to neurons \(mtz_core\.register_operation\).*keep_separate"
SEPARATE = r"\. List .*under `keep_separate` to leave it task-specific"


def column(size: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(size, 1))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    # chance
    "noise": (
        lambda: Written(lambda m, x: m.second(torch.rand_like(m.first(x)))),
        r"operator rand_like cannot be zipped: .*Its outputs are left to chance: leave the network out\.$",
    ),
    # control flow
    "data-dependent": (
        lambda: Written(lambda m, x: m.second(m.first(x)) if x.sum() > 0 else m.second(x)),
        r"Written cannot be exported.*depends on data",
    ),
    "other operators for other batches": (
        lambda: Written(lambda m, x: m.second(torch.relu(m.first(x)) if len(x) > 2 else m.first(x))),
        r"Written runs other operators for 109 examples than for 2.*independent of the size of the batch",
    ),
    "a factor that depends on the batch": (
        lambda: Written(lambda m, x: m.second(m.first(x)) * (1.0 / len(x))),
        r"mul\.Tensor.*computes with the size of the batch",
    ),
    "a factor that grows with the square of the batch": (
        lambda: Written(lambda m, x: m.second(m.first(x)) * len(x) ** 2),
        r"does not compute what the module does",
    ),
    "a summand that grows with half the batch": (
        lambda: Written(lambda m, x: m.second(m.first(x)) + len(x) // 2),
        r"computes with the size of the batch",
    ),
    "other operators for one example": (
        lambda: Written(lambda m, x: m.second(m.first(x).relu() if len(x) > 1 else m.first(x).tanh())),
        r"for one example the traced network does not compute what the module does",
    ),
    "other operators for many examples": (
        lambda: Written(lambda m, x: m.second(m.first(x).relu() if len(x) > 8 else m.first(x).tanh())),
        r"for 5 examples the traced network does not compute what the module does",
    ),
    "pieces of a fixed number of examples": (
        lambda: Written(lambda m, x: torch.cat([m.second(m.first(part).relu()) for part in x.split(64)])),
        r"runs other operators for 109 examples than for 2",
    ),
    "slices of a fixed number of examples": (
        lambda: Written(lambda m, x: torch.cat([m.second(m.first(x[i : i + 50])) for i in range(0, len(x), 50)])),
        r"runs other operators for 109 examples than for 2",
    ),
    "a batch in two parts": (
        lambda: Written(lambda m, x: torch.cat([m.second(m.first(part).relu()) for part in x.chunk(2)])),
        r"the batch is split, and of one example there is no part number 1.*independent of the size of the batch",
    ),
    "a tensor with a number for each example": (
        lambda: Written(lambda m, x: m.second(m.first(x)) * torch.tensor([2.0] * len(x))[:, None]),
        r"tensor from Python numbers that depend on the size of the batch. Make it of the input, as with `x\.new_full",
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
    "quantised": (quantised, r"'0' \(Linear\) is quantised\. Zip the network before it is"),
    "lazy": (
        lambda: nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3)),
        r"'0\.weight' has no shape yet.*Run the network",
    ),
    "meta": (lambda: nn.Linear(4, 4, device="meta"), r"'weight' has no values.*meta device"),
    "several devices": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta")),
        r"'1\.weight' has no values|several devices",
    ),
    "weights computed from those of another layer": (
        lambda: Written(lambda m, x: m.second(F.linear(m.first(x), m.first.weight.T))),
        rf"operator linear cannot be zipped: its weights are computed, not stored{SEPARATE}",
    ),
    "weights computed from fewer values": (
        lambda: Written(lambda m, x: m.second(m.first(F.linear(x, m.u * m.v))), u=column(4), v=column(4).T),
        rf"operator linear cannot be zipped: its weights are computed, not stored{SEPARATE}",
    ),
    "factors of addmm": (
        lambda: Written(lambda m, x: m.second(torch.addmm(m.first.bias, x, m.first.weight, beta=2.0, alpha=0.5))),
        r"operator addmm cannot be zipped: it scales what it adds",
    ),
    "a transposed convolution in groups": (
        lambda: nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 4, 1), nn.ConvTranspose1d(4, 4, 3, groups=2)),
        r"'2'.*it is a transposed convolution in groups",
    ),
    # outputs
    "an output that is no tensor": (
        lambda: Written(lambda m, x: {"y": m.second(m.first(x)), "z": "text"}),
        r"Written: its output 'z' is a str, not tensors.*leaves it out",
    ),
    "no output": (lambda: Written(lambda m, x: {"y": None}), r"Written returns no tensor but dict"),
    "a loss": (
        lambda: Written(lambda m, x: {"loss": m.second(m.first(x)).mean()}),
        r"output 'loss' has shape \[\].*leave labels out",
    ),
    "classes": (
        lambda: Written(lambda m, x: (m.second(m.first(x)).argmax(1),)),
        r"output '0' has shape \[5\] and dtype torch\.int64",
    ),
    "an output of no input": (
        lambda: Written(lambda m, x: (m.second(m.first(x)), m.bias), bias=torch.ones(5)),
        r"the output '1' of Written does not depend on its input",
    ),
    "every example with every other": (
        lambda: Written(lambda m, x: {"y": (h := m.second(m.first(x))) @ h.t(), "z": h}),
        r"the shape of Written's output 'y' depends on the number of examples",
    ),
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
        rf"'rnn'.*operator gru.*{SEPARATE}",
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
    "writing into as many values as the data say": (
        lambda: Written(written_by_a_mask),
        r"ge> cannot be zipped: it is no operator of ATen",
    ),
    "a loss alone": (
        lambda: Written(lambda m, x: m.second(m.first(x)).mean()),
        r"its output has shape \[\].*for 5 examples, not numbers for each.*leave labels out",
    ),
    "a mean over examples": (
        lambda: Written(lambda m, x: m.second(m.first(x)).mean(0)),
        r"its output has shape \[4\].*for 5 examples, not numbers for each",
    ),
    "writing into an output argument": (
        lambda: Written(lambda m, x: m.second(torch.add(h := m.first(x), 1, out=h))),
        r"add\.out.*changes a tensor in place",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_what_zipping_cannot_follow_is_refused(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(UnsupportedModule, match=message):
        trace(make(), torch.randn(3, 4))


@pytest.mark.parametrize("name", [name for name, (_, message) in REFUSED.items() if "keep_separate" in message])
@pytest.mark.filterwarnings("ignore")
def test_keeping_the_operator_of_an_error_separate_works(name: str) -> None:
    module = REFUSED[name][0]()
    with pytest.raises(UnsupportedModule) as refusal:
        trace(module, torch.randn(3, 4))
    operators = re.findall(r"'([\w.]+:\d+)'", str(refusal.value))
    assert operators
    assert_runs_as(module, trace(module, torch.randn(3, 4), operators[-1:]), (4,))


def tied() -> nn.Module:
    module = Written(lambda m, x: m.last(m.second(torch.relu(m.first(x)))), last=nn.Linear(4, 3))
    module.second.weight = module.first.weight
    return module


FOLLOWED: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    # a network, and the layers that zipping finds in it
    "residual behind": (lambda: Written(lambda m, x: m.second(h := m.first(x).relu()) + h), ["first", "second"]),
    "other dtype": (
        lambda: Written(lambda m, x: F.softmax(m.second(m.first(x)), 1, dtype=torch.float64)),
        ["first", "second"],
    ),
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
    "a squeeze that spares a single example": (
        lambda: Written(lambda m, x: m.second(h if (h := m.first(x[:, None]).squeeze()).ndim > 1 else h[None])),
        ["first", "second"],
    ),
    "a tensor of a number for each example": (
        lambda: Written(lambda m, x: m.second(m.first(x)) * x.new_full((len(x),), 2.0)[:, None]),
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


class Remembering(nn.Module):
    """Computes a table of biases once in evaluation mode, as LeViT and its relatives do, and drops it with the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        self.biases = nn.Parameter(torch.randn(2, 3))
        self.table: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> "Remembering":
        self.table = {}
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            biases = self.biases.repeat_interleave(3, dim=1)
        else:
            biases = self.table.setdefault(str(x.device), self.biases.repeat_interleave(3, dim=1))
        hidden = torch.relu(self.first(x).unflatten(1, (2, 3)) + biases[:, ::3])
        outputs: Tensor = self.second(hidden.flatten(1))
        return outputs


@pytest.mark.parametrize("training", [False, True])
def test_what_a_module_remembers_in_evaluation_mode_is_traced_from_its_parameters(training: bool) -> None:
    module, x = nn.Sequential(Remembering(), nn.ReLU(), nn.Linear(3, 2)), torch.randn(5, 4)
    module.eval()
    with torch.no_grad():
        expected = module(x)
    module.train(training)
    network = trace(module, x)
    assert "0.biases" in network.trainable & network.state.keys()
    assert module.training is training
    assert torch.equal(run(network.graph, network.state, x), expected)
    module.eval()
    assert torch.equal(module(x), expected)
    with torch.no_grad():
        module.get_parameter("0.biases").add_(1.0)
    module.eval()
    assert not torch.equal(module(x), expected)


IMAGES: dict[str, Callable[[], nn.Module]] = {
    "one-sided padding": lambda: nn.Sequential(nn.Conv2d(2, 4, 2, padding="same"), nn.Conv2d(4, 3, 3)),
    "depthwise first": lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Conv2d(4, 3, 1)),
    "transposed": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ConvTranspose2d(4, 5, 3, 2, 1, output_padding=1), nn.ReLU(), nn.Conv2d(5, 3, 1)
    ),
    "linear on positions": lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)),
    "half a flatten": lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(2), nn.Linear(16, 3)),
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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["2.weight", "4.bias"])
def test_weights_that_are_not_finite_are_refused_by_name(name: str, value: float) -> None:
    module = mlp((9, 7), 3)
    with torch.no_grad():
        module.get_parameter(name).view(-1)[1] = value
    with pytest.raises(InvalidWeights, match=rf"'{name}' has NaN or infinite"):
        trace(module, torch.randn(3, 12))


def test_buffers_that_are_no_numbers_are_refused_by_name() -> None:
    module = Written(lambda m, x: m.second(m.first(x) * m.mask), mask=torch.tensor([1.0, torch.nan, 1.0, 1.0]))
    with pytest.raises(InvalidWeights, match="'mask' has NaN"):
        trace(module, torch.randn(3, 4))


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (torch.randn(3, 11), r"Sequential does not accept an input of shape \[\d, 11\]"),
        (torch.randn(3, 12, dtype=torch.float64), r"torch\.float64"),
        (torch.randn(3, 1, 4, 4), r"\[\d, 1, 4, 4\].*calibration data"),
        (torch.randn(3), r"no features"),
        (torch.randn(0, 12), r"Sequential is given an empty batch"),
    ],
)
def test_an_input_that_does_not_fit_is_refused(example: Tensor, message: str) -> None:
    with pytest.raises(InvalidCalibration, match=message):
        trace(mlp((9, 7), 3), example)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ((torch.randn(3, 12),) * 2, r"Sequential is given a tuple .*a dict by their names"),
        ([torch.randn(3, 12)], r"Sequential is given a list"),
        ({"x": torch.randn(3, 12)}, r"Sequential: missing.*'input'"),
        ({"input": torch.randn(3, 12), "x": torch.randn(3, 12)}, r"unexpected keyword argument 'x'.*takes: input"),
    ],
)
def test_an_input_that_is_no_tensor_is_refused(example: Any, message: str) -> None:
    with pytest.raises(InvalidCalibration, match=message):
        trace(mlp((9, 7), 3), example)


def test_a_network_of_several_inputs_can_be_wrapped() -> None:
    module = Written(lambda m, x: m.second(m.join(m.first(x[:, :4]), x[:, 4:])), join=nn.Bilinear(4, 2, 4))
    assert_runs_as(module, trace(module, torch.randn(3, 6), ["join"]), (6,))


def program(module: nn.Module, **dynamic: Any) -> nn.Module:
    return torch.export.export(module, (torch.randn(3, 4),), **dynamic).module()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_part_in_torchscript_is_named() -> None:
    module = Written(lambda m, x: m.second(m.part(x)), part=torch.jit.script(nn.Linear(4, 4)))
    with pytest.raises(UnsupportedModule, match="Give the module from which the TorchScript at 'part' was made"):
        trace(module, torch.randn(3, 4))
    with pytest.raises(UnsupportedModule, match="Give the module from which the TorchScript was made"):
        trace(module.get_submodule("part"), torch.randn(3, 4))


ANY_BATCH: Any = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)}


def test_the_module_of_an_exported_program_is_followed() -> None:
    module = Written(lambda m, x: m.second(m.first(x).relu())).eval()
    network = trace(program(module, **ANY_BATCH), torch.randn(3, 4))
    assert [layer.name for layer in network.graph.layers] == ["first", "second"]
    assert_runs_as(module, network, (4,))


def test_an_exported_program_of_one_batch_size_is_refused() -> None:
    with pytest.raises(InvalidCalibration, match=r"exported for any number of examples, with dynamic_shapes"):
        trace(program(Written(lambda m, x: m.second(m.first(x)))), torch.randn(3, 4))


def test_an_exported_program_of_some_batch_sizes_is_refused() -> None:
    sizes: Any = {"dynamic_shapes": ({0: torch.export.Dim("batch", max=64)},)}
    module = program(Written(lambda m, x: m.second(m.first(x))), **sizes)
    with pytest.raises(UnsupportedModule, match=r"64 A program must be exported for any number of examples, with"):
        trace(module, torch.randn(3, 4))


def test_parameters_that_no_output_depends_on_are_left_out() -> None:
    module = Written(lambda m, x: m.second(m.first(x)), aside=nn.Linear(4, 3), scale=nn.Parameter(torch.ones(2)))
    network, whole = (
        trace(module, torch.randn(3, 4)),
        trace(Written(lambda m, x: m.second(m.first(x))), torch.randn(3, 4)),
    )
    assert network.unused == {"scale": 8, "aside.weight": 48, "aside.bias": 12}
    assert network.left_out == (
        "parameters are left out, as no output depends on them: scale, aside.weight, aside.bias "
        "(68 bytes, counted neither before nor after zipping)"
    )
    assert (network.bytes, network.parameters) == (whole.bytes, whole.parameters)
    assert_same(network.graph, whole.graph)
    assert not whole.left_out
    assert_runs_as(module, network, (4,))


def test_many_parameters_that_are_left_out_are_counted() -> None:
    aside = nn.ModuleList(nn.Linear(4, 3) for _ in range(10))
    network = trace(Written(lambda m, x: m.second(m.first(x)), aside=aside), torch.randn(3, 4))
    assert "aside.3.bias and 12 more (600 bytes" in network.left_out


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(UnsupportedModule, match=r"not a torch\.nn\.Module"):
        trace(torch.relu, torch.randn(3, 4))  # type: ignore[arg-type]


class Layers(nn.Module):
    """Linear layers with the given names, and a ReLU behind each."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names
        for name in names:
            self.add_module(name, nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = torch.relu(self.get_submodule(name)(x))
        return x


@pytest.mark.parametrize("order", [1, -1])
def test_layers_are_called_by_their_path_whatever_it_is(order: int) -> None:
    names = ["input", "relu", "relu_1", "linear", "x", "weight", "0", "last"][::order]
    graph = trace(Layers(*names), torch.randn(3, 4)).graph
    assert [layer.name for layer in graph.layers] == names
    assert [group.name for group in graph.groups] == [INPUT, *names]
    assert len({node.name for node in graph.nodes}) == 2 * len(names)


@pytest.mark.parametrize("name", ["code", "graph", "_graph", "recompile", "print_readable", "class"])
def test_names_that_a_plain_module_cannot_have_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModule, match=rf"'{name}\.weight'.*Rename that part"):
        trace(Layers(name, "last"), torch.randn(3, 4))


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
    module = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 3))
    network = trace(module, torch.randn(3, 4), ["0"])
    assert [layer.name for layer in network.graph.layers] == ["2"]
    assert_runs_as(module, network, (4,))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("settings", [{}, {"num_layers": 2, "bidirectional": True, "dropout": 0.3}], ids=["one", "two"])
def test_recurrent_layers_can_be_kept_separate(kind: Callable[..., nn.Module], settings: dict[str, Any]) -> None:
    module = Written(
        lambda m, x: m.second(m.between(m.rnn(m.first(x))[0][:, -1])),
        rnn=kind(4, 5, batch_first=True, **settings),
        between=nn.Linear(10 if settings else 5, 4),
    )
    network = trace(module, torch.randn(3, 6, 4), ["rnn"])
    assert [layer.name for layer in network.graph.layers] == ["first", "between", "second"]
    assert network.trainable == dict(module.named_parameters()).keys()
    assert_runs_as(module, network, (6, 4))


OUTERMOST: dict[str, tuple[Callable[[], nn.Module], str]] = {
    # a network, and the operator that its error names
    "without a rule": (lambda: Written(lambda m, x: m.second(m.first(x).cumsum(1))), "cumsum:1"),
    "with computed weights": (
        lambda: Written(lambda m, x: m.second(F.linear(m.first(x), m.first.weight.T))),
        "linear:2",
    ),
    "with a rule that does not hold": (
        lambda: Written(lambda m, x: m.second(m.first(x).t().reshape(x.shape))),
        "reshape:2",
    ),
}


@pytest.mark.parametrize("name", OUTERMOST)
@pytest.mark.parametrize("by_name", [True, False], ids=["named", "all"])
def test_operators_of_the_outermost_module_can_be_kept_separate(name: str, by_name: bool) -> None:
    make, operator = OUTERMOST[name]
    module = make()
    with pytest.raises(UnsupportedModule, match=rf"'{operator}'.*keep_separate|keep_separate.*'{operator}'"):
        trace(module, torch.randn(3, 4))
    network = trace(module, torch.randn(3, 4), [operator if by_name else ""])
    assert "second" in [layer.name for layer in network.graph.layers]
    assert_runs_as(module, network, (4,))


def test_operators_to_keep_separate_must_exist() -> None:
    with pytest.raises(UnsupportedModule, match=r"there is no operator 'cumsum:9'\. Operators: 0, 1\.0, 3, cumsum:2"):
        trace(separable(), torch.randn(3, 4), ["cumsum:9"])


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
