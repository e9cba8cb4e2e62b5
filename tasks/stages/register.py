"""Stage `register`: a release bundle in the storage, and a version in the MLflow registry that points to it.

The stage may be killed at any moment and run again: whatever is there already is neither sent nor registered twice.
"""

from __future__ import annotations

from mtz_core.settings import floors_by_name
from tasks.artifacts.paths import Workspace
from tasks.faults import Refused
from tasks.files import read_json, write_json
from tasks.home import find_home
from tasks.params import Params
from tasks.progress import show_progress
from tasks.registry import mlflow_client, publish, upload
from tasks.registry.build import gather
from tasks.storage import s3


def run(params: Params, workspace: Workspace) -> None:
    """Store and register the group's zipped network; write `registration.json`.

    Args:
        params: The parameters of the group.
        workspace: The workspace to read from and write to.

    Raises:
        Refused: A task loses more than its floor allows.
        StorageError: The storage cannot be used.
        TrackingError: The registry cannot be used.
        MtzError: A file of an earlier stage is missing or damaged.
    """
    _check_floors(params, workspace)
    home = find_home(workspace.root)
    release = gather(params, workspace)
    with s3.connect(params.storage, home) as store:
        sent = upload.upload(store, release)
        show_progress(f"bundle: {store.url(release.folder)} ({f'{sent} objects' if sent else 'there already'})")
        mlflow_client.prepare(params.tracking, home)
        version = publish.register_release(params.tracking, home, store, release)
    write_json(workspace.registration, release.registration())
    show_progress(f"registered: {release.model} version {version}, content {release.content_digest[:12]}")


def _check_floors(params: Params, workspace: Workspace) -> None:
    tasks = read_json(workspace.metrics)["tasks"]
    floors = floors_by_name(params.register.floors, list(tasks), "register.floors")
    lost = {task: tasks[task]["error_retrained"] - tasks[task]["error_original"] for task in floors}
    broken = [
        f"{task} agrees with its original in {errors['agreement_retrained']:.1f} % of the test examples, and "
        f"register.agreement is {params.register.agreement:g} %"
        for task, errors in tasks.items()
        if errors["agreement_retrained"] < params.register.agreement
    ]
    broken += [
        f"{task} loses {points:.2f} points of test error, and {floors[task]:g} are allowed"
        for task, points in lost.items()
        if points > floors[task]
    ]
    if broken:
        raise Refused(f"{'; '.join(broken)}. Store more (match), retrain more, allow more, or leave that model out.")
