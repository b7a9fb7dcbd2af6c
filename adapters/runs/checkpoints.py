"""The states of a run on disk, the last two of them, for a run on any backend to go on from.

A checkpoint is two files: ``000012.safetensors`` holds the arrays, by canonical names and in canonical layouts, and
``000012.json``, written after it, the plain values, the run's settings and a digest of the arrays. A checkpoint is
there once its JSON is. Nothing in them is executed.

Convention: a checkpoint's number counts the epochs and tasks that are done.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load as unpacked
from safetensors.numpy import save as packed

from adapters.runs.encoding import HostArrays, MisfitError, decoded, encoded
from adapters.runs.files import (
    DamagedError,
    digest,
    read_file,
    read_sealed,
    remove_temporary_files,
    write_file,
    write_sealed,
)
from adapters.runs.settings import describe, difference
from became_core import BecameError
from became_core.arrays import Params, device, namespace, on_host
from became_core.continual import Callback, Learner, Method, RunState, TaskStream, Training

__all__ = ["Checkpoints", "tidy"]

FORMAT = 1
KEPT = 2
FILE = r"(\d{6,})\.(?:json|safetensors)"


@dataclass(frozen=True)
class Checkpoints(Callback):
    """The checkpoints of one run in a folder: a callback that saves every state; ``load`` gives the last one back.

    Attributes:
        folder: theirs alone.
        stream: the run's, like the others.
        method: likewise.
        training: likewise.
        seed: likewise.
    """

    folder: Path
    stream: TaskStream
    method: Method
    training: Training
    seed: int = 0

    def on_state(self, state: RunState) -> None:
        """Save it."""
        self.save(state)

    def save(self, state: RunState) -> None:
        """Write a checkpoint; then remove all but the last two.

        Raises:
            BecameError: if it cannot be written, or the folder holds checkpoints further on; those there are stay.
        """
        number = state.epochs + state.task
        if self.numbers()[-1:] > [number]:
            raise BecameError(f"{self.folder} holds a run that is further on; load it or choose another folder.")
        plain, arrays = encoded(state)
        content = packed(arrays)
        # Its name need not last before that of its JSON, without which it is nothing.
        write_file(self._file(number, "safetensors"), content, lasting=False)
        write_sealed(
            self._file(number, "json"),
            {"format": FORMAT, "settings": self.settings, "arrays": digest(content), "state": plain},
        )
        tidy(self.folder)

    def load(self, learner: Learner, say: Callable[[str], None] = lambda note: None) -> RunState | None:
        """Return the state of the last checkpoint that is whole, in the learner's arrays; None if there is none at all.

        Args:
            learner: of the network that goes on.
            say: called with a sentence about each checkpoint that had to be left out.

        Raises:
            BecameError: if none is whole, or it is of another run or network; the first thing that differs is named.
        """
        for number in reversed(self.numbers()):
            try:
                values, arrays = self._read(number)
            except DamagedError as error:
                say(f"{error}; it is left out.")
                continue
            return self._checked(number, values, arrays, learner)
        if self.numbers():
            raise BecameError(f"no checkpoint in {self.folder} is whole; move the folder away to begin anew.")
        return None

    def numbers(self) -> list[int]:
        """Return the numbers of the checkpoints that are there, in order."""
        return _numbers(self.folder)

    @property
    def last(self) -> Path | None:
        """The last checkpoint, by its JSON."""
        numbers = self.numbers()
        return self._file(numbers[-1], "json") if numbers else None

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What the run is given."""
        return describe(self.stream, self.method, self.training, self.seed)

    def _file(self, number: int, suffix: str) -> Path:
        return self.folder / f"{number:06d}.{suffix}"

    def _read(self, number: int) -> tuple[dict[str, Any], HostArrays]:
        """Return a checkpoint's values and arrays as they were written."""
        file, beside = self._file(number, "json"), self._file(number, "safetensors")
        values = read_sealed(file)
        if not beside.exists():
            raise DamagedError(f"{beside} is missing")
        content = read_file(beside)
        if digest(content) != values.get("arrays"):
            raise DamagedError(f"{beside} is damaged")
        try:
            return values, dict(unpacked(content))
        except (SafetensorError, ValueError, KeyError):
            raise DamagedError(f"{beside} holds no arrays") from None

    def _checked(self, number: int, values: dict[str, Any], arrays: HostArrays, learner: Learner) -> RunState:
        """Return the state of a whole checkpoint if it is this run's."""
        file = self._file(number, "json")
        if values.get("format") != FORMAT or not isinstance(values.get("settings"), dict):
            raise BecameError(f"{file} is of another version of this package; move it away to begin anew.")
        found = difference(values["settings"], self.settings)
        if found is not None:
            name, theirs, ours = found
            raise BecameError(f"{file} is of a run with {name} = {theirs}, not {ours}; choose another folder.")
        theta = learner.parameters()
        like = next(iter(theta.values()))
        xp = namespace(parameter=like)
        try:
            state = decoded(
                values.get("state"),
                arrays,
                self.method.projector,
                lambda array: xp.asarray(array, device=device(like)),
            )
        except MisfitError as error:
            raise BecameError(f"{file} holds no state of this run: {error}.") from None
        for weights in _weights(state):
            _check_fit(file, weights, theta)
        return state


def tidy(folder: Path) -> None:
    """Remove all checkpoints but the last two, arrays without their JSON, and temporary files of killed processes.

    Only a process that keeps all others out of the run's folder may call this. Files with other names stay.

    Raises:
        BecameError: if a file cannot be removed.
    """
    if not folder.is_dir():
        return
    remove_temporary_files(folder, FILE)
    last = _numbers(folder)[-KEPT:]
    try:
        for file in sorted(folder.iterdir()):  # a JSON goes before its arrays, which are nothing without it
            match = re.fullmatch(FILE, file.name)
            if match and int(match[1]) not in last:
                file.unlink(missing_ok=True)
    except OSError as error:
        raise BecameError(f"cannot tidy {folder}: {error.strerror}.") from None


def _numbers(folder: Path) -> list[int]:
    return sorted(int(file.stem) for file in folder.glob("*.json") if file.stem.isdecimal())


def _weights(state: RunState) -> list[Params]:
    """Every set of all the network's weights in a state."""
    sets = [state.theta]
    if state.theta_gp is not None:
        sets.append(state.theta_gp)
    if state.stage is not None and state.stage.best is not None:
        sets.append(state.stage.best.theta)
    if state.memory.posterior is not None:
        sets.append(state.memory.posterior.mean)
    return sets


def _check_fit(file: Path, weights: Params, theta: Params) -> None:
    """Raise a BecameError that names the first of these weights that is not like the network's."""
    for name in {**theta, **weights}:
        if name not in weights or name not in theta:
            there, missing = ("network", "checkpoint") if name in theta else ("checkpoint", "network")
            raise BecameError(f"{file} is of another network: the {there} has '{name}', the {missing} has not.")
        found, own = on_host(weights[name]), on_host(theta[name])
        if (found.shape, found.dtype) != (own.shape, own.dtype):
            raise BecameError(
                f"{file} is of another network: '{name}' is {found.dtype} {list(found.shape)} there, "
                f"{own.dtype} {list(own.shape)} here."
            )
