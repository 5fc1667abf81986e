"""The error of this package that a user can mend."""


class CheckpointError(ValueError):
    """A weights file that cannot be read, or does not fit the network it was given to."""
