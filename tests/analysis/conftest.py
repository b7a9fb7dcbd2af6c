"""Figures are drawn where they are the matter of a test, and nowhere else."""

import pytest


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let figures be empty: for tests of what stands beside them."""
    empty = b'<svg viewBox="0 0 1 1"></svg>'
    monkeypatch.setattr("adapters.analysis.page.picture", lambda figure, kind: empty)
    monkeypatch.setattr("adapters.analysis.report.picture", lambda figure, kind: empty)
