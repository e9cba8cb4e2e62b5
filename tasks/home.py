"""The folder `.mtz`, which holds the runtime state of a project."""

import os
from pathlib import Path

HOME_NAME = ".mtz"


def find_home(start: Path | None = None) -> Path:
    """Return the absolute path of the `.mtz` folder that belongs to a folder.

    The environment variable `MTZ_HOME` wins if it is set. Otherwise it is the nearest `.mtz` in `start` or above, so
    that a process inside a workspace finds the project's folder. Otherwise it is `start/.mtz`, which need not exist
    yet.

    Args:
        start: The folder to start from; the current folder by default.

    Returns:
        The folder, which may not exist.
    """
    configured = os.environ.get("MTZ_HOME")
    if configured:
        return Path(configured).expanduser().resolve()
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / HOME_NAME).is_dir():
            return folder / HOME_NAME
    return start / HOME_NAME
