"""``python -m adapters.torch.run``: continual learning on PyTorch from the command line."""

import os
import sys

try:
    import torch

    from adapters.cli.main import Backend, main
    from adapters.torch.learner import TorchLearner
    from adapters.torch.memory import keep_freed_memory
    from adapters.torch.networks import Described
except ModuleNotFoundError as error:
    print(f"error: the package '{error.name}' is missing; pip install 'became[torch]'.", file=sys.stderr)
    sys.exit(2)

from adapters.networks import DropoutMasks, Norm, build_network
from became_core.continual import TaskStream

__all__ = ["BACKEND", "build_learner", "prepare", "repeat_exactly"]


def build_learner(
    network: str,
    stream: TaskStream,
    device: str,
    seed: int,
    *,
    norm: Norm = "batch",
    mixed_precision: bool = False,
    dropout_masks: DropoutMasks = "numpy",
) -> TorchLearner:
    """Return a fresh learner with a backbone known by name.

    Args:
        network: the backbone, as in ``adapters.networks.NETWORKS``.
        stream: what it will learn.
        device: a PyTorch device, or "auto" for the first accelerator there is, else the CPU.
        seed: names the draw of the initial weights.
        norm: the backbone's kind of normalisation, likewise.
        mixed_precision: whether training steps multiply in bfloat16.
        dropout_masks: what draws them.

    Raises:
        BecameError: if there is no such network or device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    channels, height, width = stream.dataset.images.shape[1:]
    backbone = Described(build_network(network, (channels, height, width), norm), seed)
    return TorchLearner(
        backbone, stream, device=device, mixed_precision=mixed_precision, dropout_masks=dropout_masks, seed=seed
    )


def repeat_exactly() -> None:
    """Let PyTorch use deterministic operations alone; it refuses those that have no such form, by name."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS needs for it
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def prepare() -> None:
    """Let this process keep the memory that it frees, and PyTorch convolve float32 as such."""
    keep_freed_memory()
    # On a GPU it would by default round to TF32's ten bits, in testing too; half precision is there for those who ask.
    torch.backends.cudnn.allow_tf32 = False


BACKEND = Backend("torch", build_learner, repeat_exactly, prepare)

if __name__ == "__main__":
    prepare()
    sys.exit(main(BACKEND))
