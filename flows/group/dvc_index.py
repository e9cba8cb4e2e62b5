"""Script: print what DVC knows of the pipeline in the working folder as JSON, each stage after those it needs.

It runs in a process of its own (see `flows.group.dvc`), so that no flow has to import DVC.
"""

import json

import networkx as nx  # type: ignore[import-untyped]
from dvc.repo import Repo


def main() -> None:
    """Print a list of `{name, needs, dependencies, outputs}`; paths are relative to the working folder."""
    with Repo(".") as repo:
        index = repo.index
        # Edges of DVC's graph lead from a stage to those it needs. Lexicographic ties keep the order of dvc.yaml.
        position = {stage: number for number, stage in enumerate(index.stages)}
        order = nx.lexicographical_topological_sort(index.graph.reverse(), key=position.__getitem__)
        stages = [
            {
                "name": stage.addressing,
                "needs": [needed.addressing for needed in index.graph.successors(stage)],
                "dependencies": [item.def_path for item in stage.deps if item.protocol == "local"],
                "outputs": [item.def_path for item in stage.outs],
            }
            for stage in order
        ]
    print(json.dumps(stages))


if __name__ == "__main__":
    main()
