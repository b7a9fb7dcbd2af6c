"""Where data sets on the local disk are looked for.

Convention: a folder in the layout of the Hugging Face hub, ``FOLDER/OWNER/NAME/…``, or None for the hub itself.
"""

import os
from pathlib import Path

__all__ = ["VARIABLE", "data_directory"]

VARIABLE = "BECAME_DATA_DIR"


def data_directory(chosen: Path | None) -> Path | None:
    """Return the chosen folder; else the one that the environment variable BECAME_DATA_DIR names; else None.

    A variable that is set but empty counts as not set. The folder need not exist: a loader that misses a file says so.
    """
    if chosen is not None:
        return chosen
    named = os.environ.get(VARIABLE)
    return Path(named).expanduser() if named else None
