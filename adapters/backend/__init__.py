"""What all frameworks share: how a backend is loaded and started, and the learner without its derivatives.

It is a package of its own, beside ``adapters/networks``, because it imports no framework and every framework imports
it: a rule that stands here cannot be different in PyTorch, JAX and TensorFlow.

| file | what it holds |
| --- | --- |
| ``entry.py`` | ``Backend``, how one is found and loaded, ``python -m adapters.FRAMEWORK.run`` |
| ``learner.py`` | the constructor, devices, chunks, heads, masks and the outline of training and of taps |
| ``functional.py`` | the learner whose network is a pure function of its weights |
| ``network.py`` | one step of training as a pure function: what is projected where, what a region changes |
| ``heads.py`` | one head among all: the names of a task's own parameters |
| ``processes.py`` | several processes that share a command's runs |
| ``pictures.py`` | pictures that a run records, as PNG files in a text |
| ``checking.py`` | the look at a user's network, once, in learners and around a user's own loop |
| ``batches.py`` | around a user's own loop: how batches are read and drawn, and means over them |
| ``own_loss.py`` | around a user's own loop: a loss of the user's own, as a likelihood |
| ``continual.py`` | around a user's own loop: what ``Continual`` does alike in PyTorch and Keras |
| ``memory.py``, ``memory_file.py`` | around a user's own loop: what is remembered, and the file that keeps it |
| ``merging.py``, ``calibration.py`` | around a user's own loop: a task's measured loss, the merge, what calibrates it |
| ``own_loop.py`` | around a user's own loop: what is reported of coverage, merges and checks |

A framework whose networks are pure functions of their weights (JAX, TensorFlow) adds the derivatives: gradients, taps
and tangents. PyTorch, whose users bring modules, adds its own training and shares all else.
"""

from adapters.backend.entry import (
    BACKENDS,
    Backend,
    BackendName,
    Builder,
    available_threads,
    first_installed,
    learner_builder,
    load_backend,
    needs_package,
    run_command,
    threads_for,
)
from adapters.backend.functional import FunctionalLearner
from adapters.backend.heads import Heads
from adapters.backend.learner import NetworkLearner
from adapters.backend.network import Data, Factors, Network, State, Step, projected_by_rows
from adapters.backend.processes import LostProcessError, Processes, run_in_processes, timeout_asked_for

__all__ = [
    "BACKENDS",
    "Backend",
    "BackendName",
    "Builder",
    "Data",
    "Factors",
    "FunctionalLearner",
    "Heads",
    "LostProcessError",
    "Network",
    "NetworkLearner",
    "Processes",
    "State",
    "Step",
    "available_threads",
    "first_installed",
    "learner_builder",
    "load_backend",
    "needs_package",
    "projected_by_rows",
    "run_command",
    "run_in_processes",
    "threads_for",
    "timeout_asked_for",
]
