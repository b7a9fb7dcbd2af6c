"""The method around the training of a user's own Keras model: ``model.fit`` or a loop of their own, any optimizer.

What is projected is the step of the user's optimizer (``adapters/tensorflow/steps.py``), and what is measured is the
loss on the user's batches (``adapters/tensorflow/data_loss.py``). The model runs as it is.

Convention: losses and Fisher information are means over samples or over tokens, as the likelihood says, and tasks count
alike, each with its mean. Parameters go by the names and in the layouts of ``adapters/tensorflow/parameters.py``; those
that are not trained are never touched.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import keras
import numpy as np
import tensorflow as tf
from safetensors.numpy import save_file

from adapters.backend.calibration import Calibration
from adapters.backend.continual import ContinualModel
from adapters.backend.memory_file import read_memory, restored, written
from adapters.backend.own_loop import MergeReport, Uncovered, known_likelihood, warn_of_statistics
from adapters.tensorflow.batches import Apply, Reader, Targets
from adapters.tensorflow.data_loss import DataLoss, Loss, moving_means
from adapters.tensorflow.steps import StepGuard, Witness, moments_of, observed, parts_of
from adapters.tensorflow.traced import as_written
from became_core import BecameError
from became_core.arrays import Array
from became_core.curvature import FisherTargets, Likelihood
from became_core.laplace import Estimator
from became_core.projection import Projector

__all__ = ["Continual"]


class Continual(ContinualModel):
    """A Keras model that learns tasks one after the other, by ``model.fit`` or in a loop of the user's own.

    What Python chooses as the model runs, such as one of several heads, is found anew by ``remember``, ``stable`` and
    ``merge``, and stays so in ``observe`` and ``save``.

    Attributes:
        model: the user's own; between calls nothing of ours is left in it.
        posterior: the old tasks' loss, to second order; None before anything is remembered.
        projector: the memory of the spaces that old tasks use.

    Examples:
        >>> keras.utils.set_random_seed(0)
        >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
        >>> model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        >>> old = tf.data.Dataset.from_tensors((tf.random.normal((32, 8)), tf.range(32) % 4))
        >>> new = tf.data.Dataset.from_tensors((tf.random.normal((32, 8)), tf.range(32) % 4))
        >>> learning = Continual(model, likelihood="categorical")
        >>> learning.remember(old)
        >>> with learning.stable():
        ...     _ = model.fit(new, verbose=0)
        >>> with learning.plastic():
        ...     _ = model.fit(new, verbose=0)
        >>> 0 <= learning.merge(new).alpha <= 1
        True
    """

    def __init__(
        self,
        model: keras.Model,
        likelihood: str | Likelihood | Loss = "categorical",
        *,
        projector: Projector | None = None,
        uncovered: Uncovered = "penalised",
        penalty: float = 100.0,
        fisher: FisherTargets = "empirical",
        decay: float = 1.0,
        estimator: Estimator | None = None,
        calibration: Calibration | None = None,
        apply: Apply | None = None,
        targets: Targets | None = None,
        check: bool = True,
        progress: bool = True,
    ) -> None:
        """Keep the model, and what is to be done with it.

        Args:
            model: any Keras model that is built.
            likelihood: "categorical", "gaussian" or "bernoulli", a value of ``became_core.curvature``, one of Keras's
                losses, or any loss: (outputs, targets) -> the mean over the samples of the batch, of which Fisher
                information is the empirical one, and curvature along a direction a difference of slopes.
            projector: what protects matrices: an empty ``GPM()``, ``SGP()`` or ``NSCL()``, or another that needs only
                what layers read; ``GPM()`` if not given.
            uncovered: what is done with parameters that it cannot protect: they are "penalised" for leaving the old
                tasks' posterior, "frozen" or "free".
            penalty: the strength of that penalty; 100, as in NSCL's published runs. Of an Adam it acts in the metric of
                the steps, as a penalty in the loss would.
            fisher: the Fisher information of "empirical" targets, those given; or of the model's own, as the "true"
                expectation (a backward pass for each class or output) or "sampled".
            decay: the share of the old tasks' precision that each new task leaves, the paper's gamma.
            estimator: how losses along the way between two models are estimated; the paper's closed form,
                ``PaperClosedForm()``, if not given. ``Secant()`` is what ``became run --precision exact`` has.
            calibration: "across" tasks: the curvature of each is calibrated when it is remembered, along the movement
                of the task before, and a merge has an estimator of its own. Then this object must be made before the
                first task is trained. None, as in the paper, if not given.
            apply: (model, batch) -> outputs, for batches that are no pairs of inputs and targets.
            targets: batch -> targets, likewise.
            check: whether the network is looked at once, in the first ``remember`` or ``merge``.
            progress: whether a terminal shows how far a pass is.

        Raises:
            BecameError: if something of these cannot be used.
        """
        super().__init__(
            model,
            projector=projector,
            uncovered=uncovered,
            penalty=penalty,
            fisher=fisher,
            decay=decay,
            estimator=estimator,
            calibration=calibration,
        )
        known = known_likelihood(likelihood)
        self._data: DataLoss = DataLoss(
            model, known, Reader(as_written(apply), targets), checks=check, shows=progress, fisher=fisher
        )
        if not self._data.trained:
            raise BecameError("no variable of the model is trainable; there is nothing to learn.")
        self._begin_calibration()

    def remember(
        self,
        batches: Iterable[Any] | None = None,
        *,
        optimizer: keras.Optimizer | None = None,
        samples: int | None = None,
        share: float | None = None,
    ) -> None:
        """Remember the data that the model has learned, at the weights as they are.

        One pass over the batches, in evaluation mode, gives the memory of the spaces that they use and the exact
        diagonal of the Fisher information. Both are means. So of many batches a random share is measured, which tells
        nearly the same in a part of the time; but what no drawn batch uses, such as the embedding of a rare word, is
        then taken for unused.

        Without old data there may be an optimizer: the second moments of Adam, without their bias and times the samples
        of a step, stand for the Fisher information; then there is no memory of spaces, and nothing is protected but
        penalised.

        Args:
            batches: of the old data: an iterable of pairs, a ``tf.data.Dataset`` or a ``keras.utils.PyDataset``.
            optimizer: an Adam that has just trained the model on them, instead of batches.
            samples: with an optimizer, how many samples (or tokens) a step had.
            share: of the batches, drawn at random, that is measured: 1 for all. If not given, all of up to 64 batches,
                64 of up to 256, and a quarter of more; all, if their number is not known.

        Raises:
            BecameError: if there is no batch, or a batch or an optimizer cannot be used.
        """
        if (batches is None) == (optimizer is None):
            raise BecameError("remember needs either batches or an optimizer; give one of them.")
        self._check_not_stable("remembering")
        self._data.retrace()
        self._check_names()
        self._check_shapes()
        moments = None if optimizer is None else moments_of(optimizer, self._data.trained)
        self._remember(batches, share, moments, samples, self._variables)

    @contextmanager
    def stable(self, *optimizers: keras.Optimizer) -> Iterator[None]:
        """Keep every step of the optimizer out of the spaces that old data use, for the time of this context.

        Args:
            optimizers: all that step the model in a loop of the user's own; the one that the model was compiled with if
                none is given.

        Raises:
            BecameError: before anything is remembered; if there is no optimizer, or it overwrites the weights by their
                running mean, or steps no variable of the model; if a parameter was not trained then, or its layer has
                another name now, or has a constraint, or is in stable training of another object; or, at the end, if
                steps were taken by a function that was compiled before, or anything but these optimizers has changed
                weights.
        """
        self._check_not_stable("stable training")
        self._data.retrace()
        self._check_names()
        self._check_as_remembered()
        self._check_no_constraint()
        own = getattr(self.model, "optimizer", None)
        used = optimizers or ((own,) if own is not None else ())
        if not used:
            raise BecameError("the model is not compiled, so it has no optimizer; compile it, or give stable() yours.")
        steppers = [part for optimizer in used for part in parts_of(optimizer, self.model.trainable_variables)]
        guards = [self._guard() for _ in steppers]
        witness, means = Witness(self._data.network.parameters, guards), moving_means(self.model)
        self._warn_of_replaced(self._variables, self._is_as_remembered)
        # What fit has compiled before takes steps that are not observed, so it must compile anew; and once more at the
        # end, since the model may have been given another optimizer in between.
        with self._stable(self._variables):
            self.model.train_function = None
            try:
                with ExitStack() as stack:
                    for optimizer, guard in zip(steppers, guards, strict=True):
                        stack.enter_context(observed(optimizer, guard))
                    yield
                witness.at_end()
                warn_of_statistics(means, moving_means(self.model))
            finally:
                self.model.train_function = None
                self._data.retrace()  # with layers that were built inside of the context
                self._end_stable()

    def _check_no_constraint(self) -> None:
        """Raise a BecameError if Keras holds a weight to a constraint in each step, which a correction may break."""
        for name, parameter in self._data.network.trained.items():
            is_corrected = name in self.projector.rank or self.uncovered == "penalised"
            if is_corrected and parameter.variable.constraint is not None:
                raise BecameError(
                    f"'{name}' has a constraint, which a projected or penalised step may break; leave it out, or "
                    "freeze the layer."
                )

    def merge(self, batches: Iterable[Any], *, trace: int = 0, statistics: Iterable[Any] | None = None) -> MergeReport:
        """Merge the stable and the present, plastic weights; the model then has the merged ones, theta*.

        Args:
            batches: of the new data; a part of them will do.
            trace: at how many alphas the true loss of the new data is measured, both ends among them; 0 for none.
            statistics: batches that the running statistics of batch norms are estimated from, at the merged weights;
                they stay those of the plastic model if not given.

        Raises:
            BecameError: if there was no stable training since the last memory, one point alone is to be traced, or
                batches cannot be used; the model is as it was then, and can be merged again.
        """
        self._data.retrace()
        return self._merge(batches, trace, statistics, "other variables are trainable")

    def _write(self, arrays: dict[str, Array], file: str | Path, metadata: dict[str, str]) -> None:
        tensors = {name: np.asarray(tf.convert_to_tensor(value).numpy()) for name, value in arrays.items()}
        with written(file) as temporary:
            save_file(tensors, temporary, metadata)

    @classmethod
    def load(cls, model: keras.Model, file: str | Path, **settings: Any) -> Self:
        """Return what ``save`` wrote, around a model of the same architecture, or one that has new heads beside it.

        A memory of PyTorch's is taken as well, if names and shapes agree: ``Dense(..., name="fc1")`` is ``self.fc1``.
        A matrix that reads flattened images has its columns in another order there, which no shape tells.

        Args:
            model: its weights are left as they are.
            file: the memory.
            settings: arguments of the constructor that a file does not hold (``estimator``, ``apply``, ``targets``,
                ``check``, ``progress``, a loss), or that are to be others.

        Raises:
            BecameError: if the file is no memory, or is one of another architecture.
        """
        description, arrays = read_memory(file, "np")
        tensors = {name: tf.constant(value) for name, value in arrays.items()}
        # The names of the model's parameters are known when it is wrapped.
        shapes = cls(model, **settings)._data.shapes
        stored = restored(file, description, tensors, shapes, settings, may_have_grown=True)
        learning = cls(model, **stored.settings)
        learning._restore(stored)
        return learning

    @property
    def _variables(self) -> dict[str, Any]:
        return {name: parameter.variable for name, parameter in self._data.trained.items()}

    def _is_as_remembered(self, name: str) -> bool:
        assert self.posterior is not None
        return bool(tf.reduce_all(self._data.trained[name].value == self.posterior.mean[name]))

    def _check_names(self) -> None:
        """Raise a BecameError if a remembered parameter has another name now, as layers around it were replaced."""
        then = {id(owner()): name for name, owner in self._owners.items() if owner() is not None}
        for name, variable in self._variables.items():
            if then.get(id(variable), name) != name:
                raise BecameError(
                    f"what was '{then[id(variable)]}' when old data were remembered is '{name}' now, as Keras numbers "
                    "layers by itself; give them names of their own before the model is handed over."
                )

    def _guard(self) -> StepGuard:
        return StepGuard(
            parameters=self._data.network.parameters,
            projector=self.projector,
            transposed=self._transposed,
            frozen=self._held if self.uncovered == "frozen" else frozenset(),
            penalised=self._penalised,
        )
