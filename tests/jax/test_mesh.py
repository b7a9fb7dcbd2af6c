"""Learners that share each batch among devices: the numbers of one device, and which meshes can be."""

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from adapters.jax.learner import JaxLearner
from adapters.jax.mesh import warn_of_size, warn_of_threads
from adapters.jax.run import BACKEND
from adapters.networks import Architecture, Flatten
from became_core import BecameError
from tests.processes import WAIT
from tests.streams import prototype_stream


def test_four_devices_learn_what_one_learns() -> None:
    """To 1e-9 in double precision: losses, alpha, accuracies and weights of every kind of method."""
    ended = subprocess.run(
        [sys.executable, "-m", "tests.jax.mesh_devices"],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu", "PJRT_NPROC": "9"},
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr


def test_a_mesh_has_an_axis_for_data() -> None:
    mesh = Mesh(np.asarray(jax.local_devices()[:1]), ("model",))
    with pytest.raises(BecameError, match="has the axes model; one must be called data"):
        JaxLearner(Architecture((Flatten(),), (1, 6, 6)), prototype_stream(), device=mesh)


def test_a_size_of_batches_that_devices_cannot_share_is_named() -> None:
    mesh: Any = SimpleNamespace(shape={"data": 4})
    warn_of_size(12, mesh)
    with pytest.warns(UserWarning, match="4 devices cannot share batches of 10 samples"):
        warn_of_size(10, mesh)


@pytest.mark.parametrize(("threads", "pool"), [(1, "9"), (3, "11"), (None, "10")])
def test_devices_of_one_processor_have_threads_to_wait_with(
    monkeypatch: pytest.MonkeyPatch, threads: int | None, pool: str
) -> None:
    """With fewer, four devices waited for each other for ever; what the run notes are those it computes with."""
    for name in ("PJRT_NPROC", "NPROC"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.setattr("adapters.jax.run.available_threads", lambda: 2)
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_x=1 --xla_force_host_platform_device_count=4")
    for _ in range(2):
        assert BACKEND.use_threads(threads) == (threads or 2)
        assert os.environ["PJRT_NPROC"] == os.environ["NPROC"] == pool


def test_devices_of_one_processor_with_too_few_threads_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh: Any = SimpleNamespace(local_devices=[SimpleNamespace(platform="cpu")] * 4)
    alone: Any = SimpleNamespace(local_devices=[SimpleNamespace(platform="cpu"), SimpleNamespace(platform="gpu")])
    monkeypatch.setenv("PJRT_NPROC", "9")
    warn_of_threads(mesh)
    monkeypatch.setenv("PJRT_NPROC", "1")
    warn_of_threads(alone)
    with pytest.warns(UserWarning, match="4 devices of one processor share 4 threads.*set PJRT_NPROC to 9 or more"):
        warn_of_threads(mesh)
