"""Speed of the exact diagonal Fisher: ``python benchmarks/fisher.py [--batches 8] [--rounds 9] [--files] [--json]``.

The benchmark uses the AlexNet-like network for CIFAR-100 in batches of 64, on the CPU with two threads. It measures the
time to compute the empirical diagonal from taps, as a ratio to plain forward and backward passes over the same samples,
and to two other ways to compute the same numbers: squared per-sample gradients by ``torch.func.vmap(grad)``, and
BackPACK's ``SumGradSquared``, if BackPACK is installed (``pip install --group benchmarks``). These two get batch norms
whose statistics are already computed, and no dropout. Taps compute the statistics themselves.

With ``--files``, what ``became fisher --data`` does, after the model and the data are loaded, is measured instead, as
a ratio to plain forward and backward passes in chunks of the same size, in wall time and in processor time: a Fisher
file of a byte-level transformer of 3.3 million weights from 24 sequences of 64 bytes, 8 at a time, diagonal and with
Kronecker factors, digest and writing included.

Convention: float32. A lower ratio is better. Results are medians over rounds, and every contender runs in each round.
First, all contenders are compared in double precision. In single precision, rounding can move the input of a ReLU or of
a maximum to the other side of the kink, and the results would differ.
"""

import argparse
import copy
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

# So that this checkout is measured, whether or not the package is installed.
sys.path.insert(0, str(Path(__file__).parents[1]))

from adapters.networks import alexnet
from adapters.torch.layers import moments
from adapters.torch.networks import Described, Dropout, MultiHead
from adapters.torch.run import keep_freed_memory
from adapters.torch.tapping import Layouts, collect_taps
from became_core.curvature import diagonal_fisher, logit_cotangents

BATCH, CLASSES, THREADS = 64, 10, 2
Batches = list[tuple[Tensor, Tensor]]
Fisher = dict[str, Tensor]


def problem(batches: int) -> tuple[nn.Module, Batches]:
    """Return the network and its samples, in the memory format that the learner uses."""
    torch.manual_seed(0)
    network = MultiHead(Described(alexnet(3, 32, 32)), 2048, [CLASSES]).eval()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # PyTorch's own types lack it
    images = torch.randn(batches, BATCH, 3, 32, 32)
    labels = torch.randint(0, CLASSES, (batches, BATCH))
    return network, [(x.contiguous(memory_format=torch.channels_last), y) for x, y in zip(images, labels, strict=True)]


def frozen(network: nn.Module, images: Tensor) -> nn.Module:
    """Return the network for one batch as a sequence, with that batch's statistics as constants and no dropout.

    It is in contiguous memory, because BackPACK then takes four fifths of the time that it takes with channels last.
    """
    whole = copy.deepcopy(network)
    layers: list[nn.Module] = []
    values = images
    for layer in [*whole.backbone.steps, whole.heads[0]]:  # type: ignore[union-attr, index, misc]
        if isinstance(layer, Dropout):
            continue
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.running_mean, layer.running_var = moments(values.detach())
            layer.track_running_stats = True
        values = layer(values).detach()
        layers.append(layer)
    sequence = nn.Sequential(*layers).eval()
    sequence.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload] # PyTorch's own types lack it
    return sequence


def forward_backward(network: nn.Module, batches: Batches) -> None:
    """Run plain forward and backward passes, without an optimiser step."""
    for images, labels in batches:
        network.zero_grad(set_to_none=True)
        functional.cross_entropy(network(images, 0), labels).backward()  # type: ignore[no-untyped-call]


def by_taps(network: nn.Module, layouts: Layouts, batches: Batches) -> Fisher:
    """Return the diagonal from taps; the first round finds out which row is which sample's, and is not timed."""
    names = {module: name for name, module in network.named_modules()}
    rng = np.random.default_rng(0)
    taps = (
        taps_of_batch
        for images, labels in batches
        for taps_of_batch in collect_taps(
            network,
            names,
            (images, 0),
            lambda z, y=labels: logit_cotangents(z, y, "empirical", rng),  # type: ignore[misc]
            layouts=layouts,
        )
    )
    return diagonal_fisher(taps, dict(network.named_parameters()), "empirical", samples=BATCH * len(batches))


def by_vmap(networks: list[nn.Module], batches: Batches) -> Fisher:
    """Return the diagonal from per-sample gradients by vmap, 16 samples at a time, which is the fastest size."""
    total: Fisher = {}
    for network, (images, labels) in zip(networks, batches, strict=True):
        theta = {name: value.detach() for name, value in network.named_parameters()}

        def loss(theta: Fisher, image: Tensor, label: Tensor, network: nn.Module = network) -> Tensor:
            logits: Tensor = torch.func.functional_call(network, theta, (image[None],))
            return functional.cross_entropy(logits, label[None])

        per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
        for x, y in zip(images.split(16), labels.split(16), strict=True):  # type: ignore[no-untyped-call]
            for name, gradient in per_sample(theta, x, y).items():
                square = gradient.square_().sum(0)
                total[name] = total[name].add_(square) if name in total else square
    return {name: value / (BATCH * len(batches)) for name, value in total.items()}


def by_backpack(networks: list[nn.Module], batches: Batches) -> Fisher:
    """Return the diagonal from BackPACK; the networks and their losses must be extended for it."""
    from backpack import backpack, extensions

    # BackPACK's own hook on the first layer causes this warning.
    warnings.filterwarnings("ignore", "Full backward hook is firing when gradients are computed with respect to module")

    total: Fisher = {}
    for network, (images, labels) in zip(networks, batches, strict=True):
        network.zero_grad(set_to_none=True)
        loss = network.loss(network(images), labels)  # type: ignore[operator]
        with backpack(extensions.SumGradSquared()):
            loss.backward()
        for name, parameter in network.named_parameters():
            square = parameter.sum_grad_squared  # type: ignore[attr-defined]
            total[name] = total[name].add_(square) if name in total else square
    return {name: value / (BATCH * len(batches)) for name, value in total.items()}


def extended(networks: list[nn.Module]) -> list[nn.Module] | None:
    """Return copies that BackPACK can differentiate, each with a summed loss; None if BackPACK is not installed."""
    try:
        from backpack import extend
    except ImportError:
        return None
    copies = [extend(copy.deepcopy(network)) for network in networks]
    for network in copies:
        # Set without registration as a child module, so that the loss is not a layer of the sequence.
        vars(network)["loss"] = extend(nn.CrossEntropyLoss(reduction="sum"))
    return copies


def contenders_on(network: nn.Module, samples: Batches) -> dict[str, Callable[[], Any]]:
    """Return the functions to be timed, by name."""
    networks, contiguous = [frozen(network, images) for images, _ in samples], [(x.contiguous(), y) for x, y in samples]
    layouts = Layouts()
    contenders: dict[str, Callable[[], Any]] = {
        "forward_backward": lambda: forward_backward(network, samples),
        "fisher": lambda: by_taps(network, layouts, samples),
        "vmap": lambda: by_vmap(networks, contiguous),
    }
    for_backpack = extended(networks)
    if for_backpack is not None:
        contenders["backpack"] = lambda: by_backpack(for_backpack, contiguous)
    return contenders


def assert_equal(network: nn.Module, samples: Batches) -> None:
    """Assert that all ways to compute the diagonal give the same numbers."""
    in_double = contenders_on(copy.deepcopy(network).double(), [(x.double(), y) for x, y in samples])
    results = [list(run().values()) for name, run in in_double.items() if name != "forward_backward"]
    for ours, *others in zip(*results, strict=True):
        for other in others:
            torch.testing.assert_close(ours, other, rtol=1e-9, atol=1e-15)


def measure(batches: int, rounds: int) -> dict[str, float]:
    """Return the ratios, and the times in seconds a batch."""
    network, samples = problem(batches)
    assert_equal(network, samples[:1])
    contenders = contenders_on(network, samples)
    for run in contenders.values():  # a first run, so that no round pays for new memory pages
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            seconds[name].append((time.perf_counter() - began) / batches)
    others = [name for name in contenders if name != "fisher"]
    ratios = {f"fisher_over_{name}": np.divide(seconds["fisher"], seconds[name]) for name in others}
    return {name: float(np.median(values)) for name, values in ratios.items()} | {
        f"{name}_seconds": float(np.median(values)) for name, values in seconds.items()
    }


class Bytes(nn.Module):
    """A transformer over bytes, [samples, positions] to [samples, positions, 256]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 256)
        layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(256, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of every next byte."""
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        logits: Tensor = self.head(self.layers(self.embedding(tokens), mask=mask, is_causal=True))
        return logits


def measure_files(rounds: int, chunk: int = 8) -> dict[str, float]:
    """Return the ratios of making a Fisher file, and the times in seconds."""
    from safetensors.torch import save_file

    from adapters.checkpoints.fisher_data import FisherRequest, fisher_from_data
    from adapters.checkpoints.fisher_inputs import Samples

    torch.manual_seed(0)
    network = Bytes().eval()
    tokens = np.random.default_rng(0).integers(0, 256, (24, 65))
    samples = Samples(tokens[:, :-1], tokens[:, 1:])
    seconds: dict[str, list[tuple[float, float]]] = {"plain": [], "diagonal": [], "kronecker": []}
    with tempfile.TemporaryDirectory() as folder:
        model, out = Path(folder, "model.safetensors"), Path(folder, "fisher.safetensors")
        save_file({name: value.detach().clone() for name, value in network.named_parameters()}, model)

        def run(name: str) -> None:
            if name != "plain":
                request = FisherRequest(chunk=chunk, factors=name)  # type: ignore[arg-type]
                fisher_from_data(model, samples, out, request, network)
                out.unlink()
                return
            for begin in range(0, len(tokens), chunk):
                network.zero_grad(set_to_none=True)
                part = torch.from_numpy(tokens[begin : begin + chunk])
                logits = network(part[:, :-1]).flatten(0, 1)
                functional.cross_entropy(logits, part[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]

        for number in range(rounds + 1):
            for name, times in seconds.items():
                began = time.perf_counter(), time.process_time()
                run(name)
                if number:  # the first round pays for new memory pages
                    times.append((time.perf_counter() - began[0], time.process_time() - began[1]))
    results = {}
    for name in ("diagonal", "kronecker"):
        for clock, what in enumerate(("", "_processor")):
            ratios = np.asarray([t[clock] for t in seconds[name]]) / [t[clock] for t in seconds["plain"]]
            results[f"{name}_over_plain{what}"] = float(np.median(ratios))
    return results | {f"{name}_seconds": float(np.median([t[0] for t in times])) for name, times in seconds.items()}


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--files", action="store_true", help="measure what became fisher does")
    parser.add_argument("--json", action="store_true", help="print one object of named ratios")
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(THREADS)
    results = measure_files(options.rounds) if options.files else measure(options.batches, options.rounds)
    if options.json:
        print(json.dumps(results, indent=2))
        return
    print("| what | |\n| --- | ---: |")
    for name, value in results.items():
        unit = f"{1000 * value:.0f} ms" if name.endswith("_seconds") else f"{value:.2f}"
        print(f"| {name.removesuffix('_seconds').replace('_', ' ')} | {unit} |")


if __name__ == "__main__":
    main()
