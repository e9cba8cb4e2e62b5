"""Warm interpreters that the tests of one process share, so that not every command imports all libraries anew."""

import atexit
import functools
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

from flows.processes import warm
from tasks.registry.mlflow_client import variables_set
from tasks.warm_client import VARIABLE


@functools.cache
def running(python_path: str = "") -> dict[str, str]:
    """The variable that names interpreters which end with this process.

    Args:
        python_path: PYTHONPATH of those who use them; another value is refused.
    """
    stack = ExitStack()
    atexit.register(stack.close)
    home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mtz-home-", ignore_cleanup_errors=True)))
    with variables_set({"PYTHONPATH": python_path}):
        if not python_path:
            del os.environ["PYTHONPATH"]
        stack.enter_context(warm.serving(home))
        variable = {VARIABLE: os.environ[VARIABLE]}
    stack.callback(os.environ.update, variable)  # what ends takes it away again
    return variable
