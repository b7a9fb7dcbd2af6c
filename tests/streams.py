"""Small synthetic streams of tasks for whole runs; a network that trains without protection forgets their old tasks."""

import numpy as np

from became_core.continual import Dataset, TaskStream, split_classes, split_domains
from became_core.curvature import Categorical, Gaussian

__all__ = ["drifting_stream", "prototype_stream", "text_stream"]


def prototype_stream(
    *,
    tasks: int = 3,
    classes_per_task: int = 3,
    per_class: int = 40,
    channels: int = 1,
    side: int = 6,
    noise: float = 30.0,
    validation: float = 0.0,
    seed: int = 0,
) -> TaskStream:
    """Return a stream of noisy prototypes as uint8 images; a quarter of the images of each class is the test part.

    Every task has its own centre, around which its classes lie, so that tasks use different directions of the input.
    """
    draw = np.random.default_rng(seed)
    shape = (channels, side, side)
    centres = np.repeat(40 * draw.normal(size=(tasks, *shape)), classes_per_task, axis=0)
    prototypes = 127 + centres + 20 * draw.normal(size=(tasks * classes_per_task, *shape))
    labels = np.tile(np.arange(len(prototypes)), per_class)
    images = prototypes[labels] + noise * draw.normal(size=(len(labels), *shape))
    pixels = np.clip(np.rint(images), 0, 255).astype(np.uint8)
    train_size = len(labels) * 3 // 4
    scaled = pixels[:train_size] / 255
    dataset = Dataset(
        name="prototypes",
        images=pixels,
        labels=labels,
        train_size=train_size,
        mean=tuple(scaled.mean(axis=(0, 2, 3)).tolist()),
        std=tuple(scaled.std(axis=(0, 2, 3)).tolist()),
    )
    return split_classes(dataset, tasks, validation=validation, seed=seed)


def drifting_stream(*, tasks: int = 2, rows: int = 40, outputs: int = 2, shared_head: bool = True) -> TaskStream:
    """Return a stream of regression whose inputs and function move by task; a quarter of the rows is for testing."""
    draw, pixels = np.random.default_rng(0), 64
    centres = 2 * draw.normal(size=(tasks, pixels))
    inputs = centres.repeat(rows, axis=0) + draw.normal(size=(tasks * rows, pixels))
    targets = 3 * np.sin(inputs @ draw.normal(size=(pixels, outputs)) / 8) + 1
    domains = np.repeat(np.arange(tasks), rows)
    targets = targets * np.where(domains % 2, -1, 1)[:, None]
    order = draw.permutation(len(inputs))
    images, train = inputs[order].astype(np.float32).reshape(-1, 1, 8, 8), len(inputs) * 3 // 4
    mean, std = float(images[:train].mean()), float(images[:train].std())
    dataset = Dataset(
        *("drift", images, targets[order], train, (mean,), (std,)),
        likelihood=Gaussian(noise=0.5),
        domains=domains[order],
    )
    return split_domains(dataset, validation=0.0, shared_head=shared_head)


def text_stream(*, tasks: int = 2, samples: int = 16, length: int = 6) -> TaskStream:
    """Return a stream of text, a few letters a domain, of which every fourth label is ignored in the last sample."""
    draw = np.random.default_rng(0)
    domains = np.repeat(np.arange(tasks), samples)
    letters = 97 + 3 * domains[:, None] + draw.integers(0, 3, (len(domains), length + 1))
    order = draw.permutation(len(domains))
    text, labels = letters[order, :-1].astype(np.uint8), letters[order, 1:].copy()
    labels[-1, ::4] = -100
    labels[0, ::4] = -100
    likelihood, train = Categorical(by="token"), len(domains) * 3 // 4
    dataset = Dataset("letters", text, labels, train, (), (), likelihood=likelihood, domains=domains[order])
    return split_domains(dataset, validation=0.0)
