"""The exception that this package raises for a mistake that its user can correct."""

__all__ = ["BecameError"]


class BecameError(ValueError):
    """An argument cannot be used.

    The message is one sentence that names the argument and says what would be right. A command prints this sentence and
    exits with status 2. Any other exception is a defect of the software.
    """
