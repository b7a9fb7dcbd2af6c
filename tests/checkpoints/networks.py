"""A small PyTorch network for ``--load tests.checkpoints.networks:load``, and losses for ``--evaluate``."""

from pathlib import Path
from typing import Any

import numpy as np

from adapters.checkpoints import open_checkpoint
from tests.checkpoints.models import arrays

CLASSES, WIDTH = 3, 4
SHAPES: dict[str, tuple[int, ...]] = {"0.weight": (5, WIDTH), "0.bias": (5,), "2.weight": (CLASSES, 5)}


def load(path: Path) -> Any:
    import torch
    from torch import nn

    network = nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.Linear(5, CLASSES, bias=False))
    tensors = open_checkpoint(path).tensors
    network.load_state_dict({name: torch.from_numpy(tensor.whole().copy()) for name, tensor in tensors.items()})
    return network


MIXING_SHAPES = SHAPES | {"rate": (5,)}


def load_mixing(path: Path) -> Any:
    """A network whose outputs at a position depend on earlier ones, and one parameter of which no tap speaks."""
    import torch
    from torch import nn

    class Mixing(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(*load(path.with_name("M.safetensors")))
            self.rate = nn.Parameter(torch.from_numpy(open_checkpoint(path).tensors["rate"].whole().copy()))

        def forward(self, inputs: Any) -> Any:
            hidden = torch.tanh(self[0](inputs))
            return self[2](hidden.cumsum(1) * self.rate.exp())

    return Mixing()


def load_with_body(path: Path) -> Any:
    """The same network as a model of transformers has it: a body, whose name begins the names of its parameters."""
    from torch import nn

    class WithBody(nn.Module):
        base_model_prefix = "body"

        def __init__(self) -> None:
            super().__init__()
            self.body = load(path)

        def forward(self, inputs: Any) -> Any:
            return self.body(inputs)

    return WithBody()


def load_sequence(path: Path) -> Any:
    """The same network at every position of a sequence, [samples, positions, WIDTH]."""
    return load(path)


def no_module(path: Path) -> Any:
    return path


def distance(folder: Path) -> float:
    """A loss with its minimum in a point between the models of seeds 0 and 1, at 0.3."""
    total = 0.0
    for name, tensor in open_checkpoint(folder).tensors.items():
        middle = 0.7 * arrays(0)[name] + 0.3 * arrays(1)[name]
        total += float(np.sum((tensor.whole() - middle) ** 2))
    return total
