"""``Continual`` around Lightning's loop: what it does with an optimizer ends in the steps that are projected."""

import importlib
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import StepLR

from adapters.torch import Continual
from became_core.projection import GPM
from tests.torch.modules import CLASSES, WIDTH

# Of PyTorch by Lightning, and of what Lightning would have its users do.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]


@cache
def module_class() -> Any:
    """Return a class of perceptrons; Lightning is imported by the tests that run, as that takes two seconds."""
    lightning: Any = pytest.importorskip("pytorch_lightning", reason="pytorch-lightning cannot be imported")

    class Module(lightning.LightningModule):  # type: ignore[misc] # Lightning is taken as untyped
        """A perceptron that is trained automatically or by its own calls; it may make an optimizer each time."""

        def __init__(self, *, manual: bool = False, is_new: bool = False) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.network = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
            self.automatic_optimization, self.is_new = not manual, is_new
            self.optimizer = torch.optim.AdamW(self.network.parameters(), 0.05)

        def forward(self, inputs: Tensor) -> Tensor:
            outputs: Tensor = self.network(inputs)
            return outputs

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            loss = functional.cross_entropy(self(batch[0]), batch[1])
            if not self.automatic_optimization:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return loss

        def configure_optimizers(self) -> Any:
            if self.is_new:
                return torch.optim.AdamW(self.network.parameters(), 0.05)
            return {"optimizer": self.optimizer, "lr_scheduler": StepLR(self.optimizer, 1)}

    return Module


def batches(seed: int, *sizes: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, WIDTH, dtype=torch.float64, generator=generator), torch.arange(size) % CLASSES)
        for size in sizes
    ]


def fit(module: Any, data: list[tuple[Tensor, Tensor]], **options: Any) -> None:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = importlib.import_module("pytorch_lightning").Trainer(max_epochs=2, accelerator="cpu", **quiet, **options)
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))  # type: ignore[arg-type]


@pytest.mark.parametrize("manual", [False, True])
def test_old_outputs_stand_still_in_stable_training(manual: bool) -> None:
    module, old, new = module_class()(manual=manual), batches(1, 2), batches(2, 5, 4)
    options = {} if manual else {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    learning = Continual(module, projector=GPM(1.0), uncovered="frozen")
    learning.remember(old)
    before, weight = module(old[0][0]).detach(), module.network[0].weight.detach().clone()
    with learning.stable(module.optimizer):
        fit(module, new, **options)
    torch.testing.assert_close(module(old[0][0]).detach(), before, rtol=0, atol=1e-10)
    assert not torch.equal(module.network[0].weight, weight)
    with learning.plastic():
        fit(module, new, **options)
    assert 0 <= learning.merge(new).alpha <= 1


def test_an_optimizer_that_is_made_in_fit_is_noticed() -> None:
    module = module_class()(is_new=True)
    learning = Continual(module, check=False)
    learning.remember(batches(1, 2))
    message = r"have taken no step, and 'network\S*' has changed"
    with pytest.warns(UserWarning, match=message), learning.stable(module.optimizer):
        fit(module, batches(2, 5))
