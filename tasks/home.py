"""Where the runtime state of a project lives: the folder `.mtz`."""

import os
from pathlib import Path

HOME_NAME = ".mtz"


def find_home(start: Path | None = None) -> Path:
    """The absolute path of the `.mtz` folder that belongs to `start` (default: the current folder).

    `MTZ_HOME` wins where it is set; otherwise the nearest `.mtz` beside or above `start`, so that a process inside a
    workspace finds the project's folder; otherwise `start/.mtz`, which need not exist yet.
    """
    configured = os.environ.get("MTZ_HOME")
    if configured:
        return Path(configured).expanduser().resolve()
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / HOME_NAME).is_dir():
            return folder / HOME_NAME
    return start / HOME_NAME
