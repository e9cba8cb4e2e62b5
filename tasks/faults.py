"""Faults that may pass by themselves."""

from mtz_core.errors import MtzError

EXIT_TRY_AGAIN = 75
"""Exit status of a stage that failed for a passing reason (`EX_TEMPFAIL`), such as a storage that did not answer."""


class ServiceFault(MtzError):
    """A service could not be used; the same command may succeed later."""
