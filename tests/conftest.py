"""For all tests: shape annotations of mtz_core are checked, the longest tests come first, a Prefect server serves all.

With the longest first, no worker is left with a long test when all others are done, and Prefect's server, which works
even when nothing runs, ends with these. ``MTZ_SHAPES=unchecked`` switches the checks off.
"""

import functools
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch  # noqa: F401 - sets up its loggers

from tests.support import shapes

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler import LoadFileScheduling

    from tasks.storage.s3 import Storage, StorageSettings
    from tests.support.services import Place

# Whatever a shell starts in the background ignores it, and so would all that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# pytest listens to every logger that does not propagate. Where anybody listens to this one, torch describes each tensor
# that it exports.
logging.getLogger("torch.__trace").propagate = True
if os.environ.get("MTZ_SHAPES") != "unchecked":
    shapes.install()  # before anything imports mtz_core


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: [item.get_closest_marker(name) is None for name in ("e2e", "slow")])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: "Producer") -> "LoadFileScheduling":
    """Tests of one file stay in one process, in their order; so do all tests with services, which share a server."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return scope(super()._split_scope(nodeid))

    @functools.cache  # it is asked for every test, also when one is done
    def scope(file: str) -> str:
        return "services" if "pytest.mark.e2e" in (config.rootpath / file).read_text("utf-8") else file

    config.option.loadscopereorder = False
    return Scheduling(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    shapes.calls.clear()
    servers = sys.modules.get("tests.support.prefect_server")
    if servers and item.get_closest_marker("e2e") is None:
        servers.stop()


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `.mtz` folder of the session's services."""
    return tmp_path_factory.mktemp("project") / ".mtz"


@pytest.fixture(scope="session")
def session_store(home: Path) -> Iterator["Storage"]:
    """Keeps the session's S3 server up."""
    from tasks.storage import s3
    from tests.support.services import Place

    with s3.connect(Place(), home) as store:
        yield store


@pytest.fixture
def own_place(session_store: "Storage", request: pytest.FixtureRequest) -> "Place":
    """A storage of this test's own: a prefix on the session's server."""
    from tests.support.services import Place

    return Place(prefix="tests/" + re.sub(r"\W", "-", request.node.name))


@pytest.fixture
def store(place: "StorageSettings", home: Path) -> Iterator["Storage"]:
    """The storage of the folder's fixture `place`, open."""
    from tasks.storage import s3

    with s3.connect(place, home) as opened:
        yield opened
