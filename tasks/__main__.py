"""Run one stage: ``python -m tasks STAGE [MODEL]``, in the folder of a group's pipeline."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
import traceback
from pathlib import Path

from mtz_core.errors import MtzError
from tasks.faults import EXIT_TRY_AGAIN, ServiceFault

MODEL_STAGES = ("pretrain", "collect", "hessians")
"""Stages that run once for each model."""

GROUP_STAGES = ("match", "merge", "retrain", "evaluate", "register")
"""Stages that run once for the group, in this order."""


def main(arguments: list[str] | None = None) -> int:
    """Run a stage and tell an error in one line.

    Returns 0 if it went well, `EXIT_TRY_AGAIN` after a fault that may pass by itself, 1 after any other error.
    """
    parser = argparse.ArgumentParser(
        prog="python -m tasks",
        description="Run one stage of a group's pipeline, reading params.yaml and the files of earlier stages.",
        epilog="Examples: `python -m tasks collect digits`, `python -m tasks merge`. "
        "`dvc repro` runs all stages that need to run, in order.",
    )
    parser.add_argument("stage", choices=(*MODEL_STAGES, *GROUP_STAGES), help="the stage to run")
    parser.add_argument("model", nargs="?", help=f"the model, for {', '.join(MODEL_STAGES)}")
    parser.add_argument("--debug", action="store_true", help="show the stack trace of an error")
    options = parser.parse_args(arguments)
    if (options.stage in MODEL_STAGES) != (options.model is not None):
        needs = "needs the name of a model" if options.stage in MODEL_STAGES else "takes no model"
        parser.error(f"stage {options.stage} {needs}")
    try:
        _run(options.stage, options.model)
    except (MtzError, OSError) as error:
        if options.debug or os.environ.get("MTZ_DEBUG"):
            traceback.print_exc()
        print(f"error: {_message(error)}", file=sys.stderr, flush=True)
        return EXIT_TRY_AGAIN if isinstance(error, ServiceFault) else 1
    return 0


def _run(stage: str, model: str | None) -> None:
    import torch

    from tasks.factories import find_factory
    from tasks.params import InvalidParams, load_params
    from tasks.workspace import Workspace

    workspace = Workspace(Path())
    params = load_params(workspace.params)
    if model is not None and model not in params.models:
        raise InvalidParams(f"there is no model {model!r}; models: {', '.join(params.models)}.")
    torch.set_num_threads(params.runtime.threads)
    torch.use_deterministic_algorithms(True)
    if stage in GROUP_STAGES:
        for name in params.models:
            find_factory(params, name)
    module = importlib.import_module(f"tasks.{stage}")
    module.run(params, workspace, *([model] if model is not None else []))


def _message(error: MtzError | OSError) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = f" (writing {error.filename})" if error.filename else ""
        return f"the disk is full{place}. Free some space and run again."
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
