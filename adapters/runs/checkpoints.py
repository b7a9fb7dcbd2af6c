"""The last two states of a run on disk, from which the run can be resumed on any backend.

A checkpoint is two files: ``000012.safetensors`` holds the arrays, by canonical names and in canonical layouts, and
``000012.json``, written after it, the plain values, the run's settings and a digest of the arrays. A checkpoint
exists once its JSON exists. Nothing in the files is executed.

Convention: a checkpoint's number counts the epochs and tasks that are done.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
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
    """The checkpoints of one run in a folder: a callback that saves every state; ``load`` returns the last one.

    Attributes:
        folder: the folder; it holds nothing but these checkpoints.
        stream: the tasks of the run.
        method: the method of the run.
        training: how the run trains.
        seed: the seed of the run.
    """

    folder: Path
    stream: TaskStream
    method: Method
    training: Training
    seed: int = 0
    _damaged: set[int] = field(default_factory=set, init=False, repr=False, compare=False)

    def on_state(self, state: RunState) -> None:
        """Save the state."""
        self.save(state)

    def save(self, state: RunState) -> None:
        """Write a checkpoint; then remove all but the last two.

        Raises:
            BecameError: if it cannot be written, or the folder holds later checkpoints; those that are there stay.
        """
        number = state.epochs + state.task
        self._set_damaged_aside()
        if self.numbers()[-1:] > [number]:
            raise BecameError(f"{self.folder} holds a run that is further on; load it or choose another folder.")
        plain, arrays = encoded(state)
        content = packed(arrays)
        # Its name need not reach the disk before the name of its JSON, without which it counts for nothing.
        write_file(self._file(number, "safetensors"), content, lasting=False)
        write_sealed(
            self._file(number, "json"),
            {"format": FORMAT, "settings": self.settings, "arrays": digest(content), "state": plain},
        )
        tidy(self.folder)

    def load(self, learner: Learner, say: Callable[[str], None] = lambda note: None) -> RunState | None:
        """Return the state of the last checkpoint that is whole, as arrays of the learner; None without checkpoints.

        Args:
            learner: holds the network of the run.
            say: is called with a sentence about each damaged checkpoint that is left out.

        Raises:
            BecameError: if no checkpoint is whole, or the last one is of another run or another network; the message
                names the first difference.
        """
        self._damaged.clear()
        for number in reversed(self.numbers()):
            try:
                values, arrays = self._read(number)
            except DamagedError as error:
                say(f"{error}; it is left out.")
                self._damaged.add(number)
                continue
            return self._checked(number, values, arrays, learner)
        if self.numbers():
            raise BecameError(f"no checkpoint in {self.folder} is whole; move the folder away to begin anew.")
        return None

    def _set_damaged_aside(self) -> None:
        """Rename checkpoints that were left out, which seem to be further on than those that are saved from now on."""
        for number in sorted(self._damaged):
            file = self._file(number, "json")
            try:
                file.replace(file.with_suffix(".damaged"))
            except FileNotFoundError:
                pass
            except OSError as error:
                raise BecameError(f"{file} is damaged and cannot be renamed: {error.strerror}.") from None
        self._damaged.clear()

    def numbers(self) -> list[int]:
        """Return the numbers of the checkpoints, in order."""
        return _numbers(self.folder)

    @property
    def last(self) -> Path | None:
        """The JSON file of the last checkpoint; None without checkpoints."""
        numbers = self.numbers()
        return self._file(numbers[-1], "json") if numbers else None

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What the result of the run depends on, as ``describe`` gives it."""
        return describe(self.stream, self.method, self.training, self.seed)

    def _file(self, number: int, suffix: str) -> Path:
        return self.folder / f"{number:06d}.{suffix}"

    def _read(self, number: int) -> tuple[dict[str, Any], HostArrays]:
        """Return the values and the arrays of a checkpoint as they were written."""
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
        """Return the state of a whole checkpoint; raise a BecameError if it is of another run."""
        file = self._file(number, "json")
        if values.get("format") != FORMAT or not isinstance(values.get("settings"), dict):
            raise BecameError(f"{file} is of another version of this package; move it away to begin anew.")
        differing = difference(values["settings"], self.settings)
        if differing is not None:
            name, theirs, ours = differing
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
    """Return every full set of the network's weights in a state."""
    sets = [state.theta]
    if state.theta_gp is not None:
        sets.append(state.theta_gp)
    if state.stage is not None and state.stage.best is not None:
        sets.append(state.stage.best.theta)
    if state.memory.posterior is not None:
        sets.append(state.memory.posterior.mean)
    return sets


def _check_fit(file: Path, weights: Params, theta: Params) -> None:
    """Raise a BecameError that names the first of these weights whose shape or type is not the network's."""
    for name in {**theta, **weights}:
        if name not in weights or name not in theta:
            there, missing = ("network", "checkpoint") if name in theta else ("checkpoint", "network")
            raise BecameError(f"{file} is of another network: the {there} has '{name}', the {missing} has not.")
        saved, own = on_host(weights[name]), on_host(theta[name])
        if (saved.shape, saved.dtype) != (own.shape, own.dtype):
            raise BecameError(
                f"{file} is of another network: '{name}' is {saved.dtype} {list(saved.shape)} there, "
                f"{own.dtype} {list(own.shape)} here."
            )
