"""Dropout whose masks come from a NumPy stream, so that every backend can draw the same ones, or from PyTorch.

Convention: a mask for images is drawn with channels last, [N, H, W, C], the order in which they lie in memory.
"""

import numpy as np
import torch
from torch import Tensor, nn

from adapters.networks import draw_mask

__all__ = ["Dropout", "use_stream"]


class Dropout(nn.Module):
    """Zero each element with probability p in training and scale the rest by 1 / (1 - p).

    p is rounded to a multiple of 2^-16. Without a stream the framework draws.
    """

    def __init__(self, p: float) -> None:
        """Keep the probability."""
        super().__init__()
        self.threshold = round(p * 2**16)
        self.stream: np.random.Generator | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the inputs, dropped out in training."""
        if not self.training or self.threshold == 0:
            return inputs
        p = self.threshold / 2**16
        if self.stream is None:
            return nn.functional.dropout(inputs, p)
        mask = draw_mask(tuple(inputs.movedim(1, -1).shape), self.threshold, self.stream)
        keep = torch.from_numpy(mask).movedim(-1, 1)
        return inputs * keep.to(inputs.device, inputs.dtype).mul_(1 / (1 - p))


def use_stream(network: nn.Module, stream: np.random.Generator | None) -> None:
    """Let all dropout layers of a network draw from this stream, in the order in which they run."""
    for module in network.modules():
        if isinstance(module, Dropout):
            module.stream = stream
