"""``python -m adapters.torch.run``: continual learning on PyTorch from the command line."""

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

from adapters.architectures import build_network
from became_core.continual import TaskStream

__all__ = ["BACKEND", "build_learner"]


def build_learner(network: str, stream: TaskStream, device: str, seed: int) -> TorchLearner:
    """Return a fresh learner with a backbone known by name.

    Args:
        network: the backbone, as in ``adapters.architectures.NETWORKS``.
        stream: what it will learn.
        device: a PyTorch device, or "auto" for the first accelerator there is, else the CPU.
        seed: names the draw of the initial weights.

    Raises:
        BecameError: if there is no such network or device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    channels, height, width = stream.dataset.images.shape[1:]
    backbone = Described(build_network(network, (channels, height, width)), seed)
    return TorchLearner(backbone, stream, device=device, seed=seed)


BACKEND = Backend("torch", build_learner)

if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main(BACKEND))
