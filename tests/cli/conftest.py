"""What the tests of the command line share."""

from collections.abc import Callable

import pytest

from adapters.runs import Checkpoints
from became_core.continual import RunState


@pytest.fixture
def after_saves(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let every following command be interrupted after it has saved so often; never if 0."""
    save = Checkpoints.save

    def set_to(count: int) -> None:
        saved = 0

        def save_and_stop(self: Checkpoints, state: RunState) -> None:
            nonlocal saved
            save(self, state)
            saved += 1
            if saved == count:
                raise KeyboardInterrupt

        monkeypatch.setattr(Checkpoints, "save", save_and_stop)

    return set_to
