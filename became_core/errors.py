"""The exception that this package raises for a mistake that its user can correct, and how it quotes other errors."""

__all__ = ["BecameError", "first_line"]

# So many characters of another package's error stand in a message of ours; some print a whole tensor or a page.
LENGTH = 160


class BecameError(ValueError):
    """An argument cannot be used.

    The message is one sentence that names the argument and says what would be right. A command prints this sentence and
    exits with status 2. Any other exception is a defect of the software.
    """


def first_line(error: BaseException) -> str:
    """Return what an error of another package says, to stand within a sentence.

    It is the first line, without the full stop, and no longer than ``LENGTH``; of an error that says nothing, it is the
    name of its class.

    >>> first_line(OSError("there is no such file.")), first_line(KeyError())
    ('there is no such file', 'KeyError')
    """
    line = str(error).strip().partition("\n")[0].rstrip(".")
    return line[:LENGTH] or type(error).__name__
