"""The published GPM's training steps, timed on request; ``benchmarks/peers.py`` starts this in GPM's own environment.

The one argument is a folder with https://github.com/sahagobinda/GPM. What its script for CIFAR-100 imports to draw and
to download is replaced by stand-ins if it is missing, since no training step uses it. The script runs as it is.

Convention: each line of the input names what to do: ``plain``, ``projected`` or ``memory``; each line of the output is
the seconds that it took. The images are random, 64 a batch, in float32.
"""

import argparse
import contextlib
import importlib
import io
import os
import sys
import time
from importlib.util import find_spec
from typing import Any
from unittest.mock import MagicMock, patch

import numpy as np
import torch

STEPS, BATCH, CLASSES, TASKS = 8, 64, 10, 10
WIDTHS = (48, 576, 512, 1024, 2048)  # of what conv1, conv2, conv3, fc1 and fc2 read
UNUSED = ("torchvision", "matplotlib", "matplotlib.pyplot", "seaborn", "pandas")


def published(folder: str) -> Any:
    """Return the script as a module."""
    sys.path.insert(0, folder)
    missing = [name for name in UNUSED if find_spec(name.partition(".")[0]) is None]
    # Only while it is imported: PyTorch looks at modules later, and these have no file.
    with patch.dict(sys.modules, {name: MagicMock() for name in missing}):
        return importlib.import_module("main_cifar100")


def main() -> None:
    """Do what is asked for, until nothing more is."""
    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    gpm, device = published(sys.argv[1]), torch.device("cpu")
    model = gpm.AlexNet([(task, CLASSES) for task in range(TASKS)]).to(device)
    images, labels = torch.randn(STEPS * BATCH, 3, 32, 32), torch.randint(CLASSES, (STEPS * BATCH,))
    bases = [torch.linalg.qr(torch.randn(width, width // 2))[0] for width in WIDTHS]
    products = [basis @ basis.T for basis in bases]
    optimizer, criterion = torch.optim.SGD(model.parameters(), lr=0.01), torch.nn.CrossEntropyLoss()
    sizes = argparse.Namespace(batch_size_train=BATCH)
    task, known = 2, [basis.numpy() for basis in bases]

    def remember() -> None:
        matrices = gpm.get_representation_matrix(model, device, images, labels)
        gpm.update_GPM(model, matrices, np.array([0.97 + 0.003 * task] * len(WIDTHS)), list(known))

    todo = {
        "plain": lambda: gpm.train(sizes, model, device, images, labels, optimizer, criterion, task),
        "projected": lambda: gpm.train_projected(
            sizes, model, device, images, labels, optimizer, criterion, products, task
        ),
        "memory": remember,
    }
    for line in sys.stdin:
        began = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            todo[line.strip()]()
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()
