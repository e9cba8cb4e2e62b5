"""Servers on loopback: ports, settings, and what is said of one that does not answer."""

import socket
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from flows.processes import servers
from flows.processes.servers import (
    ServiceFailed,
    StartedServer,
    check_own_prefect_server,
    free_port,
    prefect_environment,
)


@pytest.fixture
def answering() -> Iterator[tuple[str, list[str]]]:
    """An address that answers 200 below /api/health alone, and what it was asked for."""
    asked: list[str] = []

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200 if self.path == "/api/health" else 204)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_the_preferred_port_is_taken_if_it_is_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        other = free_port(port)
        assert other != port and other > 0
    assert free_port(other) == other


def test_prefect_keeps_its_state_in_the_home_unless_the_server_is_the_users(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    assert not servers.uses_own_prefect_server()
    quiet, loud = prefect_environment(tmp_path), prefect_environment(tmp_path, debug=True)
    assert quiet["PREFECT_HOME"] == str(tmp_path / "prefect")
    assert {name for name in quiet if quiet[name] != loud[name]} == {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"}
    assert (quiet["DO_NOT_TRACK"], quiet["PREFECT_SERVER_ANALYTICS_ENABLED"]) == ("1", "false")
    monkeypatch.setenv("PREFECT_API_URL", "http://team:4200/api")
    assert servers.uses_own_prefect_server()
    assert "PREFECT_HOME" not in prefect_environment(tmp_path)


def test_the_users_server_is_asked_for_its_health(
    answering: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, asked = answering
    monkeypatch.setenv("PREFECT_API_URL", f"{url}/api/")
    check_own_prefect_server()
    assert asked == ["/api/health"]
    monkeypatch.setenv("PREFECT_API_URL", f"{url}/elsewhere")
    with pytest.raises(
        ServiceFailed, match=rf"PREFECT_API_URL \({url}/elsewhere\)\. Start it, correct the address, or unset"
    ):
        check_own_prefect_server()
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{free_port()}/api")
    with pytest.raises(ServiceFailed, match="no Prefect server answers"):
        check_own_prefect_server()


def serving(home: Path, *command: str, health: str = "/") -> AbstractContextManager[StartedServer]:
    port = free_port()
    given = [word.replace("PORT", str(port)) for word in command]
    return servers._serving("Toy", given, port, health, home, {"MARK": "1"})


def test_a_server_answers_once_it_was_waited_for_and_ends_with_its_block(tmp_path: Path) -> None:
    with serving(tmp_path, "http.server", "PORT", "--bind", "127.0.0.1") as server:
        server.wait()
        assert servers._answers(server.url)
        assert not server.child.ended()
    assert server.child.ended() and not servers._answers(server.url)
    assert "GET / HTTP" in (tmp_path / "logs" / "toy-server.log").read_text()


def test_a_server_that_ends_at_once_is_told_with_its_log(tmp_path: Path) -> None:
    with (
        serving(tmp_path, "http.server", "no-port") as server,
        pytest.raises(ServiceFailed, match=r"Toy did not start; its log says why: .*toy-server\.log"),
    ):
        server.wait()
    assert "no-port" in server.log.read_text()


def test_a_server_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "_START_SECONDS", 0.0)
    with (
        serving(tmp_path, "http.server", "PORT", "--bind", "127.0.0.1", health="/no-such-page") as server,
        pytest.raises(ServiceFailed, match=r"Toy did not answer within 0 s; see its log"),
    ):
        server.wait()
