"""What can go wrong while zipping. Every message names the thing, the cause and the remedy."""


class MtzError(Exception):
    """Base of all errors that a user can cause and cure."""


class UnsupportedModule(MtzError):
    """A network does something that zipping does not understand."""


class IncompatibleNetworks(MtzError):
    """The networks of one group cannot be zipped together."""


class InvalidCalibration(MtzError):
    """Calibration data is missing, empty, of the wrong shape, or not finite."""


class InvalidWeights(MtzError):
    """A network's weights do not fit it, or are not finite."""


class InvalidConfig(MtzError):
    """A setting is impossible for these networks."""


class InvalidZippedFile(MtzError):
    """A stored zipped network is damaged, incomplete, or of an unknown version."""
