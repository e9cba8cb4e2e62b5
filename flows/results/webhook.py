"""A webhook that receives the result of each run."""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

URL = "MTZ_WEBHOOK_URL"
"""Environment variable with the address; it often contains a secret, so it is no parameter and is never printed."""

_ATTEMPTS = 3
_TIMEOUT_SECONDS = 10
_FIRST_PAUSE_SECONDS = 1.0


def notify(result: Mapping[str, Any]) -> str:
    """Post the result of a run as JSON, with a summary sentence as `text`.

    Without the variable `MTZ_WEBHOOK_URL` nothing is posted. A failure does not change the result of the run.

    Args:
        result: The result as plain values.

    Returns:
        A warning if the post failed; empty otherwise.
    """
    url = os.environ.get(URL)
    if not url:
        return ""
    body = json.dumps({"text": _sentence(result), **result}).encode()
    reason = ""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
        try:
            request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS):
                return ""
        except urllib.error.HTTPError as error:
            reason = f"it answered {error.code}"
            if error.code < 500:
                break
        except (OSError, ValueError) as error:  # the message of a ValueError would contain the address
            reason = type(error).__name__
    return f"warning: the webhook got no report: the address in {URL} cannot be used ({reason}). Check it with curl."


def _sentence(result: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{count} {status}" for status, count in sorted(result["counts"].items()))
    failed = [f"{row['group']}: {row['reason']}" for row in result["groups"] if row["status"] == "failed"]
    return f"Fleet {result['fleet']}: {counts}." + (f" Failed: {'; '.join(failed)}" if failed else "")
