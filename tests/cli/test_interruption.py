"""A run is stopped by a signal only when it is saved: signals are noted once, and then do what they usually do."""

import signal
import threading
from collections.abc import Iterator

import pytest

from adapters.cli.interruption import InterruptedRun, Interruption


@pytest.fixture(autouse=True)
def usual_ctrl_c() -> Iterator[None]:
    """As in a program that was started in the foreground: in the background of a script Ctrl-C is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_waits_for_a_check(number: signal.Signals, status: int, capfd: pytest.CaptureFixture[str]) -> None:
    usual = signal.getsignal(number)
    with Interruption() as interruption:
        interruption.check("nothing has come")
        signal.raise_signal(number)
        with pytest.raises(InterruptedRun, match=r"^task 1 is saved$") as stopped:
            interruption.check("task 1 is saved")
    assert stopped.value.status == status
    assert signal.getsignal(number) is usual
    assert "the same signal again stops at once" in capfd.readouterr().err


def test_the_second_ctrl_c_stops_at_once() -> None:
    with Interruption():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_in_another_thread_nothing_is_touched() -> None:
    found = []

    def listen() -> None:
        with Interruption():
            found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [before]
