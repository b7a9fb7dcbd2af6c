"""What ``Continual`` does alike on the frameworks whose models hold their own weights.

An adapter's class adds how steps are kept out of old data's spaces, and how arrays are written and read. What it
measures is its ``DataLoss``. In JAX, where a model is a function, there are functions instead:
``adapters/jax/memory.py`` and ``own_loop.py``.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any
from weakref import ReferenceType, ref

from adapters.backend.batches import repeatable
from adapters.backend.calibration import NO_BATCHES, AcrossTasks, Calibration, estimator_for
from adapters.backend.memory import (
    Moments,
    check_settings,
    fisher_of_moments,
    grown,
    held_by_curvature,
)
from adapters.backend.memory_file import Stored, described, memory_arrays
from adapters.backend.merging import ModelData, TaskLoss, check_trace, merge_report
from adapters.backend.own_loop import Coverage, MergeReport, NetworkCheck, Uncovered, coverage_of
from adapters.backend.own_loss import as_given
from became_core import BecameError, LaplacePosterior, merge
from became_core.arrays import Array, Params
from became_core.continual import BayesianDetector, Detector, Reservoir, standardised
from became_core.curvature import FisherTargets
from became_core.laplace import Estimator
from became_core.projection import GPM, Projector

__all__ = ["ContinualModel"]

# How many batches a loss is compared with.
COMPARED = 20

UNMOVED = (
    "make Continual before the model is trained on the old data, when it has the weights that this training begins "
    "from, which may be loaded into it for that."
)

# The identities of parameters whose steps are projected now.
_IN_STABLE_TRAINING: set[int] = set()


class ContinualModel(ABC):
    """A model that learns tasks one after the other, in training that is not ours.

    Attributes:
        model: the user's own; between calls nothing of ours is left in it.
        posterior: the old tasks' loss, to second order; None before anything is remembered.
        projector: the memory of the spaces that old tasks use.
        detector: what decides, in ``observe``, that the data have changed; another may be set before the first batch.
        reservoir: batches that ``observe`` was given since the last change, each with the same chance; one of another
            capacity may be set before the first batch. After a change they are those before it, until the next batch.
    """

    _data: ModelData

    def __init__(
        self,
        model: Any,
        *,
        projector: Projector | None,
        uncovered: Uncovered,
        penalty: float,
        fisher: FisherTargets,
        decay: float,
        estimator: Estimator | None,
        calibration: Calibration | None,
    ) -> None:
        """Keep the model and the settings, which are those of the adapter's constructor; it adds ``_data``.

        Raises:
            BecameError: if a setting cannot be used.
        """
        self.model = model
        self.projector: Projector = GPM() if projector is None else projector
        self.uncovered, self.penalty, self.decay, self.fisher = uncovered, penalty, decay, fisher
        self.estimator, self.calibration = estimator_for(calibration, estimator), calibration
        self.posterior: LaplacePosterior | None = None
        self._across: AcrossTasks | None = None  # what calibrates the next task
        self._begin: Params | None = None  # the weights before the first task, if it is to be calibrated
        self._theta_gp: Params | None = None
        self._then: dict[str, tuple[int, ...]] = {}  # the shapes of all parameters when old data were remembered
        self._measured: frozenset[str] = frozenset()  # the parameters that were trained when data were remembered last
        self._owners: dict[str, ReferenceType[Any]] = {}  # the framework's own parameters that were remembered last
        self.detector: Detector = BayesianDetector()
        self.reservoir = Reservoir(COMPARED)
        self._is_stable = False
        self._beginning: tuple[Detector, Reservoir] | None = None
        self._losses: tuple[float, ...] = ()
        check_settings(self.projector, uncovered, penalty, decay, fisher)

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied and pickled: all but references to the framework's own parameters.

        A copy that is made in stable training is in none: nobody projects the steps of its model.
        """
        return vars(self) | {"_owners": {}, "_is_stable": False}

    @property
    def likelihood(self) -> Any:
        """How probable targets are, or the loss that was given; a Gaussian one's noise is fitted to the first data."""
        return as_given(self._data.loss)

    @property
    def checked(self) -> NetworkCheck | None:
        """What the first look at the network found; None before it, or if there is none."""
        return self._data.checked

    @property
    def coverage(self) -> Coverage:
        """What happens to every parameter while training is stable.

        Raises:
            BecameError: before anything is remembered.
        """
        self._check_remembered("coverage")
        sizes = {name: prod(shape) for name, shape in self._data.shapes.items()}
        matrices, held = self._data.matrices or {}, self._held
        return coverage_of(sizes, self._data.trained, matrices, self.projector, self.uncovered, held)

    @contextmanager
    def plastic(self) -> Iterator[None]:
        """Mark the time in which the model is trained freely; it must come after a stable one."""
        self._check_not_stable("plastic training")
        if self._theta_gp is None:
            raise BecameError("plastic training comes after stable training; train in learning.stable(...) first.")
        yield

    def observe(self, batch: Any) -> bool:
        """Return whether what the model knew no longer holds; the batch is one that it has not been trained on yet.

        The batch's loss by the model as it is, in evaluation mode, is compared with those of the last 20 batches, each
        as it arrived, in standard deviations; ``detector`` decides. So nothing is announced among the first 20 batches
        after a change. A batch that looks new is neither stored nor compared with later.

        Args:
            batch: of a stream, before the model is trained on it.

        Raises:
            BecameError: if the batch cannot be used, or its loss is not finite.

        For example, in a loop over a stream, with a function of the user's own that learns what is new:

            for batch in stream:
                if learning.observe(batch):
                    learning.remember(learning.reservoir.batches)
                    learn_new_task(learning, stream)
                train(model, batch)
        """
        if self._beginning is None:
            self._beginning = self.detector, self.reservoir
        if self.detector.changed:
            self.detector, self.reservoir = self._beginning
            self._losses = ()
        loss = self._data.mean([batch])
        if len(self._losses) == COMPARED:
            self.detector = self.detector.observe(standardised(loss, self._losses))
            if self.detector.changed or self.detector.suspects:
                return self.detector.changed
        self._losses = (*self._losses, loss)[-COMPARED:]
        self.reservoir = self.reservoir.offer(batch)
        return False

    def save(self, file: str | Path) -> None:
        """Write the memory, without the model, as safetensors with metadata in JSON; all frameworks' are alike.

        Raises:
            BecameError: before anything is remembered, or if the projector has no registered name, or a setting is
                neither a number, nor a word, nor a list of them.
        """
        arrays, metadata = self._stored()
        self._write(arrays, file, metadata)

    def _stored(self) -> tuple[dict[str, Array], dict[str, str]]:
        """Return the arrays and the metadata of a file."""
        self._check_remembered("a file")
        assert self.posterior is not None
        metadata = described(
            self._then,
            self._data.matrices or {},
            self.projector,
            self.likelihood,
            uncovered=self.uncovered,
            penalty=self.penalty,
            decay=self.decay,
            fisher=self.fisher,
            measured=sorted(self._measured),
            across=self._across,
        )
        return memory_arrays(self.posterior, self.projector, self._across), metadata

    # What a framework adds.

    @abstractmethod
    def _write(self, arrays: dict[str, Array], file: str | Path, metadata: dict[str, str]) -> None:
        """Write arrays and metadata as safetensors."""

    # What its methods are made of.

    def _begin_calibration(self) -> None:
        """Keep the weights as they are, from which the first task begins, if tasks are calibrated across each other."""
        if self.calibration == "across":
            self._begin = self._data.weights()

    def _remember(
        self,
        batches: Iterable[Any] | None,
        share: float | None,
        moments: Mapping[str, Moments | None] | None,
        samples: int | None,
        owners: Mapping[str, Any],
    ) -> None:
        """Add a task, at the weights as they are; nothing is changed if that fails.

        Args:
            batches: of ``remember``.
            share: of ``remember``.
            moments: of the optimizer that ``remember`` was given instead of batches.
            samples: of ``remember``.
            owners: the parameters of the framework that were trained.
        """
        theta, posterior, across, projector = self._data.weights(), self.posterior, self._across, self.projector
        if moments is not None and self.calibration == "across":
            raise BecameError(NO_BATCHES)
        if self._begin is not None:
            across = AcrossTasks.since(self._begin, theta, UNMOVED)
        with self._data.kept_on_error():
            if moments is not None:
                fisher = fisher_of_moments(moments, samples, theta, stacklevel=3)
            else:
                assert batches is not None
                of_old = {} if posterior is None else posterior.precision.diagonal()
                held = held_by_curvature(of_old, self._data.matrices or {})
                kept = batches if across is None else repeatable(batches)
                fisher, finished = self._data.fisher(kept, with_memory=True, held=held, share=share)
                projector = projector.remember(finished)
                if across is not None and posterior is not None:
                    task = TaskLoss(self._data, kept, theta, share=share)
                    across, posterior, fisher = across.remembered(posterior, fisher, task)
            self.posterior = grown(posterior, theta, fisher, self.decay)
        self.projector, self._across, self._begin = projector, across, None
        self._then = {name: tuple(shape) for name, shape in self._data.shapes.items()}
        self._owners = {name: ref(owner) for name, owner in owners.items()}
        self._measured = frozenset(fisher)
        self._theta_gp = None

    def _end_stable(self) -> None:
        """Keep the weights as they are, the stable ones."""
        self._theta_gp = self._data.weights()
        if self._across is not None and self.posterior is not None:
            self._across = self._across.after_stage(self.posterior.mean, self._theta_gp)

    def _restore(self, stored: Stored) -> None:
        """Take the memory of a file."""
        self.posterior, self._data.matrices, self._measured = stored.posterior, stored.matrices, stored.measured
        self._across, self._begin = stored.across, None
        self._then = {name: tuple(shape) for name, shape in stored.shapes.items()}

    def _merge(self, batches: Iterable[Any], trace: int, statistics: Iterable[Any] | None, others: str) -> MergeReport:
        """Merge as ``merge`` of an adapter says; if that fails, the model is as it was, and can be merged again.

        Args:
            batches: of ``merge``.
            trace: of ``merge``.
            statistics: of ``merge``; they may be the very iterator that the batches are.
            others: begins the message if other parameters are trained now.
        """
        self._check_not_stable("a merge")
        check_trace(trace)
        if self._theta_gp is None or self.posterior is None:
            raise BecameError(
                "a merge is of two models; train in learning.stable(...), and then in learning.plastic()."
            )
        theta_gp, theta_hat = self._theta_gp, self._data.weights()
        if theta_gp.keys() != theta_hat.keys():
            raise BecameError(f"{others} than in stable training; let the same ones be trained.")
        kept = repeatable(batches)
        posterior, across = self.posterior, self._across
        if across is not None:
            across, posterior = across.merged(posterior, theta_gp, theta_hat, lambda: self._measured_at(theta_gp, kept))
        report = merge_report(self.estimator, posterior, theta_gp, TaskLoss(self._data, kept, theta_hat), trace)
        try:
            self._data.assign(merge(theta_gp, theta_hat, report.alpha))
            if statistics is not None:
                self._data.estimate_statistics(kept if statistics is batches else statistics)
        except BaseException:
            self._data.assign(theta_hat)
            raise
        self.posterior, self._across, self._theta_gp = posterior, across, None
        return report

    def _measured_at(self, theta: Params, batches: Iterable[Any]) -> tuple[TaskLoss, Params]:
        """Return a task at other weights than those of the model, and its diagonal Fisher information there."""
        before = self._data.weights()
        self._data.assign(theta)
        try:
            fisher, _ = self._data.fisher(batches, with_memory=False)
        finally:
            self._data.assign(before)
        return TaskLoss(self._data, batches, theta), fisher

    @property
    def _held(self) -> frozenset[str]:
        """The parameters that may be held to old data: those of which something is known, or that were there then."""
        known = {} if self.posterior is None else self.posterior.mean
        return frozenset(self._then if self.uncovered == "frozen" else known)

    @property
    def _transposed(self) -> frozenset[str]:
        """The matrices that are stored as [d_in, d_out]."""
        return frozenset(name for name, is_transposed in (self._data.matrices or {}).items() if is_transposed)

    @property
    def _penalised(self) -> dict[str, tuple[Array, Array]]:
        """The mean of every remembered parameter that is pulled back to it, and penalty x precision."""
        if self.uncovered != "penalised":
            return {}
        assert self.posterior is not None
        precision, mean = self.posterior.precision.diagonal(), self.posterior.mean
        return {name: (mean[name], self.penalty * value) for name, value in precision.items()}

    @contextmanager
    def _stable(self, owners: Mapping[str, Any]) -> Iterator[None]:
        """Mark the time in which the steps of optimizers are projected.

        Args:
            owners: the framework's own parameters.

        Raises:
            BecameError: if another object projects the steps of one of them: the second projection of a step may lead
                back into what the first one keeps it out of.
        """
        for name, owner in owners.items():
            if id(owner) in _IN_STABLE_TRAINING:
                raise BecameError(
                    f"'{name}' is in stable training of another Continual; let one of them remember all old data."
                )
        here = {id(owner) for owner in owners.values()}
        _IN_STABLE_TRAINING.update(here)
        self._is_stable = True
        try:
            yield
        finally:
            self._is_stable = False
            _IN_STABLE_TRAINING.difference_update(here)

    def _check_not_stable(self, what: str) -> None:
        if self._is_stable:
            raise BecameError(f"{what} was asked for within learning.stable(...), which must have ended before it.")

    def _check_shapes(self) -> None:
        """Raise a BecameError if a parameter has another shape than when old data were remembered."""
        for name, shape in self._data.shapes.items():
            if tuple(shape) != self._then.get(name, tuple(shape)):
                raise BecameError(
                    f"'{name}' is {list(shape)} now, and was {list(self._then[name])} when old data were remembered; "
                    "leave it as it is, and give new classes a layer of their own."
                )

    def _check_as_remembered(self) -> None:
        """Raise a BecameError if the memory says too little of the model for stable training."""
        self._check_remembered("stable training")
        self._check_shapes()
        for name in self._data.trained:
            is_bound = self.uncovered == "penalised" or name in self.projector.rank
            if is_bound and name in self._then and name not in self._measured:
                raise BecameError(
                    f"'{name}' is trained now, and was not when old data were remembered, so that nothing holds it to "
                    "them; freeze it, remember the old batches while it is trained, or choose uncovered='frozen'."
                )

    def _warn_of_replaced(self, owners: Mapping[str, Any], is_as_remembered: Callable[[str], bool]) -> None:
        """Warn if a parameter took the place of one that was remembered, with values of its own, or if one is gone."""
        gone = [name for name in self._then if name not in self._data.shapes]
        if gone:
            warnings.warn(
                f"'{gone[0]}' was remembered, and is no parameter of the model now, by this name: nothing holds what "
                "took its place; leave the model as it was, or remember the old data again.",
                stacklevel=4,  # where the context begins
            )
            return
        for name, owner in owners.items():
            is_other = name in self._owners and self._owners[name]() is not owner
            if is_other and not is_as_remembered(name):
                warnings.warn(
                    f"'{name}' is another parameter than when old data were remembered, with other values: unless "
                    "these were loaded, what the model knew there is lost; put the old ones back, or remember again.",
                    stacklevel=4,  # where the context begins
                )
                return

    def _check_remembered(self, what: str) -> None:
        if self.posterior is None:
            raise BecameError(f"{what} needs a memory of old data; call learning.remember(old_batches) first.")
