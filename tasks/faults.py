"""Two ways in which a stage fails that callers must distinguish: faults that may pass by themselves, and refusals."""

from mtz_core.errors import MtzError

EXIT_TRY_AGAIN = 75
"""Exit status of a stage that failed for a passing reason (`EX_TEMPFAIL`), such as a storage that did not answer."""

EXIT_REFUSED = 65
"""Exit status of a stage that can never do what was asked with these inputs (`EX_DATAERR`)."""


class ServiceFault(MtzError):
    """A service could not be used; the same command may succeed later."""


class Refused(MtzError):
    """The result breaks a promise, such as an accuracy floor, so nothing is registered."""
