"""The error of this package that a user can mend."""


class DataError(ValueError):
    """A data set, folder, image or video that is missing, unreadable, or not as its layout promises."""
