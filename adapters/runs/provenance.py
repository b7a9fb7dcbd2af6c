"""What a run was made with: versions of packages, and the revision of this code."""

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import became_core

__all__ = ["revision", "versions"]

ALWAYS = ("became", "numpy", "array-api-compat", "optree", "safetensors")
IF_LOADED = ("torch", "jax", "jaxlib", "tensorflow", "cupy")


def versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of what it computes with here."""
    found = {"python": platform.python_version()}
    for name in (*ALWAYS, *(each for each in IF_LOADED if each in sys.modules)):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a checkout, or another distribution of the module
            found[name] = str(getattr(sys.modules.get(name), "__version__", "unknown"))
    return found


def revision() -> str | None:
    """Return the git revision of the checkout that this code runs from, None if it runs from none."""
    root = Path(became_core.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
