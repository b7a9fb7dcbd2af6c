"""What a run was made with: the versions of packages, and the git revision of this code."""

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import became_core

__all__ = ["revision", "versions"]

ALWAYS = ("numpy", "array-api-compat", "optree", "safetensors")
IF_LOADED = ("torch", "transformers", "jax", "jaxlib", "tensorflow", "cupy")


def versions() -> dict[str, str]:
    """Return the versions of Python, of this package, and of the packages that it computes with in this process."""
    versions_by_name = {"python": platform.python_version(), "became": became_core.__version__}
    for name in (*ALWAYS, *(module for module in IF_LOADED if module in sys.modules)):
        try:
            versions_by_name[name] = version(name)
        except PackageNotFoundError:  # run from a checkout, or another distribution of the module
            versions_by_name[name] = str(getattr(sys.modules.get(name), "__version__", "unknown"))
    return versions_by_name


def revision() -> str | None:
    """Return the git revision of the checkout that this code runs from; None if it does not run from a checkout."""
    root = Path(became_core.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
