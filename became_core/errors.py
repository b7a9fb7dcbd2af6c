"""The one exception that this package raises for a mistake its user can mend."""

__all__ = ["BecameError"]


class BecameError(ValueError):
    """What was given cannot be used; the message is one sentence that names the offender and what would be right.

    A command line prints the sentence and exits with status 2. Any other exception is a defect of the software.
    """
