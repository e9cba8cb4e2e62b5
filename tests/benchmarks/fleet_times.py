"""Time, overhead and memory of a fleet of a hundred networks in fifty groups, run by `make bench-fleet`.

    python -m tests.benchmarks.fleet_times [--groups 50] [--part local|cluster]

In fresh projects with services of their own. Part *local*: everything with one worker; everything with two; again with
nothing to do; again after three networks were fine-tuned. Part *cluster*: up to twenty groups with two workers of one
process, and on a Dask cluster of two workers that share nothing with the rest but S3 and the registry. Figures are kept
in `.mtz/benchmarks/fleet-times.json`; docs/benchmarks/fleet.md has what was measured with all groups. Ends with status
1 if a group fails, a group runs that has nothing to do, or two ways of running do not come to the same content.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.files import read_json, whole_file, write_json
from tests.benchmarks.fleet_of_models import GROUP_SIZE, Fleet, fine_tune, make_fleet
from tests.benchmarks.fleet_project import Run, clone, copy_project, with_settings
from tests.benchmarks.records import DOCS
from tests.benchmarks.training import CACHE

GROUPS = 50
GROUPS_ON_CLUSTER = 20
CHANGED = 3
DOCUMENT = "fleet.md"
FIGURES = "fleet-times.json"

_GIB = 1 << 30


class Wrong(Exception):
    """A run has not done what it should have done."""


@dataclass(frozen=True)
class Measured:
    """One run: what it was, and what came of it."""

    name: str
    run: Run

    @property
    def groups(self) -> Sequence[dict[str, Any]]:
        """What the report says of each group."""
        return list(self.run.report.get("groups", ()))

    @property
    def counts(self) -> Counter[str]:
        """How many groups ended how."""
        return Counter(group["status"] for group in self.groups)

    @property
    def digests(self) -> dict[str, str]:
        """The content that each group came to."""
        return {group["group"]: group["content_digest"] for group in self.groups}

    @property
    def merged(self) -> Sequence[dict[str, Any]]:
        """The groups that had something to do."""
        return [group for group in self.groups if group["status"] == "merged"]


def measure_here(folder: Path, groups: int) -> Iterator[Measured]:
    """Run everything on workers of one process; yield each run as it ends. Raises `Wrong`."""
    names = [f"g{number:02d}" for number in range(groups)]
    original, made, fleet = _made(folder, groups)
    alone = _checked("1 worker", clone(folder / "one", original, made).run(*_workers(1)), merged=groups)
    yield alone
    shutil.rmtree(folder / "one")
    project = clone(folder / "two", original, made)
    both = _checked("2 workers", project.run(*_workers(2)), merged=groups)
    yield both
    _check_same(both, alone)
    yield _checked("2 workers, nothing to do", project.run(*_workers(2)), unchanged=groups)
    changed = [names[i * (groups - 1) // max(1, CHANGED - 1)] for i in range(min(CHANGED, groups))]
    fine_tune(project.folder, [fleet.groups()[group][0] for group in changed])
    after = project.run(*_workers(2))
    tuned = _checked(
        f"2 workers, {len(changed)} networks changed", after, merged=len(changed), unchanged=groups - len(changed)
    )
    if {group["group"] for group in tuned.merged} != {*changed}:
        raise Wrong(f"other groups ran than those of the changed networks, {', '.join(changed)}")
    yield tuned


def measure_cluster(folder: Path, groups: int) -> Iterator[Measured]:
    """Run some groups here and on a Dask cluster; yield both runs. Raises `Wrong`."""
    some = min(groups, GROUPS_ON_CLUSTER)
    original, made, _ = _made(folder, some)
    here = _checked(f"2 workers, {some} groups", clone(folder / "here", original, made).run(*_workers(2)), merged=some)
    yield here
    on_cluster = with_settings("flow.executor=dask", "flow.dask=local", "flow.workers=2")
    run = clone(folder / "cluster", original, made).run(*on_cluster)
    dask = _checked(f"Dask, 2 workers in folders of their own, {some} groups", run, merged=some)
    yield dask
    _check_same(dask, here)


PARTS = {"local": measure_here, "cluster": measure_cluster}


def _made(folder: Path, groups: int) -> tuple[Path, Path, Fleet]:
    """A copy of the project, a generated fleet, and what is in it."""
    copy_project(original := folder / "original")
    fleet = make_fleet(made := folder / "fleet", GROUP_SIZE * groups)
    print(f"made {len(fleet.members)} networks", flush=True)
    return original, made, fleet


def _check_same(one: Measured, other: Measured) -> None:
    if different := [name for name, digest in one.digests.items() if digest != other.digests[name]]:
        raise Wrong(f"{one.name}: {', '.join(different)} came to other content than with {other.name}")


def _workers(count: int) -> Sequence[str]:
    return with_settings(f"flow.workers={count}")


def _checked(name: str, run: Run, **expected: int) -> Measured:
    """The run, if it has ended well and its groups ended as expected. Raises `Wrong`."""
    measured = Measured(name, run)
    if run.status or measured.counts != Counter({status: n for status, n in expected.items() if n}):
        counts = dict(measured.counts) if run.report else "no report"
        raise Wrong(f"{name}: status {run.status}, {counts}. The end of what it said:\n{run.said[-3000:]}")
    return measured


def document(measured: Sequence[Measured], groups: int) -> str:
    """The page that shows what was measured."""
    rows = "\n".join(_row(one) for one in measured)
    models = GROUP_SIZE * groups
    return f"""# A fleet of {models} networks

{models} LeNet-300-100 for relabelled, reduced and distorted MNIST and Fashion-MNIST, in {groups} groups of two that
descend from one ancestor (`tests/benchmarks/fleet_of_models.py`). Every hidden neuron is shared, then the network is
retrained lightly for 20 iterations; each group is evaluated, stored in S3 and registered in MLflow. By

```
make bench-fleet
```

on a machine with {os.cpu_count()} cores, in fresh projects; the start of all services is part of the wall time.

| run | merged | unchanged | wall time, s | a group, s | stages, s | overhead, s | most overhead, s | memory, GiB |
|---|---|---|---|---|---|---|---|---|
{rows}

*A group* is the wall time of a merged group while others ran beside it, *stages* that of its stages' own processes,
*overhead* the rest: preparing its workspace, DVC's part, storing its data, asking the registry. These are medians over
the merged groups. Memory is the most that all processes of a run held together, the servers included.

However it was run, each group came to the same content, digest by digest. After {CHANGED} networks were fine-tuned,
only their groups ran.
"""


def _row(one: Measured) -> str:
    def median(key: str) -> str:
        return f"{statistics.median(group[key] for group in one.merged):.1f}" if one.merged else "–"

    most = f"{max(group['overhead_seconds'] for group in one.merged):.1f}" if one.merged else "–"
    figures = (
        *(one.name, one.counts["merged"], one.counts["unchanged"], f"{one.run.seconds:.0f}"),
        *(median("seconds"), median("command_seconds"), median("overhead_seconds"), most),
        f"{one.run.report['peak_bytes'] / _GIB:.1f}",
    )
    return "| " + " | ".join(str(figure) for figure in figures) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=GROUPS, help="pairs of networks; fewer are faster")
    parser.add_argument("--part", choices=PARTS, help="one part only")
    options = parser.parse_args()
    CACHE.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = read_json(CACHE / FIGURES) if (CACHE / FIGURES).exists() else {}
    for part in [options.part] if options.part else PARTS:
        measured: list[Measured] = []
        with tempfile.TemporaryDirectory(prefix="mtz-fleet-") as folder:
            try:
                for one in PARTS[part](Path(folder), options.groups):
                    measured.append(one)
                    print(_row(one), flush=True)
            except Wrong as reason:
                sys.exit(f"error: {reason}")
        runs = [{"name": one.name, "seconds": one.run.seconds, "report": dict(one.run.report)} for one in measured]
        figures[part] = {"groups": options.groups, "cores": os.cpu_count(), "runs": runs}
        write_json(CACHE / FIGURES, figures)
    if figures.get("local", {}).get("groups") == GROUPS:
        write_document(figures)
        print(f"wrote {DOCS / DOCUMENT}")


def write_document(figures: Mapping[str, Any]) -> None:
    """Write the page of all parts that were measured with all groups."""
    runs = [run for part in PARTS if figures.get(part, {}).get("groups") == GROUPS for run in figures[part]["runs"]]
    kept = [Measured(run["name"], Run(0, run["seconds"], "", run["report"])) for run in runs]
    with whole_file(DOCS / DOCUMENT) as temporary:
        temporary.write_text(document(kept, GROUPS))


if __name__ == "__main__":
    main()
