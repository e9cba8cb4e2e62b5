"""Zipped networks some of whose rows are rounded: on their grids, on disk, alone, in batches, grown and cut down."""

import copy
import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mtz_core
from mtz_core import ZipConfig, ZippedNetwork
from mtz_core.merging.matching import match
from mtz_core.merging.walk import ActivationStream, finish, merge
from mtz_core.network.graph import Node, run
from mtz_core.network.tracing import trace
from mtz_core.settings import BITS
from mtz_core.statistics.calibration import as_batches
from mtz_core.statistics.traced import Traced
from mtz_core.zipped.codes import SCALES, nearest
from mtz_core.zipped.structure import block_name, scale_name
from tests.support.fleets import FLEETS, drawn, measured_fleet, rounded_fleet

pytestmark = pytest.mark.long

on_fleets = pytest.mark.parametrize(
    "name", ["other widths and classes", "three residual, other channels", "kept separate", "depthwise"]
)
on_small_fleets = pytest.mark.parametrize("name", ["three mlps", "no bias, other inputs"])


def assert_same_tensors(found: ZippedNetwork, expected: ZippedNetwork) -> None:
    assert found.tensors().keys() == expected.tensors().keys()
    for name, tensor in expected.tensors().items():
        assert found.tensors()[name].dtype == tensor.dtype
        assert torch.equal(found.tensors()[name], tensor)


# Merged


@on_fleets
def test_rounded_blocks_lie_on_the_grids_of_their_rows(name: str) -> None:
    fleet = rounded_fleet(name, 1)
    structure = fleet.zipped.structure
    assert structure.bits
    for task, network in structure.networks.items():
        for node in network.graph.layers:
            matrix, scales = fleet.zipped.matrix(task, node), fleet.zipped.scales(task, node)
            for rows, columns in itertools.product(
                structure.rows[node.name].of(task), structure.columns[node.name].of(task)
            ):
                block = matrix[rows.places[task]][:, columns.places[task]]
                number = fleet.sizes.tasks, fleet.bits[node.name]
                bits = structure.bits.get(block_name(node.name, rows.owners, columns.owners))
                assert (bits or fleet.sizes.full_bits) == of_owners(*number, fleet.sizes.owners, rows.owners)
                if bits is not None:
                    assert scales is not None
                    steps = scales[rows.places[task]][:, None]
                    assert torch.equal(block, nearest(block, steps, bits))


def of_owners(tasks: tuple[str, ...], bits: np.ndarray, owners: np.ndarray, wanted: tuple[str, ...]) -> int:
    (place,) = np.flatnonzero((owners == np.isin(tasks, wanted)).all(axis=1))
    return int(bits[place])


@on_fleets
def test_each_layer_is_run_with_the_very_values_that_are_stored(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What later layers are fitted to is what they are fed in use."""
    ran: dict[tuple[int, str], Mapping[str, Tensor]] = {}
    advance = ActivationStream.advance

    def recorded(self: ActivationStream, node: Node, changed: Mapping[str, Tensor] | None = None) -> None:
        if node.is_layer:
            ran[id(self), node.name] = {**{n: self.reduced.network.state[n] for n in node.state}, **(changed or {})}
        advance(self, node, changed)

    monkeypatch.setattr(ActivationStream, "advance", recorded)
    zipped = rounded(name, 1)
    zipped.save(tmp_path)
    again = mtz_core.load(tmp_path)
    streams = dict(zip(dict.fromkeys(number for number, _ in ran), zipped.tasks, strict=True))
    for (number, _), state in ran.items():
        for tensor, value in state.items():
            assert torch.equal(again.state_of(streams[number])[tensor], value)
    assert len(ran) == sum(len(network.graph.layers) for network in zipped.structure.networks.values())


def rounded(name: str, seed: int, bits: int | None = None) -> ZippedNetwork:
    """The same as `rounded_fleet`, made anew."""
    return rounded_fleet.__wrapped__(name, seed, bits).zipped


@on_small_fleets
def test_merging_again_gives_the_same_bytes(name: str) -> None:
    assert_same_tensors(rounded(name, 0), rounded_fleet(name, 0).zipped)


@on_small_fleets
def test_nothing_rounded_is_the_network_that_it_was(name: str) -> None:
    keep, pairings = drawn(name, 1, some=True)
    config = ZipConfig(patches=2, refit_rounds=0, damping=0.1)
    plain = finish(merge(measured_fleet(name), pairings, config, keep=keep))
    assert not plain.structure.bits
    assert_same_tensors(rounded(name, 1, 64), plain)


@torch.no_grad()
@on_fleets
def test_eight_bits_hardly_change_outputs_and_fewer_change_them_more(name: str) -> None:
    examples, plain = FLEETS[name].examples(30), rounded_fleet(name, 0, 64).zipped
    errors = []
    for bits in (8, 5, 2):
        zipped = rounded_fleet(name, 0, bits).zipped
        outputs = {task: (zipped(examples[task], task), plain(examples[task], task)) for task in zipped.tasks}
        relative = [float((found - y).square().mean() / y.var(dim=0).mean()) for found, y in outputs.values()]
        errors.append(sum(relative) / len(relative))
    assert errors[0] < 1e-3
    assert all(5 * more < few for more, few in itertools.pairwise(errors))


@on_small_fleets
def test_biases_and_whatever_is_no_weight_are_not_rounded(name: str) -> None:
    zipped = rounded_fleet(name, 0, 2).zipped
    shapes = zipped.structure.block_shapes()
    assert zipped.structure.bits.keys() == {block for block in shapes if "/weight/" in block}
    assert set(zipped.structure.bits.values()) == {2}
    precision = FLEETS[name].dtype
    for tensor, value in zipped.tensors().items():
        expected = torch.uint8 if tensor in zipped.structure.bits else precision
        assert value.dtype == expected or not value.is_floating_point()


@on_fleets
def test_shared_rows_have_one_scale_and_one_code(name: str) -> None:
    zipped = rounded_fleet(name, 0).zipped
    for layer, arrangement in zipped.structure.rows.items():
        for rows in arrangement.segments:
            if not zipped.structure.is_rounded(layer, rows.owners):
                continue
            stored = zipped.tensors()[scale_name(layer, rows.owners)]
            assert torch.equal(stored, stored.to(SCALES).to(stored.dtype))
            for task in rows.owners:
                scales = zipped.scales(task, zipped.structure.nodes[layer][task])
                assert scales is not None
                assert torch.equal(scales[rows.places[task]], stored)


@torch.no_grad()
def test_rows_of_zeros_and_a_layer_of_one_value_are_rounded() -> None:
    networks, batches = {}, {}
    for seed, task in enumerate("ab"):
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1))
        first, second, last = (module.get_parameter(f"{name}.weight").data for name in "024")
        first[1], second[2:4] = 0, 0
        last.fill_(0.25)
        batches[task] = as_batches(torch.randn(30, 1), task)
        networks[task] = trace(module.eval(), batches[task][0])
    traced = {task: Traced.measured(network, batches[task], ZipConfig()) for task, network in networks.items()}
    config = ZipConfig(share=0.0)
    pairings = {found.group: found.pairing for found in match(traced, config)}
    x = torch.randn(9, 1)
    for bits in BITS:
        names = {scale_name(layer, (task,)): bits for layer in ("0", "2", "4") for task in networks}
        zipped = finish(merge(traced, pairings, config, bits=names))
        for task, network in networks.items():
            assert float(zipped.tensors()[scale_name("0", (task,))][1]) == 0
            found, expected = zipped(x, task), run(network.graph, network.state, x)
            assert float((found - expected).abs().max()) <= 5 * 2.0**-bits


# In use


@on_fleets
def test_saved_and_loaded_it_is_the_same(name: str, tmp_path: Path) -> None:
    zipped, examples = rounded_fleet(name, 1).zipped, FLEETS[name].examples(5)
    zipped.save(tmp_path / "first")
    again = mtz_core.load(tmp_path / "first")
    again.save(tmp_path / "second")
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()
    assert again.report == zipped.report
    assert again.structure.bits == zipped.structure.bits
    assert_same_tensors(again, zipped)
    for task in zipped.tasks:
        assert torch.equal(again(examples[task], task), zipped(examples[task], task))


@on_fleets
def test_one_task_alone_is_a_plain_network_that_computes_the_same(name: str) -> None:
    zipped, examples = rounded_fleet(name, 1).zipped, FLEETS[name].examples(5)
    for task in zipped.tasks:
        plain = zipped.network(task)
        assert torch.equal(plain(examples[task]), zipped(examples[task], task))
        assert all(tensor.dtype != torch.uint8 for tensor in plain.state_dict().values())


@on_fleets
def test_all_tasks_at_once_and_mixed_batches_compute_the_same(name: str) -> None:
    zipped, examples = rounded_fleet(name, 1).zipped, FLEETS[name].examples(6)
    first = zipped.tasks[0]
    like = [task for task in zipped.tasks if examples[task].shape == examples[first].shape]
    if len(like) == len(zipped.tasks):
        for task, y in zipped.run_all(examples[first]).items():
            torch.testing.assert_close(y, zipped(examples[first], task), rtol=1e-4, atol=1e-5)
    outputs = {task: zipped(examples[task], task) for task in like}
    mixed = [task for task in like if outputs[task].shape == outputs[first].shape]
    tasks = list(itertools.islice(itertools.cycle(mixed), 6))
    x = torch.stack([examples[task][i] for i, task in enumerate(tasks)])
    expected = torch.stack([outputs[task][i] for i, task in enumerate(tasks)])
    torch.testing.assert_close(zipped(x, task=tasks), expected, rtol=1e-4, atol=1e-5)


@on_small_fleets
def test_it_is_an_ordinary_module(name: str) -> None:
    zipped, examples = rounded_fleet(name, 1).zipped, FLEETS[name].examples(5)
    twin = copy.deepcopy(zipped)
    assert_same_tensors(twin, zipped)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
        for buffer in twin.buffers():
            buffer.zero_()
    task = zipped.tasks[0]
    assert not torch.equal(twin(examples[task], task), zipped(examples[task], task))
    twin.load_state_dict(zipped.state_dict())
    assert_same_tensors(twin, zipped)
    assert torch.equal(twin(examples[task], task), zipped(examples[task], task))
    assert len(zipped.state_dict()) == len(zipped.tensors())
    codes = {n.replace(".", "|") for n in zipped.structure.bits}
    assert codes <= {name for name, _ in zipped.named_buffers()}


@on_small_fleets
def test_scales_learn_and_codes_do_not(name: str) -> None:
    zipped, examples = copy.deepcopy(rounded_fleet(name, 1).zipped), FLEETS[name].examples(5)
    for task in zipped.tasks:
        zipped(examples[task], task).square().sum().backward()
    learnt = {name.replace("|", "."): parameter.grad for name, parameter in zipped.named_parameters()}
    for scales in zipped.structure.scale_shapes():
        assert learnt[scales] is not None
    assert not learnt.keys() & zipped.structure.bits.keys()


@torch.no_grad()
@on_small_fleets
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_another_precision_keeps_codes_and_scales_and_survives_the_disk(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    plain, examples = rounded_fleet(name, 1).zipped, FLEETS[name].examples(5)
    zipped = copy.deepcopy(plain).to(dtype)
    zipped.save(tmp_path / "first")
    again = mtz_core.load(tmp_path / "first")
    assert again.precision == dtype
    assert_same_tensors(again, zipped)
    for name_ in plain.structure.bits:
        assert torch.equal(zipped.tensors()[name_], plain.tensors()[name_])
    tolerance = {torch.float64: 1e-5, torch.float16: 2e-2, torch.bfloat16: 2e-1}[dtype]
    for task in zipped.tasks:
        x = examples[task].to(dtype)
        assert torch.equal(again(x, task), zipped(x, task))
        expected = plain(examples[task], task)
        distance = float((zipped(x, task).to(expected.dtype) - expected).abs().amax() / expected.abs().amax())
        assert distance < tolerance
        left = zipped.without(next(other for other in zipped.tasks if other != task))
        assert task not in left.tasks or torch.equal(left(x, task), zipped(x, task))


# Cut down and grown


@on_fleets
def test_taking_a_task_out_changes_no_other(name: str, tmp_path: Path) -> None:
    zipped, examples = rounded_fleet(name, 1).zipped, FLEETS[name].examples(5)
    for task in zipped.tasks:
        check_without(zipped, task, examples, tmp_path / task)


def check_without(zipped: ZippedNetwork, task: str, examples: Mapping[str, Tensor], folder: Path) -> None:
    left = zipped.without(task)
    assert task not in left.tasks
    for other in left.tasks:
        assert torch.equal(left(examples[other], other), zipped(examples[other], other))
    shapes = left.structure.stored_shapes()
    assert {name: tuple(tensor.shape) for name, tensor in left.tensors().items()} == shapes
    left.save(folder)
    content = (folder / "weights.safetensors").read_bytes()
    assert left.report.stored_bytes == len(content) - 8 - int.from_bytes(content[:8], "little")
    again = mtz_core.load(folder)
    for other in left.tasks:
        assert torch.equal(again(examples[other], other), left(examples[other], other))


@on_fleets
def test_with_the_same_bits_everywhere_less_is_stored_without_a_task(name: str) -> None:
    """Where rows in several precisions become one task's own, they all get the most bits of any."""
    zipped = rounded_fleet(name, 1, 4).zipped
    for task in zipped.tasks:
        left = zipped.without(task)
        assert left.report.stored_bytes < zipped.report.stored_bytes
        assert set(left.structure.bits.values()) == {4}
        assert left.structure.bits.keys() == {block for block in left.structure.block_shapes() if "/weight/" in block}


@on_fleets
def test_down_to_one_task(name: str) -> None:
    zipped, examples = rounded_fleet(name, 1).zipped, FLEETS[name].examples(5)
    for last in zipped.tasks:
        left = zipped
        for task in zipped.tasks:
            left = left if task == last else left.without(task)
        assert torch.equal(left(examples[last], last), zipped(examples[last], last))
        rows = [len(left.structure.rows[layer].segments) for layer in left.structure.nodes]
        assert max(rows) == 1


@pytest.mark.filterwarnings("ignore::mtz_core.ZipWarning")
@on_fleets
def test_a_newcomer_changes_no_other_and_may_go_again(name: str, tmp_path: Path) -> None:
    zipped, fleet = rounded_fleet(name, 1).zipped, FLEETS[name]
    examples = fleet.examples(20)
    first = zipped.tasks[0]
    torch.manual_seed(9)
    newcomer = fleet.make()[first].to(fleet.dtype).eval()
    config = ZipConfig(share=0.5, patches=2, keep_separate=fleet.keep_separate)
    grown = zipped.with_task("z", newcomer, examples[first], config)
    assert grown.tasks == (*zipped.tasks, "z")
    for task in zipped.tasks:
        assert torch.equal(grown(examples[task], task), zipped(examples[task], task))
    assert bool(torch.isfinite(grown(examples[first], "z")).all())
    grown.save(tmp_path)
    again = mtz_core.load(tmp_path)
    assert torch.equal(again(examples[first], "z"), grown(examples[first], "z"))
    content = (tmp_path / "weights.safetensors").read_bytes()
    assert grown.report.stored_bytes == len(content) - 8 - int.from_bytes(content[:8], "little")
    left = grown.without("z")
    assert_same_tensors(left, zipped)
    assert left.structure.bits == zipped.structure.bits
    for task in zipped.tasks:
        check_without(grown, task, {**examples, "z": examples[first]}, tmp_path / task)


@on_small_fleets
def test_a_newcomer_that_shares_nothing_is_as_it_was(name: str) -> None:
    zipped, fleet = rounded_fleet(name, 1).zipped, FLEETS[name]
    first, x = zipped.tasks[0], fleet.examples(10)
    newcomer = fleet.make()[first].to(fleet.dtype).eval()
    config = ZipConfig(share=0.0, patches=2, keep_separate=fleet.keep_separate)
    grown = zipped.with_task("z", newcomer, x[first], config)
    assert torch.equal(grown(x[first], "z"), newcomer(x[first]))
    own = [bits for block, bits in grown.structure.bits.items() if block.split("/")[2] == "z"]
    assert not own
