"""Signals that wait until a run is saved.

Convention: the exit status of a command that a signal stopped is 128 and the number of the signal.
"""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = ["InterruptedRun", "Interruption"]


class InterruptedRun(Exception):  # noqa: N818 # it is no error
    """A run was stopped by a signal after it was saved; the message says where."""

    def __init__(self, message: str, number: int) -> None:
        """Hold the message, and the exit status that says which signal it was."""
        super().__init__(message)
        self.status = 128 + number


class Interruption:
    """Notes SIGINT and SIGTERM for the time of this context; the same signal once more does what it usually does.

    Attributes:
        received: the number of the signal that came; None if none did.
    """

    def __init__(self, message: str = "the epoch is finished and saved first") -> None:
        """Prepare to listen.

        Args:
            message: what is said when a signal comes.
        """
        self.received: int | None = None
        self._message = message
        self._usual: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Listen, where a program may: in its main thread."""
        if threading.current_thread() is threading.main_thread():
            self._usual = {each: signal.signal(each, self._note) for each in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Listen no more."""
        for number, usual in self._usual.items():
            signal.signal(number, usual)

    def check(self, where: str) -> None:
        """Raise an InterruptedRun if there was a signal.

        Args:
            where: what has been saved, for the message.
        """
        if self.received is not None:
            raise InterruptedRun(where, self.received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(number, self._usual[number])
        # Not print: the signal may have come within one.
        os.write(2, f"\n{self._message}; the same signal again stops at once.\n".encode())
