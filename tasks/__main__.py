"""Run one stage: `python -m tasks STAGE [MODEL]`, in the folder of a group's pipeline.

The exit status is 0 on success, `EXIT_TRY_AGAIN` after a fault that may pass by itself, `EXIT_REFUSED` if the stage
cannot do what was asked, and 1 after any other error.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import resource
import sys
import traceback
from pathlib import Path

from mtz_core.errors import IncompatibleNetworks, InvalidConfig, MtzError, UnsupportedModule
from tasks.faults import EXIT_REFUSED, EXIT_TRY_AGAIN, Refused, ServiceFault
from tasks.warm_client import hand_over

MODEL_STAGES = ("pretrain", "collect", "hessians")
"""Stages that run once for each model."""

GROUP_STAGES = ("match", "merge", "retrain", "evaluate", "register")
"""Stages that run once for the group, in this order."""

EXTRAS = ("pareto",)
"""Commands that are not stages, since nothing in the pipeline needs them."""

MEMORY_LIMIT = "MTZ_MEMORY_LIMIT"
"""Environment variable: the most bytes of data that the stage's process may have."""

_REFUSALS = (Refused, UnsupportedModule, IncompatibleNetworks, InvalidConfig)
"""Errors that mean that these networks, or these settings, can never work."""


def main(arguments: list[str] | None = None) -> int:
    """Run a stage, print any error as one line, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks",
        description="Run one stage of a group's pipeline, reading params.yaml and the files of earlier stages.",
        epilog="Examples: `python -m tasks collect digits`, `python -m tasks merge`. "
        "`dvc repro` runs all stages that need to run, in order.",
    )
    parser.add_argument("stage", choices=(*MODEL_STAGES, *GROUP_STAGES, *EXTRAS), help="the stage to run")
    parser.add_argument("model", nargs="?", help=f"the model, for {', '.join(MODEL_STAGES)}")
    parser.add_argument("--sizes", help="of pareto, see `mtz pareto --help`")
    parser.add_argument("--methods", help="of pareto")
    parser.add_argument("--retrain", action="store_true", help="of pareto")
    parser.add_argument("--debug", action="store_true", help="show the stack trace of an error")
    options = parser.parse_args(arguments)
    if (options.stage in MODEL_STAGES) != (options.model is not None):
        needs = "needs the name of a model" if options.stage in MODEL_STAGES else "takes no model"
        parser.error(f"stage {options.stage} {needs}")
    if options.stage not in EXTRAS and (options.sizes or options.methods or options.retrain):
        parser.error(f"stage {options.stage} takes no --sizes, --methods or --retrain")
    try:
        _run(options)
    except (MtzError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _lacks_memory(error):
            raise
        if options.debug or os.environ.get("MTZ_DEBUG"):
            traceback.print_exc()
        print(f"error: {_message(error)}", file=sys.stderr, flush=True)
        return _status(error)
    return 0


def _status(error: Exception) -> int:
    if isinstance(error, ServiceFault):
        return EXIT_TRY_AGAIN
    return EXIT_REFUSED if isinstance(error, _REFUSALS) else 1


def _run(options: argparse.Namespace) -> None:
    import torch

    from tasks.artifacts.paths import Workspace
    from tasks.models.factories import find_factory
    from tasks.params import InvalidParams, load_params

    stage, model = options.stage, options.model
    workspace = Workspace(Path())
    params = load_params(workspace.params)
    if model is not None and model not in params.models:
        raise InvalidParams(f"there is no model {model!r}; models: {', '.join(params.models)}.")
    torch.set_num_threads(params.runtime.threads)
    torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms, without importing the compiler: 1.4 s
    if stage not in MODEL_STAGES:
        for name in params.models:
            find_factory(params, name)
    module = importlib.import_module(f"tasks.{'studies' if stage in EXTRAS else 'stages'}.{stage}")
    if stage in MODEL_STAGES:
        module.run(params, workspace, model)
    elif stage in EXTRAS:
        module.run(params, workspace, module.Asked.parse(options.sizes, options.methods, options.retrain))
    else:
        module.run(params, workspace)


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = f" (writing {error.filename})" if error.filename else ""
        return f"the disk is full{place}. Free some space and run again."
    if _lacks_memory(error):
        limit = os.environ.get(MEMORY_LIMIT)
        known = f" within the limit of {int(limit):,} bytes. Raise flow.memory" if limit else ". Free some"
        return f"the memory did not suffice{known}, or lower the stage's batch and sample sizes in params.yaml."
    return str(error)


def _lacks_memory(error: Exception) -> bool:
    """Return whether an allocation failed; torch reports it only in the text of a `RuntimeError`."""
    if isinstance(error, RuntimeError):
        return any(
            message in str(error) for message in ("can't allocate memory", "std::bad_alloc", "CUDA out of memory")
        )
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)


def _limit_memory() -> None:
    if limit := os.environ.get(MEMORY_LIMIT):
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        allowed = int(limit) if most == resource.RLIM_INFINITY else min(int(limit), most)
        resource.setrlimit(resource.RLIMIT_DATA, (allowed, most))


if __name__ == "__main__":
    hand_over()
    _limit_memory()
    sys.exit(main())
