"""The loss of a Keras model on a user's batches: its Fisher information, slopes and curvature, and what layers read.

A likelihood gives all of it. Any other loss, (outputs, targets) -> the mean over the samples of a batch, has the
empirical Fisher information, and curvature along a direction as the difference of slopes at its two sides.

Convention: means over samples or over tokens, as the likelihood says; the model runs in evaluation mode and is not
changed. Parameters go by the names of ``adapters/tensorflow/parameters.py``, and are those that are trained.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from adapters.backend.batches import (
    counted,
    drawn,
    gradient_by_outputs,
    length_of,
    mean_loss,
    units_of,
    with_progress,
)
from adapters.backend.checking import check_network
from adapters.backend.memory import InputGrams, matrices_with
from adapters.backend.merging import by_slopes
from adapters.backend.own_loop import NetworkCheck
from adapters.backend.own_loss import OwnLoss
from adapters.tensorflow.batches import Reader, batches_of
from adapters.tensorflow.checking import KerasView
from adapters.tensorflow.derivatives import Derivatives
from adapters.tensorflow.parameters import Parameter, layers_of
from adapters.tensorflow.tapping import Tapping
from adapters.tensorflow.traced import KerasFunction, samples_of
from became_core import BecameError, Quadratic
from became_core.arrays import Array, Params
from became_core.curvature import Bernoulli, Categorical, FisherTargets, Likelihood, Taps, square_sums
from became_core.errors import first_line

__all__ = ["DataLoss", "Loss"]

Loss = Callable[[Array, Any], Array]


class KerasLoss(OwnLoss):
    """A loss of the user's own, or one of Keras's."""

    def called(self, outputs: Array, targets: Any) -> Array:
        """Return the loss of a batch; Keras's own losses have the targets first.

        Raises:
            BecameError: if a function cannot be called with outputs and targets, in this order.
        """
        if isinstance(self.function, keras.losses.Loss):
            return tf.convert_to_tensor(self.function(targets, outputs))
        try:
            return tf.convert_to_tensor(self.function(outputs, targets))
        except ValueError as error:
            raise BecameError(
                f"the loss cannot be taken of outputs and targets, in this order ({first_line(error)}); a function of "
                "Keras has the targets first, so wrap it in one that has the outputs first."
            ) from error

    def gradient(self, outputs: Array, targets: Any) -> Array:
        """Return the gradient of the sum of all samples' losses by the outputs."""
        with tf.GradientTape() as tape:
            tape.watch(outputs)
            loss = self.value(outputs, targets) * outputs.shape[0]
        return tape.gradient(loss, outputs)


class DataLoss:
    """A model's loss on batches, as a function of its weights.

    Attributes:
        loss: a likelihood, or a loss of the user's own as one.
        network: the model as a function of its trained parameters.
        checked: what the first look at the network found; None before it, or if there is none.
        matrices: the parameters that are used as matrices alone, and whether they are stored as [d_in, d_out]; None
            before any data are remembered.
    """

    def __init__(
        self,
        model: keras.Model,
        likelihood: Likelihood | Loss,
        reader: Reader,
        *,
        checks: bool,
        shows: bool,
        fisher: FisherTargets = "empirical",
    ) -> None:
        """Keep what is needed.

        Args:
            model: built.
            likelihood: or a loss.
            reader: how batches are read.
            checks: whether the network is checked at the first look.
            shows: whether a terminal shows how far a pass is.
            fisher: of which targets the Fisher information is: those given, or the model's own, exactly or drawn.
        """
        self.loss = likelihood if isinstance(likelihood, Likelihood) else KerasLoss(likelihood)
        self.network = KerasFunction(model, reader)
        self.checked: NetworkCheck | None = None
        self.matrices: dict[str, bool] | None = None
        self._reader, self._checks, self._shows, self._kind = reader, checks, shows, fisher
        self._tapping, self._derivatives = Tapping(self.network), Derivatives(self.network)
        self._looked = False
        # Only data that are to be remembered say which matrices can be protected.
        self._knows_matrices, self._held = True, frozenset[str]()

    def retrace(self) -> None:
        """Trace the model anew from here on: which of its parts it uses may depend on what Python knows now."""
        for traced in (self.network, self._tapping, self._derivatives):
            traced.retrace()
        self._looked = False

    @property
    def trained(self) -> dict[str, Parameter]:
        """The parameters that training changes."""
        return self.network.trained

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all parameters."""
        return {name: tuple(parameter.shape) for name, parameter in self.network.parameters.items()}

    def weights(self) -> Params:
        """Return copies of the parameters that are trained."""
        return self.network.weights()

    def assign(self, theta: Params) -> None:
        """Set the parameters that are trained."""
        self.network.assign(theta)

    @contextmanager
    def kept_on_error(self) -> Iterator[None]:
        """Give back what was known of the data before this context, if it ends in an error."""
        before = self.loss, self.matrices, self._looked, self._knows_matrices
        try:
            yield
        except BaseException:
            self.loss, self.matrices, self._looked, self._knows_matrices = before
            raise

    @staticmethod
    def in_dtype(numbers: Array, like: Array) -> Array:
        """Return numbers in the dtype of an array, and in at least float32."""
        return tf.cast(numbers, like.dtype if like.dtype == tf.float64 else tf.float32)

    def _look(self, theta: Params, inputs: Any, targets: Any) -> None:
        """Look at the network once for each trace: its logits and matrices, and whether we compute what it computes."""
        if self._looked and self._knows_matrices:
            return
        few = samples_of(inputs, slice(3))
        if isinstance(self.loss, Categorical | Bernoulli):
            wanted = "softmax" if isinstance(self.loss, Categorical) else "sigmoid"
            self.network.find_link(theta, few, wanted)
        outputs = self.network.outputs(theta, inputs)
        self.loss = self.loss.fitted(outputs, targets)
        if not self._knows_matrices:
            found = self._tapping.ways(theta, inputs, outputs)
            self.matrices = matrices_with(self.matrices or {}, found, self._held)
            self._knows_matrices = True
        if self._checks and self.checked is None:
            self._check_training(few)
            self.checked = check_network(KerasView(self.network, self._tapping, self._derivatives, theta, few))
            self.checked.assert_sound()
        self._looked = True

    def _check_training(self, inputs: Any) -> None:
        """Raise a BecameError if the model trains parameters by itself; a function of the user's own is not asked."""
        changed = [] if self._reader.apply is not None else self.network.changed_in_training(inputs)
        if changed:
            raise BecameError(
                f"the model assigns to '{changed[0]}' when it runs in training mode, as spectral normalisation does, "
                "and no projection of steps sees that; leave this out, or let that parameter not be trained."
            )

    def _read(
        self, theta: Params, batches: Iterable[Any], what: str = "", share: float | None = 1.0
    ) -> Iterator[tuple[Any, Any]]:
        """Yield the parts of batches, or of a share of them; a terminal shows how far a pass is that has a name."""
        total = self._length(batches)
        shown = with_progress(batches_of(batches), what, self._shows and bool(what), total)
        for batch in drawn(shown, share, total):
            inputs, targets = self._reader.split(batch)
            self._look(theta, inputs, targets)
            yield inputs, targets

    @staticmethod
    def _length(batches: Iterable[Any]) -> int | None:
        return batches.num_batches if isinstance(batches, keras.utils.PyDataset) else length_of(batches)

    def fisher(
        self,
        batches: Iterable[Any],
        *,
        with_memory: bool,
        held: frozenset[str] = frozenset(),
        share: float | None = 1.0,
    ) -> tuple[Params, InputGrams]:
        """Return the diagonal Fisher information at the weights as they are, and what a projector remembers.

        Args:
            batches: of the data.
            with_memory: whether a projector shall remember them; what is a matrix is then found anew, as other data
                may use other parts of the model.
            held: the parameters that old data hold otherwise than by the spaces of a projector, which they go on to do.
            share: of the batches, drawn at random, that is measured; None for one that suits their number.
        """
        if with_memory:
            self._knows_matrices, self._held = False, held
        theta, finished = self.network.weights(), InputGrams()
        what = "remembering" if with_memory else "measuring"
        units, rng = 0.0, np.random.default_rng(0)

        def taps_of_batches() -> Iterator[Taps]:
            nonlocal units
            for inputs, targets in self._read(theta, batches, what, share):
                outputs = self.network.outputs(theta, inputs)
                units += units_of(self.loss, outputs, targets)
                seeds = self.loss.cotangents(outputs, targets, self._kind, rng)
                for index, seed in enumerate(seeds):
                    taps = self._tapping.taps(theta, inputs, seed)
                    if with_memory and index == 0:  # the inputs are the same for all targets
                        finished.add(taps, frozenset(self.matrices or {}))
                    yield taps

        squares = square_sums(taps_of_batches())
        counted(units)
        fisher = {
            name: tf.reshape(squares[name], value.shape) / units if name in squares else tf.zeros_like(value)
            for name, value in theta.items()
        }
        return fisher, finished

    def estimate_statistics(self, batches: Iterable[Any]) -> None:
        """Estimate the running statistics of batch norms anew, at the weights as they are; an error leaves them."""
        with batch_statistics(self.network.model):
            for batch in batches_of(batches):
                self._reader.outputs(self.network.model, self._reader.split(batch)[0])

    def slopes(
        self,
        batches: Iterable[Any],
        theta: Params,
        directions: Sequence[Params],
        places: Sequence[Sequence[float]],
        *,
        share: float | None = 1.0,
    ) -> Array:
        """Return the slopes of the mean loss along K directions at M places, [M, K], in float64."""
        units, total = 0.0, tf.zeros((len(places), len(directions)), tf.float64)
        for inputs, targets in self._read(theta, batches, share=share):
            rows = []
            for place in places:
                moved = _moved(theta, directions, place)
                outputs = self.network.outputs(moved, inputs)
                seed = gradient_by_outputs(self.loss, outputs, targets)
                gradient = self.network.gradient(moved, inputs, seed)
                rows.append([_product(gradient, direction) for direction in directions])
            total += tf.stack(rows)
            units += units_of(self.loss, outputs, targets)
        return total / counted(units)

    def along(
        self, batches: Iterable[Any], theta: Params, directions: Sequence[Params], share: float | None = 1.0
    ) -> tuple[Quadratic, str]:
        """Return the mean loss along directions from theta, and how its curvature was measured."""
        if isinstance(self.loss, OwnLoss):
            slopes = partial(self.slopes, batches, theta, directions, share=share)
            return by_slopes(slopes, theta, len(directions)), "a difference of slopes"
        slope, curvature, units = tf.zeros((), tf.float64), tf.zeros((), tf.float64), 0.0
        for inputs, targets in self._read(theta, batches, share=share):
            outputs, tangents = self._derivatives.along(theta, directions, inputs)
            units += units_of(self.loss, outputs, targets)
            first, second = self.loss.derivatives(outputs, tangents, targets)
            slope, curvature = slope + _double(first), curvature + _double(second)
        return Quadratic(slope / counted(units), curvature / units), self._derivatives.way

    def mean(self, batches: Iterable[Any], theta: Params | None = None) -> float:
        """Return the mean loss at these weights, or at the weights as they are."""
        theta = self.weights() if theta is None else theta
        passes = ((self.network.outputs(theta, inputs), targets) for inputs, targets in self._read(theta, batches))
        first = list(islice(passes, 1))  # to which the likelihood is fitted, if it was not yet
        return mean_loss(self.loss, chain(first, passes))


def moving_means(model: keras.Model) -> dict[str, NDArray[Any]]:
    """Return the moving means of all batch norms as they are, by the layer's name."""
    norms = (layer for layer in layers_of(model) if isinstance(layer, keras.layers.BatchNormalization) and layer.built)
    return {norm.name: np.asarray(norm.moving_mean) for norm in norms}


@contextmanager
def batch_statistics(model: keras.Model) -> Iterator[None]:
    """Let each batch norm that is trained normalise by a batch's own statistics, and keep the mean over all its runs.

    The rest of the model runs as it is called, and batch norms whose ``trainable`` is false keep their statistics. In
    this context functions that the user has compiled run eagerly, so that every run is seen. If it ends in an error,
    statistics are as they were.
    """
    norms = [n for n in layers_of(model) if isinstance(n, keras.layers.BatchNormalization) and n.trainable]
    kept = [(norm, norm.momentum, vars(norm).get("call")) for norm in norms]
    before = [(value, tf.identity(value)) for n in norms for value in n.non_trainable_variables]
    is_eager = tf.config.functions_run_eagerly()

    def observe(norm: Any) -> None:
        runs, original = 0, norm.call

        def call(inputs: Any, *arguments: Any, **options: Any) -> Any:
            nonlocal runs
            norm.momentum = runs / (runs + 1)  # of a running mean: each run counts alike
            runs += 1
            return original(inputs, *arguments, **options | {"training": True})

        norm.call = call

    try:
        tf.config.run_functions_eagerly(True)
        for norm in norms:
            observe(norm)
        yield
    except BaseException:
        for value, number in before:
            value.assign(number)
        raise
    finally:
        tf.config.run_functions_eagerly(is_eager)
        for norm, momentum, own in kept:
            norm.momentum = momentum
            if own is None:
                vars(norm).pop("call", None)
            else:
                norm.call = own


def _double(value: Any) -> Array:
    return tf.cast(value, tf.float64)


def _moved(theta: Params, directions: Sequence[Params], coefficients: Sequence[float]) -> Params:
    """Return weights plus directions times coefficients."""
    moved = dict(theta)
    for direction, coefficient in zip(directions, coefficients, strict=True):
        if coefficient:
            moved = {name: value + coefficient * direction[name] for name, value in moved.items()}
    return moved


def _product(gradient: Params, direction: Params) -> Array:
    """Return the inner product of a gradient with a direction, in float64."""
    return tf.add_n([tf.reduce_sum(_double(gradient[name]) * _double(value)) for name, value in direction.items()])
