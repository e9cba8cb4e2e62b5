"""The benchmark suite: ``python -m tests.benchmarks quick`` or ``full`` (`make bench`, `make bench-full`).

Fleets of related networks, pairs of networks beside every rival, and floors; then tables and figures of them. Networks
are trained once and kept in `.mtz/benchmarks`, and so is every measurement: a run that is stopped goes on where it was.
"""

from __future__ import annotations

import argparse

import torch

from tests.benchmarks import accuracy, fleet_curves, floors, report
from tests.benchmarks.full_data import data_folder

PARTS = {"fleets": fleet_curves.run, "accuracy": accuracy.run, "floors": floors.run}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("setting", choices=("quick", "full"), help="minutes on one seed, or hours on three")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fresh", action="store_true", help="measure again what was measured before")
    options = parser.parse_args()
    source = data_folder(parser)
    torch.set_num_threads(options.threads)
    for part in options.parts:
        PARTS[part](source, options.setting, options.fresh)
    print(f"tables and figures: {report.run(options.setting)}")


if __name__ == "__main__":
    main()
