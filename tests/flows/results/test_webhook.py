"""The webhook: who hears what of a run, and what is told when nobody can be reached."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from flows.results import webhook
from tests.support.waiting import PATIENCE_SECONDS

RESULT = {
    "fleet": "nightly",
    "counts": {"merged": 1, "failed": 1},
    "groups": [
        {"group": "good", "status": "merged", "reason": ""},
        {"group": "bad", "status": "failed", "reason": "no weights"},
    ],
}


@pytest.fixture
def heard() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A webhook's address, and what it has received."""
    received: list[dict[str, Any]] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(503 if len(received) == 1 else 200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Hook) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/secret-token", received
        server.shutdown()


def test_it_hears_what_a_run_came_to(heard: tuple[str, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch) -> None:
    url, received = heard
    monkeypatch.setattr(webhook, "_FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(webhook, "_TIMEOUT_SECONDS", PATIENCE_SECONDS)
    monkeypatch.setenv(webhook.URL, url)
    assert webhook.notify(RESULT) == ""
    assert len(received) == 2, "one that is away for a moment is tried again"
    assert received[1] == {"text": "Fleet nightly: 1 failed, 1 merged. Failed: bad: no weights", **RESULT}


@pytest.mark.parametrize(
    ("url", "why"), [("no-address", "ValueError"), ("http://127.0.0.1:9/secret-token", "URLError")]
)
def test_nobody_hears_it(url: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "_FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setenv(webhook.URL, url)
    told = webhook.notify(RESULT)
    assert told.startswith("warning: the webhook got no report") and why in told
    assert "secret-token" not in told and "no-address" not in told


def test_nobody_wants_to_hear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(webhook.URL, raising=False)
    assert webhook.notify(RESULT) == ""
