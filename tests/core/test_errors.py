"""How errors of other packages are quoted."""

import pytest

from became_core.errors import LENGTH, first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError("there is no such file.\nIts folder is empty."), "there is no such file"),
        (ValueError("\n  a key is missing  \n"), "a key is missing"),
        (RuntimeError("x" * 999), "x" * LENGTH),
        (KeyError(), "KeyError"),
        (RuntimeError("."), "RuntimeError"),
    ],
)
def test_an_error_is_quoted_by_its_first_line(error: Exception, line: str) -> None:
    assert first_line(error) == line
