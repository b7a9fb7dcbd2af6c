"""Keep freed memory in the process, where the C library can be told to (glibc).

By default glibc gives a large block back to the kernel as soon as it is freed, so that every training step on the CPU
pays for fresh pages anew: a sixth of the time of a small convolutional network's step.
"""

import ctypes
import sys

__all__ = ["keep_freed_memory"]

# From malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> bool:
    """Tell the allocator of this process to keep what is freed; return whether it could be told.

    For a program's start, never for a library's import: it concerns the whole process.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return False
    largest = ctypes.c_int(2**31 - 1)
    settings = ((_M_MMAP_THRESHOLD, largest), (_M_TRIM_THRESHOLD, largest), (_M_TOP_PAD, ctypes.c_int(64 * 2**20)))
    return all(mallopt(option, value) == 1 for option, value in settings)
