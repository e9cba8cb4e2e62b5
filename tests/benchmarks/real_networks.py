"""Networks that nobody here trained, made smaller by every way: ``python -m tests.benchmarks.real_networks``.

The groups of `examples/real`, whose files `python -m examples.real` makes (`make bench-real` does both). Every way gets
the same bytes, as files hold them, the same calibration inputs and the same light retraining: distillation from the
originals, no labels. Every measurement is kept, so a run that is stopped goes on where it was. At the end it writes
`docs/benchmarks/real-networks.md` with its figures.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from examples.real.__main__ import FOLDER
from examples.real.networks import content_type, face, landmark_error
from mtz_core import Budget, Output, RetrainConfig, ZipConfig, zip_networks
from mtz_core.errors import InvalidConfig
from mtz_core.evaluation import outputs_of
from mtz_core.merging.judging import judge, targets_of
from mtz_core.merging.walk import finish, merge, trace_task
from mtz_core.planning.search import BudgetSearch, Candidate
from mtz_core.retraining import Retraining, Targets, original_outputs
from mtz_core.settings import MOVES, Move
from mtz_core.statistics.calibration import as_batches
from mtz_core.statistics.traced import Traced
from mtz_core.zipped.structure import scale_name
from tasks.data.examples import read_images
from tests.benchmarks import real_page
from tests.benchmarks.records import Records
from tests.benchmarks.rivals.library_pruning import Importance, pruned
from tests.benchmarks.rivals.single_weights import Compressed, rounded, sparse

SIZES = (0.9, 0.75, 0.5, 0.25, 0.125)
LARGE = SIZES[:3]
"""Sizes that are reached without rounding."""

IMAGES = 300
RETRAINING = RetrainConfig(iterations=80, batch_size=16, validate_every=10, patience=5)
"""As in `examples/real/fleet.yaml`."""


Way = Callable[["Case", float], Compressed]
"""Makes the networks of a group so small."""


@dataclass(frozen=True)
class Task:
    """A network of a group: how to build it, and what its outputs mean."""

    build: Callable[[], nn.Module]
    output: Output

    def network(self, name: str) -> nn.Module:
        module = self.build()
        module.load_state_dict(load_file(FOLDER / "networks" / f"{name}.safetensors"))
        return module.eval()


@dataclass(frozen=True)
class Group:
    """Networks that are zipped together.

    Attributes:
        data: The folder of their inputs.
        tasks: The networks by name.
        ways: Ways for this group alone.
    """

    data: str
    tasks: Mapping[str, Task]
    ways: Mapping[str, Way] = field(default_factory=dict)


GROUPS: Mapping[str, Group] = {
    "faces": Group(
        "faces",
        {
            "expression": Task(partial(face, 7), Output("logits")),
            "landmarks": Task(partial(face, 136), Output("regression", tolerance=0.0089)),
        },
        {real_page.WEIGHED: lambda case, size: case.weighed(size, {"expression": 1.0, "landmarks": 8.0})},
    ),
    "files": Group(
        "files",
        {
            "magika-3-2": Task(content_type, Output("logits")),
            "magika-3-3": Task(content_type, Output("logits")),
        },
    ),
}


class Case:
    """A group with its networks and inputs, which all ways are given."""

    def __init__(self, group: Group) -> None:
        folder = FOLDER / "data" / group.data
        inputs = {split: read_images(folder, split) for split in ("train", "validation", "test")}
        self.outputs = {task: own.output for task, own in group.tasks.items()}
        self.networks = {task: own.network(task) for task, own in group.tasks.items()}
        self.training = dict.fromkeys(group.tasks, inputs["train"])
        self.validation = dict.fromkeys(group.tasks, inputs["validation"])
        self.calibration = dict.fromkeys(group.tasks, read_images(folder, "train", IMAGES))
        self.test = {task: as_batches(inputs["test"], task) for task in group.tasks}
        batches = {task: as_batches(inputs["train"], task) for task in group.tasks}
        self.traced = {
            task: Traced(
                trace_task(task, self.networks[task], own[0], ZipConfig()), batches=own, output=self.outputs[task]
            )
            for task, own in batches.items()
        }
        self.targets = targets_of(self.traced, self.test)

    @cached_property
    def measured(self) -> dict[str, Traced]:
        """The networks with what is measured of them on calibration inputs, once for all plans."""
        found = {}
        for task, inputs in self.calibration.items():
            network = self.traced[task].network
            found[task] = Traced.measured(network, as_batches(inputs, task), ZipConfig(), self.outputs[task])
        return found

    def search_with(self, moves: Sequence[Move], balance: Mapping[str, float] | None = None) -> BudgetSearch:
        """Makes plans with these moves, with what each task loses counted so much."""
        budget = Budget(size=1.0, moves=moves)
        return BudgetSearch(self.measured, ZipConfig(budget=budget, outputs=self.outputs, balance=balance), budget)

    @cached_property
    def search(self) -> BudgetSearch:
        """Makes plans with all moves, for all sizes."""
        return self.search_with(MOVES)

    @cached_property
    def unrounded(self) -> BudgetSearch:
        """Makes plans that round nothing."""
        return self.search_with(("share", "drop"))

    @cache  # noqa: B019 -- there are two cases, and they live as long as the command
    def candidates(self, size: float) -> list[Candidate]:
        """Plans that round nothing, merged and judged on calibration inputs that are held out."""
        return list(self.unrounded.candidates(size))

    def best(self, size: float, names: str = "") -> Candidate:
        """The best of the plans whose names begin so. Raises `InvalidConfig` if there are none."""
        if names == DROP and not self.unrounded.planner.reaches(size, {"drop"}):
            raise InvalidConfig(f"dropping alone does not reach {100 * size:g} % of the bytes.")
        return self.unrounded.best_of(one for one in self.candidates(size) if one.name.startswith(names))

    def planned(self, size: float) -> Compressed:
        """Zipped by this project, by the best plan."""
        found = self.search.zip(self.search.best(size))
        return Compressed(found, found.report.stored_bytes)

    def quantised(self, bits: int) -> Compressed:
        """Each network alone, all weights in so many bits, by this project's optimal brain quantisation."""
        plan, traced = self.search.planner.whole(), self.search.traced
        every = {
            scale_name(node.name, (task,)): bits for task, own in traced.items() for node in own.network.graph.layers
        }
        found = finish(merge(traced, plan.pairings, self.search.config, (), plan.keep, {}, every))
        return Compressed(found, found.report.stored_bytes)

    def without_rounding(self, size: float, names: str = "") -> Compressed:
        """Zipped by this project, by the best of these plans that round nothing."""
        found = self.unrounded.zip(self.best(size, names).plan)
        return Compressed(found, found.report.stored_bytes)

    def weighed(self, size: float, balance: Mapping[str, float]) -> Compressed:
        """Zipped by this project, with the loss of one task counted more than that of another."""
        search = self.search_with(("share", "drop"), balance)
        found = search.zip(search.best(size))
        return Compressed(found, found.report.stored_bytes)

    def shared(self) -> Compressed:
        """Zipped by this project: everything that can be shared is."""
        found = zip_networks(self.networks, self.calibration, ZipConfig(outputs=self.outputs))
        return Compressed(found, found.report.stored_bytes)

    def pruned(self, size: float, importance: Importance) -> Compressed:
        """Each network pruned alone by a library."""
        kinds = {task: "logits" if output.kind == "logits" else "regression" for task, output in self.outputs.items()}
        found = pruned(self.networks, self.calibration, size, importance=importance, outputs=kinds)  # type: ignore[arg-type]
        return Compressed(found, found.report.stored_bytes)

    def judged(self, compressed: Compressed) -> dict[str, dict[str, float]]:
        """How every task fares on the test inputs."""
        reports = judge(compressed.zipped, self.traced, self.test, self.targets)
        compressed.zipped.judged(reports)
        found = {}
        for task, report in reports.items():
            found[task] = {"lost": report.lost, "agreement": report.agreement}
            if report.output == "regression":
                outputs = outputs_of(partial(compressed.zipped, task=task), self.test[task])
                found[task]["pixels"] = landmark_error(outputs, self.targets[task])
        return found

    @cached_property
    def teachers(self) -> Targets:
        """The originals' outputs for all inputs of light retraining."""
        return original_outputs(self.networks, self.training, self.validation)

    def retrain(self, compressed: Compressed) -> int:
        """Retrain lightly; return the iterations after which the network was best."""
        data = (self.networks, self.training, self.validation)
        run = Retraining(compressed.zipped, *data, RETRAINING, outputs=self.teachers)
        return max(step.iteration for step in run.steps() if step.best)


DROP = "drop only"
"""What the names of plans without sharing begin with."""

WAYS: Mapping[str, Way] = {
    real_page.UNROUNDED: lambda case, size: case.without_rounding(size),
    real_page.DROP: lambda case, size: case.without_rounding(size, DROP),
    "pruned by torch-pruning": lambda case, size: case.pruned(size, "curvature"),
    "neurons pruned by magnitude": lambda case, size: case.pruned(size, "magnitude"),
    "single weights pruned by magnitude": lambda case, size: sparse(case.networks, case.calibration, size),
}
"""Ways that reach any size, by their names in the tables."""

OWN_SIZES: Mapping[str, Callable[[Case], Compressed]] = {
    "this project, everything shared": lambda case: case.shared(),
    real_page.ROUNDED.format(8): lambda case: rounded(case.networks, case.calibration, 8),
    real_page.ROUNDED.format(4): lambda case: rounded(case.networks, case.calibration, 4),
    real_page.QUANTISED.format(8): lambda case: case.quantised(8),
    real_page.QUANTISED.format(4): lambda case: case.quantised(4),
}
"""Ways with a size of their own."""


def measure(name: str, case: Case, records: Records, retraining: bool) -> None:
    """Measure one group by every way that has not been."""
    ways = {**WAYS, **GROUPS[name].ways}
    todo: list[tuple[str, float | None, Callable[[], Compressed]]] = [
        *((real_page.OURS, size, partial(Case.planned, case, size)) for size in SIZES),
        *((way, size, partial(make, case, size)) for way, make in ways.items() for size in LARGE),
        *((way, None, partial(make, case)) for way, make in OWN_SIZES.items()),
    ]
    for way, size, make in todo:
        retrained = retraining and "bits" not in way
        if records.has(group=name, way=way, size=size, retrained=retrained):
            continue
        row: dict[str, Any] = {"group": name, "way": way, "size": size, "retrained": retrained}
        started = time.process_time()
        try:
            if way == real_page.DROP and size is not None and case.best(size, DROP) is case.best(size):
                (planned,) = records.where(group=name, way=real_page.UNROUNDED, size=size, retrained=retrained)
                records.add(planned | {"way": way})  # the same plan: the same network
                continue
            compressed = make()
        except InvalidConfig as error:
            records.add(row | {"impossible": str(error)})
            print(f"{name}, {way}, {size}: {error}", flush=True)
            continue
        row["seconds"] = round(time.process_time() - started, 1)
        original = sum(own.network.bytes for own in case.traced.values())
        row |= {"bytes": compressed.bytes, "stored": compressed.bytes / original, "before": case.judged(compressed)}
        if retrained:
            row["best_iteration"] = case.retrain(compressed)
            row["after"] = case.judged(compressed)
        records.add(row)
        print(f"{name}: {real_page.line(row)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="*", choices=GROUPS, default=list(GROUPS), help="what to measure")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-retraining", action="store_true", help="only what is measured before light retraining")
    parser.add_argument("--fresh", action="store_true", help="measure again what was measured before")
    options = parser.parse_args()
    if not (FOLDER / "networks").is_dir():
        sys.exit(f"error: {FOLDER} has no networks. Make them: python -m examples.real")
    torch.set_num_threads(options.threads)
    records = Records("real-networks", "full", options.fresh)
    for name in options.groups:
        measure(name, Case(GROUPS[name]), records, not options.no_retraining)
    print(f"table and figures: {real_page.write(records)}")


if __name__ == "__main__":
    main()
