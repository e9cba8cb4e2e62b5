"""Ends of a stage that those who run it tell apart: faults that may pass by themselves, and refusals."""

from mtz_core.errors import MtzError

EXIT_TRY_AGAIN = 75
"""Exit status of a stage that failed for a passing reason (`EX_TEMPFAIL`), such as a storage that did not answer."""

EXIT_REFUSED = 65
"""Exit status of a stage that cannot do what is asked with these inputs (`EX_DATAERR`), however often it is tried."""


class ServiceFault(MtzError):
    """A service could not be used; the same command may succeed later."""


class Refused(MtzError):
    """The result does not keep what was promised, so nothing is registered."""
