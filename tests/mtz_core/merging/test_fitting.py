"""Fitting one layer of several tasks against dense normal equations, and what activations cannot tell apart."""

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtz_core import ZipConfig, zip_networks
from mtz_core.merging.fitting import Clip, LayerFit, fit, following_clip
from mtz_core.merging.rounding import storable
from mtz_core.network.graph import Network
from mtz_core.network.narrowing import Reduced
from mtz_core.network.tracing import trace
from mtz_core.settings import BITS, Method
from mtz_core.statistics import calibration
from mtz_core.zipped.codes import nearest
from mtz_core.zipped.ownership import Arrangement, Owners, Segment

TASKS = ("a", "b", "c")
PATTERNS: tuple[Owners, ...] = (TASKS, ("a", "b"), ("a", "c"), ("b", "c"), ("a",), ("b",), ("c",))


@dataclass(frozen=True)
class Problem:
    """One layer of three tasks: what owns its rows and columns, and what it reads in originals and zipped network."""

    networks: Mapping[str, Network]
    rows: Arrangement
    columns: Arrangement
    original: Mapping[str, Tensor]
    zipped: Mapping[str, Tensor]

    @property
    def sensitivity(self) -> dict[str, Tensor]:
        """The sensitivity of each task's loss to each of its rows."""
        widths = {task: len(network.matrix(network.graph.layers[0])) for task, network in self.networks.items()}
        return {
            task: torch.linspace(0.5, 2.0, width, dtype=torch.float64) * 10.0**i
            for i, (task, width) in enumerate(widths.items())
        }

    def weights(self, config: ZipConfig) -> dict[str, float]:
        """How much each task weighs: ``α √(mean F)``, made to sum to 1; in the paper's method ``α``."""
        alphas = dict(zip(TASKS, config.balance_of(TASKS), strict=True))
        if config.method == "paper":
            return alphas
        pulls = {task: alphas[task] * float(np.mean(rows.numpy())) ** 0.5 for task, rows in self.sensitivity.items()}
        return {task: pull / sum(pulls.values()) for task, pull in pulls.items()}

    def parts(self, config: ZipConfig) -> dict[str, LayerFit]:
        found = {}
        for task, network in self.networks.items():
            batches = [self.original[task]], [self.zipped[task]]
            found[task] = LayerFit(
                network.graph.layers[0], Reduced.whole(network), *batches, True, config, self.sensitivity[task]
            )
        return found

    def fitted(
        self, config: ZipConfig, clips: Mapping[str, Clip | None] | None = None
    ) -> tuple[dict[str, np.ndarray], float]:
        """Every task's matrix, and the cost of sharing."""
        parts = self.parts(config)
        cost = fit(parts, self.rows, self.columns, clips or dict.fromkeys(TASKS), config)
        return {task: part.matrix.numpy() for task, part in parts.items()}, cost


def arrangement(sizes: Mapping[Owners, int], generator: np.random.Generator) -> Arrangement:
    """Runs of these sizes, at places of each task that are drawn at random."""
    places = {task: generator.permutation(sum(n for o, n in sizes.items() if task in o)) for task in TASKS}
    taken = dict.fromkeys(TASKS, 0)
    segments = []
    for owners, size in sizes.items():
        segments.append(Segment(owners, {t: places[t][taken[t] : taken[t] + size] for t in owners}))
        taken = {t: taken[t] + size * (t in owners) for t in TASKS}
    return Arrangement(tuple(segment for segment in segments if segment.size))


@cache
def linear(inputs: int, outputs: int, bias: bool, seed: int) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return trace(nn.Linear(inputs, outputs, bias=bias).double(), torch.randn(2, inputs, dtype=torch.float64))


def linear_problem(
    columns: Mapping[Owners, int], rows: Mapping[Owners, int], examples: int, bias: bool = True, seed: int = 0
) -> Problem:
    generator = np.random.default_rng(seed)
    by_rows, by_columns = arrangement(rows, generator), arrangement(columns, generator)
    networks, original, zipped = {}, {}, {}
    for i, task in enumerate(TASKS):
        inputs, outputs = (sum(segment.size for segment in axis.of(task)) for axis in (by_columns, by_rows))
        networks[task] = linear(inputs, outputs, bias, seed=i)
        original[task] = torch.from_numpy(generator.normal(size=(examples + i, inputs)))
        noise = torch.from_numpy(generator.normal(size=original[task].shape))
        zipped[task] = original[task] + 0.3 * noise + 0.2
    return Problem(networks, by_rows, by_columns, original, zipped)


def with_one(x: Tensor, bias: bool) -> np.ndarray:
    rows = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1) if bias else x
    found: np.ndarray = rows.numpy()
    return found


def damped(rows: np.ndarray, config: ZipConfig) -> tuple[np.ndarray, float]:
    second = rows.T @ rows / len(rows)
    damping = config.fixed_damping * float(np.trace(second)) / len(second)
    return second + damping * np.eye(len(second)), damping


@dataclass
class Free:
    """What one task would have without the others: its best matrix, its Hessian, its weight in the sum."""

    matrix: np.ndarray
    hessian: np.ndarray
    alpha: float


def free(problem: Problem, config: ZipConfig) -> dict[str, Free]:
    found = {}
    alphas = problem.weights(config)
    for task, network in problem.networks.items():
        (node,) = network.graph.layers
        prior = network.matrix(node).numpy()
        fed, read = (with_one(x[task], node.bias is not None) for x in (problem.zipped, problem.original))
        if config.method == "paper":
            found[task] = Free(prior.copy(), damped(read, config)[0], alphas[task])
            continue
        hessian, damping = damped(fed, config)
        target = (read @ prior.T).T @ fed / len(fed) + damping * prior
        matrix = np.linalg.solve(hessian, target.T).T
        found[task] = Free(matrix, hessian, alphas[task])
    return found


def expected_fit(problem: Problem, config: ZipConfig) -> tuple[dict[str, np.ndarray], float]:
    """Every run of rows by the normal equations of all its unknowns at once, ``Σ α Eᵀ H E z = Σ α Eᵀ H s``.

    ``E`` says which unknown each task's weight is: columns that two of the run's owners share are one unknown.
    """
    alone = free(problem, config)
    matrices = {task: part.matrix.copy() for task, part in alone.items()}
    cost = 0.0
    for segment in problem.rows.segments:
        if len(segment.owners) < 2:
            continue
        unknown = unknowns(problem, segment)
        count = 1 + max(int(index.max()) for index in unknown.values())
        selections = {task: np.eye(count)[index] for task, index in unknown.items()}
        if config.method == "paper":  # what no other owner has stays as it is
            numbers = np.concatenate([np.unique(index) for index in unknown.values()])
            common = np.flatnonzero(np.bincount(numbers, minlength=count) > 1)
            own = {task: ~np.isin(index, common) for task, index in unknown.items()}
        else:
            own = {task: np.zeros(len(index), dtype=bool) for task, index in unknown.items()}
        normal, right = np.zeros((count, count)), np.zeros((count, segment.size))
        for task, selection in selections.items():
            hessian = alone[task].hessian.copy()
            hessian[own[task]], hessian[:, own[task]] = 0, 0
            weights = alone[task].matrix[segment.places[task]]
            normal += alone[task].alpha * selection.T @ hessian @ selection
            right += alone[task].alpha * selection.T @ hessian @ weights.T
        solution = np.linalg.lstsq(normal, right, rcond=None)[0].T
        for task, index in unknown.items():
            weights = np.where(own[task], alone[task].matrix[segment.places[task]], solution[:, index])
            change = weights - matrices[task][segment.places[task]]
            cost += 0.5 * alone[task].alpha * float(np.einsum("oi,ij,oj->", change, alone[task].hessian, change))
            matrices[task][segment.places[task]] = weights
    return matrices, cost


def unknowns(problem: Problem, segment: Segment) -> dict[str, np.ndarray]:
    """Which unknown each column of each owner is."""
    inputs = {task: problem.networks[task].columns(problem.networks[task].graph.layers[0]) for task in segment.owners}
    index = {task: np.full(size, -1) for task, size in inputs.items()}
    count = 0
    for part in problem.columns.segments:
        both = [task for task in segment.owners if task in part.owners]
        for task in both:
            index[task][part.places[task]] = np.arange(count, count + part.size)
        count += part.size
    for task in segment.owners:  # the bias
        index[task][index[task] < 0] = count
    return index


MIXED: dict[Owners, int] = {TASKS: 3, ("a", "b"): 2, ("b", "c"): 2, ("a", "c"): 1, ("a",): 2, ("c",): 1}
COLUMNS: dict[str, dict[Owners, int]] = {
    "all columns shared": {TASKS: 6},
    "columns of two of the three": {TASKS: 3, ("a", "b"): 2, ("b", "c"): 1, ("a", "c"): 2},
    "everything": dict.fromkeys(PATTERNS, 2),
    "one task has only its own": {("a", "b"): 3, ("a",): 1, ("c",): 4},
    "nothing shared": {("a",): 3, ("b",): 2, ("c",): 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("examples", [40, 4], ids=["many rows", "few rows"])
@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("method", ["paper", "refit"])
def test_three_tasks_get_the_solution_of_the_joint_normal_equations(
    method: Method, name: str, examples: int, bias: bool
) -> None:
    config = ZipConfig(method=method, damping=0.05, refit_rounds=0, balance={"a": 0.5, "b": 0.2, "c": 0.3})
    problem = linear_problem(COLUMNS[name], MIXED, examples, bias)
    found, cost = problem.fitted(config)
    expected, expected_cost = expected_fit(problem, config)
    for task in TASKS:
        np.testing.assert_allclose(found[task], expected[task], rtol=1e-6, atol=1e-8)
    assert cost == pytest.approx(expected_cost, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("method", ["paper", "refit"])
def test_what_is_shared_is_equal_and_what_a_row_of_one_task_has_is_its_own(method: Method) -> None:
    problem = linear_problem(COLUMNS["everything"], MIXED, 40)
    config = ZipConfig(method=method, refit_rounds=0)
    found, _ = problem.fitted(config)
    alone = free(problem, config)
    for segment in problem.rows.segments:
        strips = {task: found[task][segment.places[task]] for task in segment.owners}
        for part in problem.columns.segments:
            both = [task for task in segment.owners if task in part.owners]
            for task in both:
                one, other = (strips[owner][:, part.places[owner]] for owner in (both[0], task))
                assert np.array_equal(one, other)
        for task in segment.owners:
            if len(segment.owners) == 1:
                np.testing.assert_allclose(
                    strips[task], alone[task].matrix[segment.places[task]], rtol=1e-9, atol=1e-12
                )
            assert np.array_equal(strips[task][:, -1], strips[segment.owners[0]][:, -1])


def relaxed_loss(
    problem: Problem, found: Mapping[str, np.ndarray], config: ZipConfig, clips: Mapping[str, Clip]
) -> float:
    """What the sweeps lower: the squared distance to the nearest targets, damping included."""
    total = 0.0
    for task, part in free(problem, config).items():
        prior = problem.networks[task].matrix(problem.networks[task].graph.layers[0]).numpy()
        fed, read = with_one(problem.zipped[task], True), with_one(problem.original[task], True)
        outputs, targets = torch.from_numpy(fed @ found[task].T), torch.from_numpy(read @ prior.T)
        distance = clips[task].nearest_target(targets, outputs) - outputs
        drift = damped(fed, config)[1] * ((found[task] - prior) ** 2).sum()
        total += part.alpha * (float(distance.square().sum()) / len(fed) + float(drift))
    return total


@pytest.mark.parametrize("name", ["everything", "all columns shared"])
def test_sweeps_never_raise_the_loss_of_three_tasks(name: str) -> None:
    problem = linear_problem(COLUMNS[name], MIXED, 60)
    clips = {}
    for task, network in problem.networks.items():
        width = len(network.matrix(network.graph.layers[0]))
        generator = torch.Generator().manual_seed(1)
        threshold = torch.randn(width, generator=generator, dtype=torch.float64)
        clips[task] = Clip(threshold, torch.rand(width, generator=generator) > 0.5)
    losses = []
    for refit_rounds in (0, 1, 2, 5):
        config = ZipConfig(refit_rounds=refit_rounds)
        losses.append(relaxed_loss(problem, problem.fitted(config, clips)[0], config, clips))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.95 * losses[0]


# Convolutions in groups


@cache
def grouped(inputs: int, outputs: int, groups: int, bias: bool, seed: int) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups, bias=bias)
        return trace(layer.double(), torch.randn(2, inputs, 5, 4, dtype=torch.float64))


def grouped_problem(per_group: tuple[int, int], groups: Sequence[int], bias: bool) -> Problem:
    """Three convolutions, each with so many groups of so many inputs and outputs; shared rows lie anywhere."""
    generator = np.random.default_rng(4)
    inputs, outputs = per_group
    places = {task: generator.permutation(outputs * count) for task, count in zip(TASKS, groups, strict=True)}
    shared = {TASKS: slice(0, 3), ("a", "c"): slice(3, 5)}
    rows = [Segment(owners, {task: places[task][part] for task in owners}) for owners, part in shared.items()]
    rows += [Segment((task,), {task: places[task][3 if task == "b" else 5 :]}) for task in TASKS]
    kernel = np.arange(inputs * 9)
    networks = {
        task: grouped(inputs * count, outputs * count, count, bias, seed)
        for seed, (task, count) in enumerate(zip(TASKS, groups, strict=True))
    }
    original = {
        task: torch.from_numpy(generator.normal(size=(6, inputs * count, 5, 4)))
        for task, count in zip(TASKS, groups, strict=True)
    }
    zipped = {task: x + 0.3 * torch.from_numpy(generator.normal(size=x.shape)) for task, x in original.items()}
    columns = Arrangement((Segment(TASKS, dict.fromkeys(TASKS, kernel)),))
    return Problem(networks, Arrangement(tuple(rows)), columns, original, zipped)


def expected_grouped_fit(
    problem: Problem, config: ZipConfig, groups: Sequence[int]
) -> tuple[dict[str, np.ndarray], float]:
    """Row by row, each with the Hessian of the group that it reads."""
    matrices, hessians, alphas = {}, {}, problem.weights(config)
    for task, count in zip(TASKS, groups, strict=True):
        network = problem.networks[task]
        (node,) = network.graph.layers
        prior = network.matrix(node).numpy()
        per_group = len(prior) // count
        fed, read = (unfolded(x[task], count, node.bias is not None) for x in (problem.zipped, problem.original))
        chosen = read if config.method == "paper" else fed
        damping = config.fixed_damping * float((chosen**2).sum()) / chosen[0].size / count
        second = [rows.T @ rows / len(rows) for rows in chosen]
        hessians[task] = [matrix + damping * np.eye(len(matrix)) for matrix in second]
        matrices[task] = prior.copy()
        if config.method == "refit":
            for row, weights in enumerate(prior):
                hessian, x, x_hat = (part[row // per_group] for part in (hessians[task], read, fed))
                target = x_hat.T @ (x @ weights) / len(x) + damping * weights
                matrices[task][row] = np.linalg.solve(hessian, target)
    cost = 0.0
    for segment in problem.rows.segments:
        for i in range(segment.size if len(segment.owners) > 1 else 0):
            terms = []
            for task in segment.owners:
                row = int(segment.places[task][i])
                group = row // (len(matrices[task]) // groups[TASKS.index(task)])
                terms.append((task, row, alphas[task] * hessians[task][group]))
            left = sum(hessian for _, _, hessian in terms)
            right = sum(hessian @ matrices[task][row] for task, row, hessian in terms)
            common = np.linalg.solve(left, right)
            for task, row, hessian in terms:
                change = common - matrices[task][row]
                cost += 0.5 * float(change @ hessian @ change)
                matrices[task][row] = common
    return matrices, cost


def unfolded(x: Tensor, groups: int, bias: bool) -> np.ndarray:
    """The rows of each group, [groups, rows, inputs]."""
    patches = F.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1)
    split = patches.reshape(len(patches), groups, -1).transpose(0, 1)
    found: np.ndarray = (torch.cat([split, torch.ones_like(split[..., :1])], dim=2) if bias else split).numpy()
    return found


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(
    ("per_group", "groups"),
    [((1, 1), (6, 5, 7)), ((1, 2), (4, 3, 3)), ((2, 3), (3, 2, 2))],
    ids=["depthwise", "depthwise, two outputs each", "grouped"],
)
@pytest.mark.parametrize("method", ["paper", "refit"])
def test_convolutions_in_groups_are_shared_row_by_row(
    monkeypatch: pytest.MonkeyPatch, method: Method, per_group: tuple[int, int], groups: Sequence[int], bias: bool
) -> None:
    config = ZipConfig(method=method, damping=0.05, refit_rounds=0, patches=10_000)
    monkeypatch.setattr(calibration, "FEWEST", config.patches)
    problem = grouped_problem(per_group, groups, bias)
    found, cost = problem.fitted(config)
    expected, expected_cost = expected_grouped_fit(problem, config, groups)
    for task in TASKS:
        np.testing.assert_allclose(found[task], expected[task], rtol=1e-6, atol=1e-8)
    assert cost == pytest.approx(expected_cost, rel=1e-6)


# What the following activation cannot tell apart


def normalised(scale: Sequence[float] | None, floor: nn.Module) -> tuple[nn.Sequential, nn.BatchNorm1d]:
    norm = nn.BatchNorm1d(len(scale) if scale else 4, affine=scale is not None)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.3, 2.0)
    if scale is not None:
        with torch.no_grad():
            norm.weight.copy_(torch.tensor(scale))
        nn.init.normal_(norm.bias)
    network = nn.Sequential(nn.Linear(5, norm.num_features), norm, floor, nn.Linear(norm.num_features, 2))
    return network.double().eval(), norm


@pytest.mark.slow
@pytest.mark.parametrize("scale", [(1.5, -0.7, 0.0, 2.0, -3.0, 0.0), None], ids=["affine", "not affine"])
def test_targets_behind_a_batch_normalisation_are_the_nearest_that_make_the_same(scale: Sequence[float] | None) -> None:
    network, norm = normalised(scale, nn.ReLU())
    traced = trace(network, torch.randn(2, 5, dtype=torch.float64))
    clip = following_clip(traced, traced.graph.layers[0])
    assert clip is not None
    width = norm.num_features
    y, y_hat = (3 * torch.randn(12, width, dtype=torch.float64) for _ in range(2))
    target = clip.nearest_target(y, y_hat)
    grid = torch.linspace(-15, 15, 6001, dtype=torch.float64)

    @torch.no_grad()
    def seen(values: Tensor) -> Tensor:
        return norm(values).relu()

    everywhere = seen(grid[:, None].expand(-1, width))
    for neuron in range(width):
        for target_i, y_i, y_hat_i in zip(target[:, neuron], y[:, neuron], y_hat[:, neuron], strict=True):
            made = seen(torch.stack([target_i, y_i])[:, None].expand(-1, width))[:, neuron]
            torch.testing.assert_close(made[0], made[1], rtol=0, atol=1e-9)
            same = grid[(everywhere[:, neuron] - made[1]).abs() < 1e-9]
            nearest = min([float((value - y_hat_i).abs()) for value in same], default=float("inf"))
            assert float((target_i - y_hat_i).abs()) <= min(nearest, float((y_i - y_hat_i).abs())) + 1e-9


def test_targets_before_a_relu() -> None:
    traced = trace(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 5))
    clip = following_clip(traced, traced.graph.layers[0])
    assert clip is not None
    y, y_hat = torch.tensor([[-1.0, -1, 2, 0]]), torch.tensor([[-3.0, 5, -1, 2]])
    assert clip.nearest_target(y, y_hat).tolist() == [[-3, 0, 2, 0]]


class Twice(nn.Module):
    """Something else reads the layer's output, too, or the normalisation's."""

    def __init__(self, behind_norm: bool) -> None:
        super().__init__()
        self.layer, self.norm, self.out = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.behind_norm = behind_norm

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        y = self.norm(x)
        out: Tensor = self.out(y.relu() + (y if self.behind_norm else x))
        return out


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)),
        nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)),
        nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2)),
        nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)),
        nn.Sequential(nn.Linear(5, 4)),
        Twice(behind_norm=True),
        Twice(behind_norm=False),
    ],
    ids=["tanh", "norm, tanh", "layer norm", "norm at the end", "at the end", "norm read twice", "layer read twice"],
)
def test_nothing_else_is_clipped(network: nn.Module) -> None:
    traced = trace(network.eval(), torch.randn(2, 5))
    assert following_clip(traced, traced.graph.layers[0]) is None


@pytest.mark.parametrize("positions", [4, 5])
def test_a_normalisation_of_positions_is_none_of_neurons(positions: int) -> None:
    """BatchNorm1d normalises the second axis, on which a linear layer's neurons do not lie."""
    network = nn.Sequential(
        *(nn.Linear(6, 5), nn.BatchNorm1d(positions), nn.ReLU(), nn.Flatten(), nn.Linear(5 * positions, 3))
    ).eval()
    x = torch.randn(30, positions, 6)
    traced = trace(network, x)
    assert following_clip(traced, traced.graph.layers[0]) is None
    other = copy.deepcopy(network)
    nn.init.normal_(other.get_parameter("0.weight"))
    zip_networks({"a": network, "b": other}, {"a": x, "b": x}, ZipConfig())


class PerPosition(nn.Module):
    """Two layers that act on every position alone; examples may lie on the second axis in between."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.hidden, self.last, self.turned = nn.Linear(4, 6), nn.Linear(6, 3), turned

    def forward(self, x: Tensor) -> Tensor:
        if not self.turned:
            out: Tensor = self.last(self.hidden(x).relu())
            return out
        out = self.last(self.hidden(x.transpose(0, 1)).relu()).transpose(0, 1)
        return out


@pytest.mark.parametrize("config", [ZipConfig(method="paper"), ZipConfig()], ids=["paper", "refit"])
def test_examples_may_lie_on_any_axis_in_batches_of_any_sizes(config: ZipConfig) -> None:
    torch.manual_seed(0)
    states = {task: PerPosition(False).state_dict() for task in ("a", "b")}
    x, found = torch.randn(40, 5, 4), []
    for turned in (False, True):
        networks = {task: PerPosition(turned).eval() for task in states}
        for task, network in networks.items():
            network.load_state_dict(states[task])
        data = {task: x.split([16, 13, 11]) for task in networks}
        found.append(zip_networks(networks, calibration=data, validation=data, config=config))
    for task in states:
        torch.testing.assert_close(found[0](x, task), found[1](x, task), rtol=1e-3, atol=1e-4)


# Rounding


ALL_BITS: dict[Owners, int] = {TASKS: 4, ("a", "b"): 3, ("b", "c"): 8, ("a", "c"): 2, ("a",): 5, ("c",): 6}
GROUPS = (3, 4, 3)
on_problems = pytest.mark.parametrize(
    "problem",
    [
        *(linear_problem(columns, MIXED, 40) for columns in COLUMNS.values()),
        linear_problem(COLUMNS["everything"], MIXED, 4),
        linear_problem(COLUMNS["everything"], MIXED, 40, bias=False),
        grouped_problem((2, 2), GROUPS, bias=True),
        grouped_problem((1, 2), GROUPS, bias=False),
    ],
    ids=[*COLUMNS, "few rows", "no bias", "in groups", "depthwise, no bias"],
)


def correlated(problem: Problem) -> Problem:
    """The same, but that all inputs rise and fall together."""

    def mixed(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {task: x + x.mean(dim=1, keepdim=True) * x.shape[1] ** 0.5 for task, x in values.items()}

    return replace(problem, original=mixed(problem.original), zipped=mixed(problem.zipped))


@dataclass
class Rounded:
    """The parts of a problem, fitted and rounded, and their matrices before that."""

    parts: Mapping[str, LayerFit]
    before: Mapping[str, Tensor]
    free: int

    def error(self, task: str) -> Tensor:
        return self.parts[task].matrix - self.before[task]

    def hessian(self, task: str, rows: np.ndarray) -> Tensor:
        """The Hessian of each of these rows."""
        part = self.parts[task]
        assert part.hessian is not None
        dense = part.hessian.dense()
        if part.conv_groups == 1:
            return dense.expand(len(rows), -1, -1)
        return dense[torch.from_numpy(rows) // (len(part.matrix) // part.conv_groups)]

    def pull(self, task: str, rows: np.ndarray) -> Tensor:
        """How the loss rises with each weight of these rows."""
        return (self.hessian(task, rows) @ self.error(task)[rows][..., None])[..., 0]

    def cost(self, task: str, rows: np.ndarray, error: Tensor) -> float:
        return 0.5 * float((error * (self.hessian(task, rows) @ error[..., None])[..., 0]).sum())


def rounded(problem: Problem, bits: Mapping[Owners, int], config: ZipConfig) -> Rounded:
    plain, parts = problem.parts(config), problem.parts(config)
    fit(plain, problem.rows, problem.columns, dict.fromkeys(TASKS), config)
    fit(parts, problem.rows, problem.columns, dict.fromkeys(TASKS), config, bits)
    free = int(parts["a"].node.bias is not None)
    return Rounded(parts, {task: part.matrix for task, part in plain.items()}, free)


def weights_of(matrix: Tensor, free: int) -> Tensor:
    return matrix[:, : matrix.shape[1] - free]


def plainly(found: Rounded, task: str, rows: np.ndarray, bits: int) -> Tensor:
    """The error of rounding these rows to nearest, with the same scales."""
    part, before = found.parts[task], found.before[task][rows]
    error = torch.zeros_like(before)
    weights = weights_of(before, found.free)
    weights_of(error, found.free).copy_(nearest(weights, part.scales[rows][:, None], bits) - weights)
    return error


@on_problems
def test_rounded_rows_lie_on_one_grid_for_all_tasks_that_share_them(problem: Problem) -> None:
    found = rounded(problem, ALL_BITS, ZipConfig(refit_rounds=0))
    for segment in problem.rows.segments:
        bits = ALL_BITS.get(segment.owners)
        scales = []
        for task in segment.owners:
            part, rows = found.parts[task], segment.places[task]
            scales.append(part.scales[rows])
            if bits is None:
                assert not scales[-1].any()
                assert torch.equal(part.matrix[rows], found.before[task][rows])
                continue
            assert part.changed
            assert torch.equal(scales[-1], storable(scales[-1]))
            assert bool((scales[-1] > 0).all())
            weights = weights_of(part.matrix[rows], found.free)
            assert torch.equal(weights, nearest(weights, scales[-1][:, None], bits))
        assert all(torch.equal(own, scales[0]) for own in scales)


@on_problems
def test_what_is_shared_stays_equal_when_it_is_rounded(problem: Problem) -> None:
    found = rounded(problem, ALL_BITS, ZipConfig(refit_rounds=0))
    for segment in problem.rows.segments:
        strips = {task: found.parts[task].matrix[segment.places[task]] for task in segment.owners}
        first = strips[segment.owners[0]]
        for part in problem.columns.segments:
            both = [task for task in segment.owners if task in part.owners]
            for task in both:
                one, other = (strips[owner][:, part.places[owner]] for owner in (both[0], task))
                assert torch.equal(one, other)
        if found.free:
            assert all(torch.equal(own[:, -1], first[:, -1]) for own in strips.values())


@on_problems
def test_the_biases_of_own_rows_answer_exactly(problem: Problem) -> None:
    """Whatever the rounded weights lose, no other bias would lose less."""
    found = rounded(problem, ALL_BITS, ZipConfig(refit_rounds=0))
    for segment in problem.rows.segments:
        if len(segment.owners) == 1 and segment.owners in ALL_BITS and found.free:
            (task,) = segment.owners
            pull = found.pull(task, segment.places[task])
            assert float(pull[:, :-1].abs().max()) > 1e-4
            torch.testing.assert_close(pull[:, -1], torch.zeros_like(pull[:, -1]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["all columns shared", "in groups"])
def test_the_biases_of_shared_rows_answer_to_all_their_tasks_together(name: str) -> None:
    """Nothing of these rows is a task's own: the pulls of the tasks, as they weigh, cancel."""
    problem = grouped_problem((2, 2), GROUPS, True) if name == "in groups" else linear_problem(COLUMNS[name], MIXED, 40)
    config = ZipConfig(refit_rounds=0, balance={"a": 0.5, "b": 0.2, "c": 0.3})
    found, alphas = rounded(problem, ALL_BITS, config), problem.weights(config)
    for segment in problem.rows.segments:
        if len(segment.owners) > 1:
            pulls = [alphas[task] * found.pull(task, segment.places[task])[:, -1] for task in segment.owners]
            assert float(pulls[0].abs().max()) > 1e-6
            torch.testing.assert_close(sum(pulls), torch.zeros_like(pulls[0]), rtol=0, atol=1e-10)


@pytest.mark.slow
def test_rounding_costs_less_than_to_nearest_all_tasks_together() -> None:
    config = ZipConfig(refit_rounds=0)
    costs: dict[str, list[float]] = {"found": [], "plain": []}
    for seed in range(6):
        for name in COLUMNS:
            problem = correlated(linear_problem(COLUMNS[name], MIXED, 40, seed=seed))
            found, alphas = rounded(problem, ALL_BITS, config), problem.weights(config)
            for segment in problem.rows.segments:
                if segment.owners in ALL_BITS:
                    both = np.zeros(2)
                    for task in segment.owners:
                        rows = segment.places[task]
                        errors = found.error(task)[rows], plainly(found, task, rows, ALL_BITS[segment.owners])
                        both += [alphas[task] * found.cost(task, rows, error) for error in errors]
                    costs["found"].append(both[0])
                    costs["plain"].append(both[1])
    assert sum(costs["found"]) < 0.7 * sum(costs["plain"])
    assert np.mean(np.array(costs["found"]) < costs["plain"]) > 0.85


def test_a_tasks_own_weights_answer_to_what_is_rounded_for_all() -> None:
    """They lose less than they would if they were rounded where they are."""
    problem, config = correlated(linear_problem(COLUMNS["everything"], MIXED, 40)), ZipConfig(refit_rounds=0)
    found = rounded(problem, dict.fromkeys(ALL_BITS, 3), config)
    answered, still = 0.0, 0.0
    for segment in problem.rows.segments:
        if len(segment.owners) < 2:
            continue
        for task in segment.owners:
            rows = segment.places[task]
            own = np.concatenate(
                [c.places[task] for c in problem.columns.of(task) if {*c.owners} & {*segment.owners} == {task}]
            )
            error = found.error(task)[rows]
            other = error.clone()
            other[:, own] = plainly(found, task, rows, 3)[:, own]
            answered, still = answered + found.cost(task, rows, error), still + found.cost(task, rows, other)
    assert 0 < answered < 0.8 * still


def test_the_scale_of_shared_rows_is_the_best_for_the_task_that_counts_most() -> None:
    """Where no input is shared, nothing but the scale is common."""
    costs = []
    for heavy in (0.98, 0.01):
        config = ZipConfig(refit_rounds=0, balance={"a": heavy, "b": (1 - heavy) / 2, "c": (1 - heavy) / 2})
        total = 0.0
        for seed in range(4):
            problem = linear_problem(COLUMNS["nothing shared"], {TASKS: 6}, 40, bias=False, seed=seed)
            found = rounded(problem, {TASKS: 2}, config)
            total += found.cost("a", np.arange(6), found.error("a"))
        costs.append(total)
    assert costs[0] < 0.95 * costs[1]


@pytest.mark.slow
@on_problems
def test_eight_bits_hardly_change_a_layer_and_each_bit_less_changes_it_more(problem: Problem) -> None:
    config = ZipConfig(refit_rounds=0)
    costs = []
    for bits in BITS:
        found = rounded(problem, dict.fromkeys((s.owners for s in problem.rows.segments), bits), config)
        costs.append(
            sum(found.cost(task, np.arange(len(part.matrix)), found.error(task)) for task, part in found.parts.items())
        )
        if bits == 8:
            size = sum(float(matrix.square().sum()) for matrix in found.before.values())
            change = sum(float(found.error(task).square().sum()) for task in TASKS)
            assert change < 1e-3 * size
    assert all(1.2 * more < few for more, few in itertools.pairwise(costs))
    assert costs[0] < 1e-3 * costs[-1]


def test_rows_that_nothing_feeds_are_rounded_to_nearest() -> None:
    """A layer that stays as it is because positions before it are gone has no Hessian; biases then stay."""
    problem = linear_problem({("a",): 3, ("b",): 2, ("c",): 4}, {("a",): 4, ("b",): 3, ("c",): 2}, 10)
    parts = problem.parts(ZipConfig())
    for part in parts.values():
        part.hessian = None
    before = {task: part.matrix.clone() for task, part in parts.items()}
    bits: dict[Owners, int] = {("a",): 4, ("b",): 8}
    fit(parts, problem.rows, problem.columns, dict.fromkeys(TASKS), ZipConfig(), bits)
    for (task,), own in bits.items():
        weights = before[task][:, :-1]
        assert torch.equal(parts[task].matrix[:, :-1], nearest(weights, parts[task].scales[:, None], own))
        assert torch.equal(parts[task].matrix[:, -1], before[task][:, -1])
    assert torch.equal(parts["c"].matrix, before["c"])


@pytest.mark.parametrize("name", ["everything", "all columns shared"])
def test_rounding_is_done_part_by_part(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, config = linear_problem(COLUMNS[name], MIXED, 40), ZipConfig(refit_rounds=0)
    whole = rounded(problem, ALL_BITS, config)
    monkeypatch.setattr("mtz_core.statistics.linalg.CHUNK", 1)
    parts = rounded(problem, ALL_BITS, config)
    for task in TASKS:
        torch.testing.assert_close(parts.parts[task].matrix, whole.parts[task].matrix, rtol=1e-9, atol=1e-12)
