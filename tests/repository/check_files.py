"""Check installed packages: every file is there as it was installed, and is of one package alone.

``python check_files.py NAME...`` ends with status 1, and a sentence, if that is not so. ``nox -s wheel`` calls it.
"""

import hashlib
import sys
from base64 import urlsafe_b64encode
from collections.abc import Sequence
from importlib.metadata import distribution
from pathlib import Path


def fault(names: Sequence[str]) -> str | None:
    """Return what is wrong with the files of the distributions of these names; None if nothing is."""
    owners: dict[Path, str] = {}
    for name in names:
        for file in distribution(name).files or ():
            path = Path(str(file.locate())).resolve()
            if owners.setdefault(path, name) != name:
                return f"{path} is of {owners[path]} and of {name}."
            if not path.exists():
                return f"{path} of {name} is gone."
            if file.hash and file.hash.value != _digest(path, file.hash.mode):
                return f"{path} of {name} is not what was installed."
        if name not in owners.values():
            return f"{name} has no files."
    return None


def _digest(path: Path, algorithm: str) -> str:
    """Return a file's digest as RECORD writes it."""
    return urlsafe_b64encode(hashlib.new(algorithm, path.read_bytes()).digest()).rstrip(b"=").decode()


if __name__ == "__main__":
    sys.exit(fault(sys.argv[1:]))
