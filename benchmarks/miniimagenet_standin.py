"""A stand-in for miniImageNet: ``python benchmarks/miniimagenet_standin.py --data-dir DATA --out FOLDER``.

miniImageNet's licence asks everyone to obtain it themselves. Who has not, can try its benchmark on the first hundred
classes of TinyImageNet, enlarged from 64×64 to 84×84 pixels. The script writes them as the loader of miniImageNet reads
them; then ``became run --benchmark split-miniimagenet --data-dir FOLDER`` learns them. Results are not those of
miniImageNet: say that they are of a stand-in.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from adapters.benchmarks.location import data_directory
from adapters.benchmarks.tinyimagenet import load_tinyimagenet
from became_core import BecameError

SIZE, CLASSES = 84, 100


def enlarged(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return an image [3, 64, 64] as [84, 84, 3], resized bilinearly."""
    return np.asarray(Image.fromarray(image.transpose(1, 2, 0)).resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def main() -> None:
    """Write ``mini-imagenet/train.npz`` and ``test.npz``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="the folder that has TinyImageNet, as became run takes it")
    parser.add_argument("--out", type=Path, required=True, help="the folder that shall hold mini-imagenet")
    options = parser.parse_args()
    data = load_tinyimagenet(data_directory(options.data_dir))
    images, labels = np.asarray(data.images), np.asarray(data.labels)
    folder = options.out / "mini-imagenet"
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", slice(data.train_size)), ("test", slice(data.train_size, None))):
        chosen = labels[rows] < CLASSES
        part = np.stack([enlarged(image) for image in images[rows][chosen]])
        np.savez(folder / f"{name}.npz", images=part, labels=labels[rows][chosen])


if __name__ == "__main__":
    try:
        main()
    except BecameError as error:
        sys.exit(f"error: {error}")
