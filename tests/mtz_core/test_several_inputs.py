"""Networks with several inputs: given by name or in order, zipped, cut to a budget, retrained, stored and judged."""

from collections.abc import Iterator
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtz_core as mtz
from mtz_core.batches import NamedTensors, concatenated, signature_of
from mtz_core.errors import InvalidCalibration
from mtz_core.merging.compatibility import separate_layers
from mtz_core.network.graph import INPUT, Network
from mtz_core.network.tracing import trace
from mtz_core.statistics.calibration import as_batches
from mtz_core.zipped.report import noted_in_brief
from tests.support.networks import zip_traced
from tests.support.several import FEATURES, encoder, masked, numbers, read_again

pytestmark = pytest.mark.filterwarnings("ignore::mtz_core.ZipWarning")

Data = dict[str, Tensor]


def originals() -> dict[str, nn.Module]:
    return {"narrow": encoder(1), "wide": encoder(2, hidden=16, classes=5)}


def calibration(count: int = 60) -> dict[str, Data]:
    return {"narrow": masked(count, 1), "wide": masked(count, 2)}


@cache
def traced(task: str) -> Network:
    return trace(originals()[task], calibration()[task])


@cache
def zipped(share: float) -> mtz.ZippedNetwork:
    """Zipped after one tracing for all tests, which takes most of the time."""
    return zip_traced({task: traced(task) for task in originals()}, calibration(), mtz.ZipConfig(share=share))


def loader(data: Data, size: int = 25) -> Iterator[Data]:
    for start in range(0, len(data["input_ids"]), size):
        yield {name: own[start : start + size] for name, own in data.items()}


@torch.no_grad()
def test_sharing_nothing_gives_back_the_originals_bit_by_bit() -> None:
    x = masked(9, seed=7)
    assert zipped(0.0).report.stored_bytes == zipped(0.0).report.original_bytes
    for task, network in originals().items():
        assert torch.equal(zipped(0.0)(x, task), network(**x))
        assert torch.equal(zipped(0.0).network(task)(**x), network(**x))


@torch.no_grad()
def test_inputs_may_come_by_name_in_any_order_or_in_the_network_s_order() -> None:
    x = masked(9, seed=7)
    expected = zipped(1.0)(x, "wide")
    plain = zipped(1.0).network("wide")
    turned = dict(reversed(x.items()))
    for found in (
        zipped(1.0)(turned, "wide"),
        zipped(1.0)(tuple(x.values()), "wide"),
        zipped(1.0)([*x.values()], "wide"),
    ):
        assert torch.equal(found, expected)
    for found in (plain(**turned), plain(*x.values())):
        torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_the_mask_is_an_input() -> None:
    x = masked(9, seed=7)
    padded = {"input_ids": torch.where(x["attention_mask"] > 0, x["input_ids"], 0)}
    for task in zipped(1.0).tasks:
        expected = zipped(1.0)(x, task)
        torch.testing.assert_close(zipped(1.0)({**x, **padded}, task), expected)
        everything = {**x, "attention_mask": torch.ones_like(x["attention_mask"])}
        assert (zipped(1.0)(everything, task) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.float32])
def test_masks_of_every_type_have_no_neurons(dtype: torch.dtype) -> None:
    network = trace(encoder(1), masked(4, dtype=dtype))
    widths = {name: network.graph.widths[name] for name in network.graph.hidden_widths}
    assert widths == {"tokens": 8, "qkv": 2, "up": 12}


def test_an_input_by_which_neurons_are_scaled_alike_has_none_either() -> None:
    weights = {"weights": torch.rand(4, 6)}
    network = trace(encoder(1), {**masked(4), **weights})
    assert network.graph.hidden_widths == trace(encoder(1), masked(4)).graph.hidden_widths


class Residual(nn.Module):
    """Adds an input to what it has computed, so that its neurons belong to the input's places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.more = nn.Linear(6, 9), nn.Linear(9, 6), nn.Linear(2, 9)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor, more: Tensor) -> Tensor:
        y: Tensor = self.last(x + self.second(torch.relu(self.first(x) + self.more(more))))
        return y


def test_neurons_that_meet_an_input_one_by_one_are_tied_to_it() -> None:
    network = trace(Residual(), {"x": torch.randn(4, 6), "more": torch.randn(4, 2)})
    assert network.graph.hidden_widths == {"first": 9}
    assert network.graph.columns["more"].groups == (INPUT,)
    assert not network.graph.columns["first"].groups


class Masked(nn.Module):
    """A mask over neurons, over the positions that attention sees, or over those that are averaged."""

    def __init__(self, over: str) -> None:
        super().__init__()
        self.first, self.last, self.over = nn.Linear(5, 8), nn.Linear(8, 3), over
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            x, mask = x.split([5, 1], -1)
        h = self.first(x).relu()
        if self.over == "neurons":
            h = h * mask
        elif self.over == "positions":
            h = self.attention(h, h, h, key_padding_mask=mask, need_weights=False)[0]
        else:
            h = h * (mask if mask.ndim == 3 else mask[..., None])
        out: Tensor = self.last(h.mean(1) if h.ndim == 3 else h)
        return out


def kept(*shape: int) -> Tensor:
    return torch.arange(40 * torch.Size(shape).numel()).reshape(40, *shape) % 3 != 1


BOUND: dict[str, tuple[str, Any, Data, str]] = {
    "neurons": (
        "neurons",
        {"x": torch.randn(40, 5), "mask": kept(8).float()},
        {"x": torch.randn(40, 5), "mask": kept(8)},
        "'first' stays separate: its neurons meet the input 'mask' one by one, in 'mul.Tensor:",
    ),
    "padding": (
        "positions",
        {"x": torch.randn(40, 4, 5), "mask": -1e9 * kept(4).float()},
        {"x": torch.randn(40, 4, 5), "mask": kept(4)},
        "'attention.in_proj' stays separate: its neurons meet the input 'mask' one by one, in 'scaled_dot_product",
    ),
    "part of the one input": (
        "averaged",
        torch.cat([torch.randn(40, 4, 5), kept(4, 1).float()], -1),
        {"x": torch.randn(40, 4, 5), "mask": kept(4)},
        "'first' stays separate: its neurons meet the input one by one, in 'mul.Tensor:",
    ),
}


@pytest.mark.parametrize(("over", "given", "remedied", "told"), BOUND.values(), ids=BOUND)
def test_neurons_that_a_mask_binds_are_told_with_a_remedy_that_works(
    over: str, given: Any, remedied: Data, told: str
) -> None:
    networks = {"a": Masked(over), "b": Masked(over)}
    bound = {task: trace(network, given) for task, network in networks.items()}
    separate = separate_layers(bound)
    layer = told.split("'")[1]
    assert noted_in_brief(separate, "stays separate", "stay separate").startswith(told)
    assert "of its own, of booleans (torch.bool)" in separate[layer]
    zipped = zip_traced(bound, dict.fromkeys(networks, given), mtz.ZipConfig(share=1.0))
    assert {own.layer: own.note for own in zipped.report.layers if own.note} == separate
    free = {task: trace(network, remedied) for task, network in networks.items()}
    assert not separate_layers(free)
    assert layer in free["a"].graph.hidden_widths


def test_outputs_that_meet_an_input_are_outputs() -> None:
    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 9), nn.Linear(9, 6)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.last(self.first(x).relu())
            return out

    assert not separate_layers({task: trace(Denoiser(), torch.randn(4, 6)) for task in "ab"})


@torch.no_grad()
def test_a_network_zipped_with_itself_keeps_its_outputs_and_stores_hidden_layers_once() -> None:
    network, x = encoder(1), masked(9, seed=7)
    found = mtz.zip_networks({"a": network, "b": network}, {"a": masked(60, 1), "b": masked(60, 2)})
    for task in found.tasks:
        torch.testing.assert_close(found(x, task), network(**x), rtol=0, atol=1e-5)
    assert found.report.stored_fraction < 0.6


def forms(data: Data) -> dict[str, Any]:
    """Inputs of a network that needs two, in every form."""
    batches = list(loader(data))
    return {
        "dict": data,
        "tuple": tuple(data.values()),
        "list": [*data.values()],
        "batches": batches,
        "iterator": loader(data),
        "pairs with labels": [(part, torch.zeros(25)) for part in batches],
        "batches in order": [tuple(part.values()) for part in batches],
        "pairs of inputs in order and labels": [([*part.values()], torch.zeros(25)) for part in batches],
    }


@pytest.mark.parametrize("form", forms(masked(50)))
def test_every_form_of_calibration_has_the_same_inputs(form: str) -> None:
    data = masked(50)
    found = concatenated(as_batches(forms(data)[form], "a", signature_of(encoder(1))))
    assert isinstance(found, NamedTensors)
    assert list(found.tensors) == list(data)
    assert all(torch.equal(found.tensors[name], data[name]) for name in data)


def test_a_network_that_can_do_with_one_input_is_given_that() -> None:
    """A list of tensors is batches, and a pair has labels."""
    parts = [numbers(20, seed)[0] for seed in range(2)]
    pairs = [(part, torch.zeros(20, FEATURES)) for part in parts]
    for taken in (signature_of(nn.Linear(FEATURES, 3)), signature(lambda x, mask=None: x)):
        for given in (parts, tuple(parts), pairs, torch.cat(parts)):
            assert torch.equal(torch.cat(as_batches(given, "a", taken)), torch.cat(parts))


@torch.no_grad()
def test_stored_and_read_again_it_is_the_same(tmp_path: Path) -> None:
    again = read_again(zipped(0.6), tmp_path)
    for task in again.tasks:
        assert torch.equal(again(masked(5), task), zipped(0.6)(masked(5), task))


@torch.no_grad()
def test_one_pass_for_all_tasks_and_a_task_for_each_example() -> None:
    x = masked(6, seed=3)
    pair = mtz.zip_networks({"a": encoder(1), "b": encoder(1)}, {"a": masked(40, 1), "b": masked(40, 2)})
    outputs = pair.run_all(x)
    for task in pair.tasks:
        torch.testing.assert_close(outputs[task], pair(x, task))
    tasks = ["b", "a", "a", "b", "b", "a"]
    mixed = pair(x, tasks)
    for number, task in enumerate(tasks):
        torch.testing.assert_close(mixed[number], outputs[task][number])


@torch.no_grad()
def test_tasks_come_and_go() -> None:
    x = masked(6, seed=3)
    alone = zipped(1.0).without("wide")
    assert torch.equal(alone(x, "narrow"), zipped(1.0)(x, "narrow"))
    more = alone.with_task("third", encoder(3, classes=4), masked(60, 3))
    assert torch.equal(more(x, "narrow"), zipped(1.0)(x, "narrow"))
    assert more(x, "third").shape == (6, 4)


@pytest.mark.slow
@torch.no_grad()
def test_a_budget_is_kept_and_light_retraining_helps() -> None:
    config = mtz.ZipConfig(budget=mtz.Budget(size=0.6))
    validation = {"narrow": masked(40, 5), "wide": masked(40, 6)}
    before = mtz.zip_networks(originals(), calibration(), config, validation=validation)
    after = mtz.zip_networks(
        originals(), calibration(), config, validation=validation, retraining=mtz.RetrainConfig(iterations=40)
    )
    assert before.report.stored_fraction <= 0.6
    assert sum(own.lost for own in after.report.tasks.values()) < sum(own.lost for own in before.report.tasks.values())
    curve = mtz.retrain(before, originals(), calibration(), validation, mtz.RetrainConfig(iterations=20))
    assert curve[-1].iteration == 20


@pytest.mark.slow
def test_a_floor_is_searched_for_on_labelled_validation_data() -> None:
    networks, labelled = originals(), {}
    for task, network in networks.items():
        x = masked(40, seed=8)
        with torch.no_grad():
            labelled[task] = (x, network(**x).argmax(dim=1))
    config = mtz.ZipConfig(budget=mtz.Budget(floor=50.0))
    found = mtz.zip_networks(
        networks, calibration(), config, validation=labelled, retraining=mtz.RetrainConfig(iterations=2)
    )
    assert found.report.stored_fraction < 1


def test_a_network_is_measured_with_labels_and_against_its_original() -> None:
    x = masked(30, seed=4)
    with torch.no_grad():
        labels = {task: network(**x).argmax(dim=1) for task, network in originals().items()}
    found = mtz.evaluate(zipped(0.0), {task: (x, own) for task, own in labels.items()}, originals=originals())
    assert all((own.error, own.original_error, own.agreement) == (0, 0, 100) for own in found.values())
    batches = [(part, own) for part, own in zip(loader(x, 15), labels["wide"].split(15), strict=True)]
    assert mtz.evaluate(zipped(0.0), {"wide": batches})["wide"].error == 0
    agreed = mtz.evaluate(zipped(0.0), {"wide": x}, originals=originals(), metric="agreement")
    assert agreed["wide"].error == 0


def test_validation_data_has_the_same_inputs() -> None:
    data = {"narrow": masked(9, 1), "wide": {**masked(9, 2), "weights": torch.rand(9, 6)}}
    with pytest.raises(InvalidCalibration, match=r"'wide'.*weights \[6\].*calibration examples.*attention_mask \[6\]"):
        mtz.zip_networks(originals(), calibration(), validation=data)


BAD: dict[str, tuple[Any, str]] = {
    "one of two": (masked(30)["input_ids"], r"missing a required argument: 'attention_mask'"),
    "missing": ({"input_ids": masked(30)["input_ids"]}, r"missing a required argument: 'attention_mask'"),
    "unknown": ({**masked(30), "labels": torch.zeros(30)}, r"'labels'.*takes: input_ids, attention_mask, weights"),
    "unequal": ({**masked(30), "attention_mask": torch.ones(29, 6)}, r"input_ids has 30, attention_mask has 29"),
    "left out": ({**masked(30), "weights": None}, r"'weights' is no tensor.*leave it out"),
    "not finite": ({**masked(30), "weights": torch.full((30, 6), torch.nan)}, r"\(weights\) have NaN"),
    "other dtype": (
        [masked(20), masked(20, dtype=torch.int32)],
        r"'narrow' \(attention_mask\) have dtype torch\.int32.*of one dtype",
    ),
    "other shape": ([masked(20), {n: x[:, :5] for n, x in masked(20).items()}], r"\(input_ids\) mix examples of shape"),
    "other inputs": ([masked(20), {**masked(20), "weights": torch.rand(20, 6)}], r"mix batches of input_ids.*weights"),
    "empty": ({name: x[:0] for name, x in masked(20).items()}, r"are empty"),
    "a triple": ([(*masked(20).values(), torch.rand(20, 6), torch.zeros(20))], r"have a batch of type tuple"),
}


@pytest.mark.parametrize(("data", "message"), BAD.values(), ids=BAD.keys())
def test_calibration_that_does_not_fit_is_refused(data: Any, message: str) -> None:
    with pytest.raises(InvalidCalibration, match=message):
        mtz.zip_networks(originals(), {**calibration(), "narrow": data})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": masked(3)["input_ids"]}, r"the inputs of 'wide': missing.*'attention_mask'"),
        (masked(3)["input_ids"], r"missing.*'attention_mask'"),
        ({**masked(3), "weights": torch.rand(3, 6)}, r"'weights'.*The network takes: input_ids, attention_mask\."),
        (tuple(masked(3).values())[::-1] * 2, r"too many"),
        ({**masked(3), "attention_mask": torch.ones(2, 6)}, r"unequal"),
    ],
    ids=["missing", "one", "left out in zipping", "too many", "unequal"],
)
def test_a_zipped_network_takes_what_it_was_traced_with(given: Any, message: str) -> None:
    for run in (
        lambda: zipped(1.0)(given, "wide"),
        lambda: zipped(1.0)(given, ["wide"] * 3),
        lambda: zipped(1.0).run_all(given),
    ):
        with pytest.raises(InvalidCalibration, match=message.replace("'wide'", "'(wide|narrow)'")):
            run()


def test_one_tensor_is_no_dict() -> None:
    plain = {task: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)) for task in "ab"}
    found = mtz.zip_networks(plain, {task: torch.randn(20, 6) for task in "ab"})
    with pytest.raises(InvalidCalibration, match="'a' takes one tensor, but is given dict"):
        found({"input": torch.randn(3, 6)}, "a")
    named = mtz.zip_networks(plain, {task: {"input": torch.randn(20, 6)} for task in "ab"})
    x = torch.randn(30, 6)
    assert torch.equal(named({"input": x}, "a"), named(x, "a"))
    alone = mtz.retrain(named, plain, dict.fromkeys("ab", x), dict.fromkeys("ab", x), mtz.RetrainConfig(iterations=1))
    assert len(alone) == 2


class Renamed(nn.Module):
    """The same network, whose inputs have other names."""

    def __init__(self) -> None:
        super().__init__()
        self.network = encoder(4)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = self.network(ids, mask)
        return logits


def test_networks_that_read_inputs_of_other_names_differ() -> None:
    renamed = dict(zip(("ids", "mask"), masked(30).values(), strict=True))
    with pytest.raises(mtz.IncompatibleNetworks, match=r"reading input ids .*reading input input_ids"):
        mtz.zip_networks({"a": Renamed(), "b": encoder(1)}, {"a": renamed, "b": masked(30)})


def test_inputs_of_one_tensor_are_traced_as_ever() -> None:
    network = trace(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(3, 6))
    assert list(network.inputs) == [INPUT]
    with pytest.raises(InvalidCalibration, match=r"several inputs.*by their names.*input_ids, attention_mask"):
        trace(encoder(1), masked(3)["input_ids"])


@pytest.mark.slow
def test_the_program_of_a_network_is_given_its_inputs_as_it_was_exported() -> None:
    batch = torch.export.Dim("batch")
    shapes = {"input_ids": {0: batch}, "attention_mask": {0: batch}}
    example = masked(4)
    by_name = torch.export.export(encoder(1), (), example, dynamic_shapes=shapes).module()
    by_position = torch.export.export(
        encoder(1), tuple(example.values()), dynamic_shapes=tuple(shapes.values())
    ).module()
    for module, given in ((by_name, example), (by_position, tuple(example.values()))):
        assert trace(module, given).graph.hidden_widths == trace(encoder(1), example).graph.hidden_widths
    with pytest.raises(InvalidCalibration, match=r"as it was when it was exported: a tuple by position"):
        trace(by_position, example)


def test_errors_name_the_task_and_the_inputs() -> None:
    data = {**calibration(), "wide": {name: x[:, :4] for name, x in masked(9).items()}}
    with pytest.raises(InvalidCalibration, match=r"the network of 'wide'.*input_ids of shape \[\d, 4\]"):
        mtz.zip_networks(originals(), data)
