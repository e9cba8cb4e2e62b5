"""The peak of memory: of this process and all below it, also of one that has ended since."""

import subprocess
import sys

import psutil  # type: ignore[import-untyped]
import pytest

from flows.processes import peak_memory
from flows.processes.peak_memory import PeakMemory
from tests.support.waiting import until

LARGE = 200 << 20
PROGRAM = f"import subprocess, sys; subprocess.run([sys.executable, '-c', 'held = b\"1\" * {LARGE}; input()'])"


def test_the_peak_counts_processes_of_processes_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak_memory, "_SAMPLE_SECONDS", 0.02)
    with PeakMemory() as memory:
        before = memory.bytes
        process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE)
        until(lambda: memory.bytes > before + LARGE)
        process.communicate(b"\n")
    peak = memory.bytes
    assert before + LARGE < peak < before + 3 * LARGE
    assert not memory._thread.is_alive()


def test_a_block_is_measured_before_it_begins() -> None:
    with PeakMemory() as memory:
        assert memory.bytes > 1 << 20


def test_a_process_that_has_ended_takes_nothing() -> None:
    process = subprocess.Popen(["true"])
    gone = psutil.Process(process.pid)
    process.wait()
    assert peak_memory._memory(gone) == 0
