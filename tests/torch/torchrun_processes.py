"""What the processes of ``test_torchrun.py`` do.

Convention: a process writes what it finds into a file of its rank. Whole runs are compared in double precision.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import distributed

from adapters.backend import run_in_processes
from adapters.networks import (
    Architecture,
    BatchNorm,
    CausalAttention,
    Convolution,
    Dropout,
    Embedding,
    Flatten,
    LayerNorm,
    Linear,
    MaxPool,
    Positions,
    ReLU,
    Residual,
)
from adapters.torch.learner import TorchLearner
from adapters.torch.processes import met
from adapters.torch.run import BACKEND
from adapters.torch.share import ProcessShare
from became_core.continual import (
    Annealed,
    Augmentation,
    EpochEnd,
    Patience,
    Share,
    TaskEnd,
    TaskStream,
    Training,
    build_method,
    learn,
)
from tests.listening import Listening
from tests.streams import drifting_stream, prototype_stream, text_stream

__all__ = ["CASES", "command", "compare"]

# Batches of 12, of which the last has 7 samples: two processes share it unequally.
IMAGES = prototype_stream(tasks=2, classes_per_task=3, per_class=16, side=8, validation=0.14)
TRAINING = Training(
    Annealed(lr=0.5, epochs=2), Annealed(lr=0.2, epochs=1), batch_size=12, projector_samples=20, curvature_samples=30
)
BY_VALIDATION = replace(TRAINING, stage1=Patience(lr=0.3, epochs=2), augmentation=Augmentation(padding=1))


def flat(stream: TaskStream) -> Architecture:
    """Its first layer has more inputs than the projector has samples, and its second has fewer."""
    layers = (Flatten(), Linear("fc1", 10, bias=True), ReLU(), Dropout(0.25), Linear("fc2", 9), ReLU())
    return Architecture(layers, stream.dataset.images.shape[1:])


def normalised(stream: TaskStream, running: bool = False) -> Architecture:
    """With batch norm over positions and over samples alone, and dropout of images and of features."""
    layers = (
        *(Convolution("conv1", 4, 3), BatchNorm("bn1", running=running), ReLU(), Dropout(0.1), MaxPool(2)),
        *(Flatten(), Linear("fc1", 8), BatchNorm("bn2", running=running), ReLU(), Dropout(0.25)),
    )
    return Architecture(layers, stream.dataset.images.shape[1:])


def transformer(stream: TaskStream) -> Architecture:
    attention = LayerNorm("ln"), Linear("qkv", 24, bias=True), CausalAttention(2), Linear("out", 8)
    layers = (Embedding("tokens", 256, 8), Positions("positions", 6), Residual(attention))
    return Architecture(layers, stream.dataset.images.shape[1:])


class Case(NamedTuple):
    """A run.

    Attributes:
        method: how it learns.
        network: what learns.
        training: its schedules.
        stream: its tasks.
        settings: of the method.
        fisher: another kind of Fisher information than the method's.
    """

    method: str
    network: Callable[[TaskStream], Architecture] = flat
    training: Training = TRAINING
    stream: TaskStream = IMAGES
    settings: dict[str, Any] = {}  # noqa: RUF012 - nothing changes it
    fisher: Any = None


CASES = {
    "gpm, batch norm": Case("became+gpm", normalised, replace(TRAINING, augmentation=Augmentation(padding=1))),
    "nscl, running statistics": Case("became+nscl", lambda stream: normalised(stream, running=True), BY_VALIDATION),
    "trgp": Case("became+trgp"),
    "ewc": Case("ewc"),
    "ewc, single samples": Case("ewc", training=replace(TRAINING, batch_size=1, stage1=Annealed(lr=0.01, epochs=1))),
    "hat": Case("hat"),
    "ogd": Case("became+ogd"),
    "published": Case("became-paper+gpcns", settings={"threshold": 0.9}),
    "sampled Kronecker": Case("became", settings={"precision": "kronecker"}, fisher="sampled"),
    "text": Case("became", transformer, stream=text_stream()),
    "regression": Case("ewc", stream=drifting_stream()),
}


def run(case: Case, share: Share) -> dict[str, Any]:
    """What comes out of a run: alpha, accuracies, losses, and the last weights."""
    torch.manual_seed(0)
    learner = TorchLearner(case.network(case.stream), case.stream, dtype="float64")
    learner.check_divisible()
    learner.share = share
    losses: list[float] = []

    def observe(event: EpochEnd | TaskEnd) -> None:
        if isinstance(event, EpochEnd):
            losses.extend([event.loss, event.validation_loss])

    method = build_method(case.method, case.settings)
    method = replace(method, fisher=case.fisher or method.fisher)
    record = learn(learner, case.stream, method, case.training, callbacks=[Listening(observe)])
    numbers = {
        "alpha": [alpha for alpha in record.alpha if alpha is not None],
        "accuracy": record.accuracy,
        "class-incremental accuracy": record.class_incremental_accuracy,
        "correlation": record.correlation,
        "losses": losses,
    }
    weights = {name: value.numpy() for name, value in learner.parameters().items()}
    return weights | {name: np.asarray(of_run) for name, of_run in numbers.items()}


def compare(rank: int, folder: str) -> None:
    """Run each case in one process, and once more shared by two; write what differs."""
    os.chdir(folder)
    meeting = f"file://{folder}/store"
    distributed.init_process_group("gloo", meeting, timedelta(seconds=60), world_size=2, rank=rank)
    share, failures = ProcessShare(rank, 2), {}
    alone: list[Any] = [None, None]
    mine = {name: run(case, Share()) for number, (name, case) in enumerate(CASES.items()) if number % 2 == rank}
    distributed.all_gather_object(alone, mine)
    expected = alone[0] | alone[1]
    for name, case in CASES.items():
        try:
            found = run(case, share)
            assert found.keys() == expected[name].keys()
            for what, value in expected[name].items():
                np.testing.assert_allclose(found[what], value, rtol=1e-9, atol=1e-9, err_msg=what)
        except Exception:
            failures[name] = traceback.format_exc()
    Path(f"{rank}.json").write_text(json.dumps(failures), encoding="utf-8")
    distributed.destroy_process_group()


def command(rank: int, count: int, port: int, words: list[str], log: str, timeout: float = 60.0) -> None:
    """Be one of the processes that torchrun starts; what it prints goes into files beside each other."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{rank}.{name}", os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "BECAME_TIMEOUT": str(timeout)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the store outlives each process
    torch.set_num_threads(1)
    status, _ = run_in_processes(partial(met, BACKEND), rank == 0, words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
