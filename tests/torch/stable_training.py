"""A model in stable training, which must leave what it was taught standing still."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.torch import Continual
from became_core.projection import GPM

__all__ = ["CLASSES", "WIDTH", "Case"]

WIDTH, CLASSES = 6, 3


class Case:
    """A model that remembers two samples in all their directions, and new data."""

    def __init__(self, model: nn.Module | None = None) -> None:
        torch.manual_seed(0)
        self.model: Any = model or nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, CLASSES))
        self.model.double()
        self.old, self.new = torch.randn(2, WIDTH).double(), torch.randn(5, WIDTH).double()
        self.learning = Continual(self.model, projector=GPM(1.0), uncovered="frozen", check=False)
        self.learning.remember([(self.old, torch.arange(2))])
        self.before = self.model(self.old).detach()
        self.first = next(self.model.parameters()).detach().clone()

    def loss(self) -> Tensor:
        return functional.cross_entropy(self.model(self.new), torch.arange(5) % CLASSES)

    def closure(self) -> Any:
        self.model.zero_grad()
        loss = self.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def train(self, *optimizers: Any, steps: int = 3) -> None:
        for _ in range(steps):
            self.closure()
            for optimizer in optimizers:
                optimizer.step()

    def check(self) -> None:
        """Old outputs stand still, and the model has learned."""
        torch.testing.assert_close(self.model(self.old).detach(), self.before, rtol=0, atol=1e-10)
        assert not torch.equal(next(self.model.parameters()).detach(), self.first)
