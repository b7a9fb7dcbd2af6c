"""Cost of ``Continual`` in a loop of one's own: ``python benchmarks/own_loop.py [--rounds 5] [--share 0.25] [--json]``.

A ResNet-18 on 32x32 images, batch 64, and a GPT of 6 layers of width 384 (11 million weights) on 128 tokens, batch 8,
are stepped by SGD with momentum and by AdamW: plainly, and in ``stable``, where every matrix has a protected space of a
share of its width, with random bases. ``remember``'s pass is timed beside forward passes, and forward and backward
passes, over the same samples: once over all of four batches, and once over the share that it measures of 512. What a
projector then makes of the sums, once a task, is timed apart.

Convention: PyTorch, float32, on the CPU, one thread. Times are the processor's, which what else runs on a machine
changes least. Results are medians of ratios over rounds in one process.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

# So that this checkout is measured, whether or not the package is installed.
sys.path.insert(0, str(Path(__file__).parents[1]))

from adapters.backend.batches import Reader
from adapters.backend.memory import InputGrams
from adapters.networks import resnet18
from adapters.torch import Continual
from adapters.torch.data_loss import DataLoss
from adapters.torch.networks import Described
from adapters.torch.run import keep_freed_memory
from became_core.curvature import Categorical
from became_core.projection import GPM

STEPS = 3
BATCHES = 4
MANY = 512
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.01, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 1e-3),
}


class Block(nn.Module):
    """A block of a GPT: causal attention, and a perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        """Build the layers."""
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return [samples, tokens, width]."""
        q, k, v = self.qkv(self.first(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        outputs: Tensor = x + self.down(functional.gelu(self.up(self.second(x))))
        return outputs


class GPT(nn.Module):
    """A small language model with tied embeddings."""

    def __init__(self, words: int = 1024, width: int = 384, layers: int = 6, length: int = 128) -> None:
        """Build the layers."""
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, 6) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [samples, tokens, words]."""
        hidden = self.words(tokens) + self.places(torch.arange(tokens.shape[1]))
        logits: Tensor = self.head(self.norm(self.blocks(hidden)))
        return logits


def problems() -> dict[str, tuple[nn.Module, tuple[Tensor, Tensor], Any]]:
    """Return the models, a batch for each, and their likelihoods."""
    torch.manual_seed(0)
    described = Described(resnet18(3, 32, 32))
    with torch.no_grad():
        features = described(torch.zeros(2, 3, 32, 32)).shape[1]
    network = nn.Sequential(described, nn.Linear(features, 100))
    images, labels = torch.randn(64, 3, 32, 32), torch.randint(0, 100, (64,))
    tokens = torch.randint(0, 1024, (8, 128))
    return {
        "resnet18": (network, (images, labels), Categorical()),
        "gpt": (GPT(), (tokens, tokens), Categorical(by="token", shift=True)),
    }


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean cross-entropy."""
    outputs, targets = model(batch[0]), batch[1]
    return functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def with_memory(model: nn.Module, batch: tuple[Tensor, Tensor], likelihood: Any, share: float) -> Continual:
    """Return the method with a posterior of one batch, and random bases of a share of every matrix's width."""
    learning = Continual(model, likelihood, check=False, progress=False)
    learning.remember([batch])
    arrays = {"tasks": torch.tensor(1)}
    for name, (_, width) in learning.projector.rank.items():
        arrays[f"bases.{name}"] = torch.linalg.qr(torch.randn(width, max(1, round(share * width))))[0]
    learning.projector = GPM().with_arrays(arrays)
    return learning


def seconds_of(run: Callable[[], Any]) -> float:
    """Return the processor's time of a call."""
    began = time.process_time()
    run()
    return time.process_time() - began


def measure(rounds: int, share: float) -> dict[str, float]:
    """Return the ratios, and the seconds of plain steps."""
    results: dict[str, float] = {}
    for name, (model, batch, likelihood) in problems().items():
        learning = with_memory(model, batch, likelihood, share)
        matrices = sum(p.size for p in learning.coverage.parameters if p.treatment == "protected")
        results[f"{name}_protected_share"] = matrices / sum(value.numel() for value in model.parameters())

        def forward(model: nn.Module = model, batch: tuple[Tensor, Tensor] = batch) -> None:
            with torch.no_grad():
                model(batch[0])

        def backward(model: nn.Module = model, batch: tuple[Tensor, Tensor] = batch) -> None:
            loss_of(model, batch).backward()  # type: ignore[no-untyped-call]

        data = DataLoss(model, likelihood, Reader(), checks=False, shows=False)

        def remember(
            data: DataLoss = data,
            batch: tuple[Tensor, Tensor] = batch,
            count: int = BATCHES,
            share: float | None = 1.0,
        ) -> InputGrams:
            return data.fisher([batch] * count, with_memory=True, share=share)[1]

        finished = remember()  # the first pass finds out which row is which sample's
        results[f"{name}_spaces_seconds"] = seconds_of(partial(GPM().remember, finished))
        times = np.array([[seconds_of(run) for run in (forward, backward, remember)] for _ in range(rounds)])
        results[f"{name}_forward_seconds"] = float(np.median(times[:, 0]))
        results[f"{name}_backward_over_forward"] = float(np.median(times[:, 1] / times[:, 0]))
        results[f"{name}_remember_over_forward"] = float(np.median(times[:, 2] / times[:, 0])) / BATCHES
        of_many = seconds_of(partial(remember, count=MANY, share=None)) / MANY
        results[f"{name}_remember_of_many_over_forward"] = of_many / float(np.median(times[:, 0]))
        for kind, make in OPTIMIZERS.items():
            optimizer = make(model.parameters())

            def steps(
                optimizer: torch.optim.Optimizer = optimizer,
                model: nn.Module = model,
                batch: tuple[Tensor, Tensor] = batch,
            ) -> None:
                for _ in range(STEPS):
                    optimizer.zero_grad()
                    loss_of(model, batch).backward()  # type: ignore[no-untyped-call]
                    optimizer.step()

            steps()
            plain, stable = [], []
            for _ in range(rounds):
                plain.append(seconds_of(steps))
                with learning.stable(optimizer):
                    steps()  # which makes room for the weights before a step
                    stable.append(seconds_of(steps))
            results[f"{name}_{kind}_stable_over_plain"] = float(np.median(np.divide(stable, plain)))
            results[f"{name}_{kind}_plain_seconds"] = float(np.median(plain)) / STEPS
    return results


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--share", type=float, default=0.25, help="of every matrix's width that is protected")
    parser.add_argument("--json", action="store_true", help="print one object of named ratios")
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    results = measure(options.rounds, options.share)
    if options.json:
        print(json.dumps(results, indent=2))
        return
    print("| what | |\n| --- | ---: |")
    for name, value in results.items():
        print(f"| {name.replace('_', ' ')} | {value:.3f} |")


if __name__ == "__main__":
    main()
