"""Fisher files of a small network, and what autograd says of single samples."""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from tests.checkpoints.models import Arrays
from tests.checkpoints.networks import CLASSES, WIDTH, load

USUAL = {"became.fisher": "1", "kind": "empirical", "unit": "sum", "per": "sample", "samples": "3", "tokens": "5"}


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "numpy") as opened:
        return dict(opened.metadata())


def data(file: Path, samples: int, seed: int = 0, *, positions: int | None = None) -> tuple[Any, Any]:
    generator = np.random.default_rng(seed)
    leading = (samples,) if positions is None else (samples, positions)
    inputs = generator.normal(size=(*leading, WIDTH)).astype(np.float32)
    targets = generator.integers(0, CLASSES, leading)
    np.savez(file, inputs=inputs, targets=targets)
    return inputs, targets


def gradient(network: Any, inputs: Any, target: Any, position: Any = slice(None)) -> Arrays:
    """Of one sample's loss, the plain way."""
    import torch

    network.zero_grad()
    logits = network(torch.from_numpy(np.atleast_2d(inputs)))[position]
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(np.atleast_1d(target)), reduction="sum")
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: value.grad.numpy().astype(float) for name, value in network.named_parameters()}


def measured(tmp_path: Path, name: str = "F", **options: Any) -> Path:
    from adapters.checkpoints.fisher_data import FisherRequest, fisher_from_data
    from adapters.checkpoints.fisher_inputs import read_samples

    model, out = tmp_path / "M.safetensors", tmp_path / f"{name}.safetensors"
    samples = read_samples(str(tmp_path / f"{options.pop('data', 'data')}.npz"))
    fisher_from_data(model, samples, out, FisherRequest(**options), load(model))
    return out
