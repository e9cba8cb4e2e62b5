"""The most memory that a run and all its processes take at once."""

import threading
from types import TracebackType

import psutil  # type: ignore[import-untyped]

_SAMPLE_SECONDS = 1.0


class PeakMemory:
    """A sampler of the memory of this process and all below it, once a second from its block's start on.

    Memory that processes share counts once (proportional set size) where the system reports it, several times
    elsewhere.

    Attributes:
        bytes: The largest sum seen so far, in bytes.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(_SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        own = psutil.Process()
        self.bytes = max(self.bytes, sum(_memory(process) for process in [own, *own.children(recursive=True)]))


def _memory(process: psutil.Process) -> int:
    try:
        info = process.memory_full_info()
        return int(getattr(info, "pss", info.rss))
    except psutil.Error:  # it has ended, or is not ours
        return 0
