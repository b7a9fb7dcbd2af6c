"""Modules that tests of one process and of several share, of inputs [samples, WIDTH] to CLASSES outputs."""

import torch
from torch import Tensor, nn

__all__ = ["CLASSES", "WIDTH", "Stored"]

WIDTH, CLASSES = 6, 3


class Stored(nn.Module):
    """A weight that is stored as [d_in, d_out], as GPT-2 has them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(WIDTH, 8) / 3), nn.Parameter(torch.zeros(8))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(torch.addmm(self.bias, x, self.weight).tanh())
        return outputs
