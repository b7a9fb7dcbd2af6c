"""Small synthetic streams of tasks for whole runs; a network that trains without protection forgets their old tasks."""

import numpy as np

from became_core.continual import Dataset, TaskStream, split_classes

__all__ = ["prototype_stream"]


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
