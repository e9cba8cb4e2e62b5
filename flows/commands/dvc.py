"""`mtz dvc`: DVC by hand, with the storage as its remote."""

import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from flows.group import workspace
from flows.processes.child import python_environment
from mtz_core.errors import MtzError
from tasks.home import find_home
from tasks.params import load_params
from tasks.storage import s3


class UnknownGroup(MtzError):
    """There is no workspace of this name."""


def run_dvc(project: Path, params_file: Path, group: str | None, arguments: Sequence[str]) -> int:
    """Run `dvc` in the project, or in a group's workspace, on this terminal.

    Args:
        project: The folder of the project.
        params_file: The parameters file, relative to the project.
        group: Name of the group; None for the project itself.
        arguments: Arguments of `dvc`.

    Returns:
        The exit status of `dvc`.

    Raises:
        UnknownGroup: The group has no workspace.
        WorkspaceBusy: Another process works in the workspace.
        StorageError: The storage cannot be used.
        InvalidParams: The parameters cannot be used.
    """
    settings = load_params(project / params_file).storage
    home = find_home(project)
    with ExitStack() as stack:
        store = stack.enter_context(s3.connect(settings, home))
        remote = workspace.remote_of(store)
        environment = python_environment(**workspace.environment_of(store, home), DVC_NO_ANALYTICS="1")
        if group is None:
            folder = project
            environment |= workspace.configure_by_hand(home / "dvc-config", remote)
        else:
            if not workspace.folder_of(home, group).is_dir():
                others = sorted(path.parent.name for path in workspace.folder_of(home, group).parent.glob("*/dvc.yaml"))
                there = f" Workspaces: {', '.join(others)}." if others else ""
                raise UnknownGroup(
                    f"there is no workspace of group '{group}'.{there} If the fleet has that group, run "
                    f"`mtz run --group {group}` first."
                )
            folder = stack.enter_context(workspace.held(workspace.folder_of(home, group)))
            workspace.configure(folder, workspace.cache_of(home), remote)
        command = [sys.executable, "-m", "dvc", *arguments]
        return subprocess.run(command, cwd=folder, env=environment, check=False).returncode
