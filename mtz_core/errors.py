"""What can go wrong while zipping. Every message names the thing, the cause and the remedy."""


class MtzError(Exception):
    """Base of all errors that a user can cause and cure."""


class UnsupportedModule(MtzError):
    """A network does something that zipping does not understand."""


class IncompatibleNetworks(MtzError, ValueError):
    """The networks of one group cannot be zipped together."""


class InvalidCalibration(MtzError, ValueError):
    """Calibration, validation or test data is missing, empty, of the wrong shape, or not finite."""


class InvalidWeights(MtzError, ValueError):
    """A network's weights do not fit it, or are not finite."""


class InvalidConfig(MtzError, ValueError):
    """A setting is impossible for these networks."""


class InvalidZippedFile(MtzError, ValueError):
    """A stored zipped network is damaged, incomplete, or of an unknown version."""


class ZipWarning(UserWarning):
    """Zipping succeeded, but part of the result may be worse than it need be: few rows, layers that stay separate."""
