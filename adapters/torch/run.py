"""``python -m adapters.torch.run``: continual learning on PyTorch from the command line.

``torchrun --nproc-per-node N -m adapters.torch.run`` does the same with N processes, which share each step's batch.
"""

import ctypes
import os
import sys
from functools import partial

from adapters.backend import Backend, learner_builder, needs_package, run_command, run_in_processes

with needs_package("torch"):
    import torch

    from adapters.torch.hub import hub_backbone
    from adapters.torch.learner import TorchLearner
    from adapters.torch.processes import is_one_of_several, met
    from adapters.torch.timm_network import timm_backbone

__all__ = ["BACKEND", "build_learner", "keep_freed_memory"]


def keep_freed_memory() -> bool:
    """Tell the allocator of this process to keep what is freed; return whether it could be told.

    By default glibc gives a large block back to the kernel as soon as it is freed, so that every training step on the
    CPU pays for fresh pages again: a sixth of the time of a small convolutional network's step. This is for a program's
    start, never for a library's import, because it concerns the whole process.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return False
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # from malloc.h
    largest = 2**31 - 1
    settings = ((mmap_threshold, largest), (trim_threshold, largest), (top_pad, 64 * 2**20))
    return all(mallopt(option, ctypes.c_int(value)) == 1 for option, value in settings)


def _repeat_exactly() -> None:
    """Let PyTorch use deterministic operations alone; it refuses those that have no such form, by name."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS needs for it
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def _prepare() -> None:
    """Let this process keep the memory that it frees, and PyTorch convolve float32 as such."""
    keep_freed_memory()
    # On a GPU it would by default round to TF32's ten bits, in testing too; half precision is there for those who ask.
    torch.backends.cudnn.allow_tf32 = False


_USUAL_THREADS = torch.get_num_threads()


def _use_threads(threads: int | None) -> int:
    torch.set_num_threads(threads or _USUAL_THREADS)
    return torch.get_num_threads()


build_learner = learner_builder(TorchLearner, {"transformers": hub_backbone, "timm": timm_backbone})
BACKEND = Backend("torch", build_learner, _repeat_exactly, _prepare, _use_threads)

if __name__ == "__main__":
    if not is_one_of_several():
        run_command(BACKEND)
    BACKEND.prepare()
    status, _ = run_in_processes(partial(met, BACKEND), os.environ["RANK"] == "0")
    sys.exit(status)
